"""Generate emoji from text with the models that come with the package.

    python examples/demo.py
    python examples/demo.py --prompt "fire engine"
    python examples/demo.py --model mar

Writes a grid of 16 images with their prompts, and prints its path and the speed.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from rq_hf import EMOJI_MODEL, MAR_EMOJI_MODEL, MARPipeline
from rq_hf.images import captioned_grid

MODELS = {"rq": EMOJI_MODEL, "mar": MAR_EMOJI_MODEL}
MAR_SETTINGS = {"guidance_scale": 3.0, "num_iterations": 16, "num_inference_steps": 25}
PROMPTS = [
    "fire engine",
    "pizza",
    "octopus",
    "sunflower",
    "woman astronaut medium skin tone",
    "man farmer dark skin tone",
    "woman judge dark skin tone",
    "waving hand",
    "rainbow flag",
    "Japan",
    "red heart",
    "keycap 7",
    "rocket",
    "cat with tears of joy",
    "mage",
    "strawberry",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", help="generate 16 images of this, instead of one for each of 16 prompts")
    parser.add_argument(
        "--model", default="rq", help="rq, mar, or any text-to-image pipeline of ours: a folder or a Hub id"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="file to write; default: demo.png")
    args = parser.parse_args()
    if Image.registered_extensions().get(args.output.suffix.lower()) not in Image.SAVE:
        parser.error(f"--output must end in .png, .jpg or another kind of image, got {args.output}")
    if not args.output.parent.is_dir():
        parser.error(f"--output must be in a folder that exists, got {args.output}")

    pipe = DiffusionPipeline.from_pretrained(MODELS.get(args.model, args.model))
    settings = MAR_SETTINGS if isinstance(pipe, MARPipeline) else {}
    prompts = PROMPTS if args.prompt is None else [args.prompt] * 16
    start = time.perf_counter()
    images = pipe(prompts, generator=torch.Generator().manual_seed(args.seed), **settings).images
    seconds = time.perf_counter() - start
    captioned_grid(images, prompts).save(args.output)
    print(f"{args.output.resolve()}: {len(images)} images, {len(images) / seconds:.1f} images/s")


if __name__ == "__main__":
    main()
