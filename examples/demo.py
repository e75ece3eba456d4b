"""Generate emoji from text with the model that comes with the package.

    python examples/demo.py
    python examples/demo.py --prompt "fire engine"

Writes a grid of 16 images with their prompts, and prints its path and the speed.
"""

import argparse
import time
from pathlib import Path

import torch
from PIL import Image

from rq_hf import EMOJI_MODEL, RQPipeline
from rq_hf.images import captioned_grid

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
    parser.add_argument("--model", default=EMOJI_MODEL, help="any text-to-image pipeline: a folder or a Hub id")
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="file to write; default: demo.png")
    args = parser.parse_args()
    if Image.registered_extensions().get(args.output.suffix.lower()) not in Image.SAVE:
        parser.error(f"--output must end in .png, .jpg or another kind of image, got {args.output}")
    if not args.output.parent.is_dir():
        parser.error(f"--output must be in a folder that exists, got {args.output}")

    pipe = RQPipeline.from_pretrained(args.model)
    prompts = PROMPTS if args.prompt is None else [args.prompt] * 16
    start = time.perf_counter()
    images = pipe(prompts, generator=torch.Generator().manual_seed(args.seed)).images
    seconds = time.perf_counter() - start
    captioned_grid(images, prompts).save(args.output)
    print(f"{args.output.resolve()}: {len(images)} images, {len(images) / seconds:.1f} images/s")


if __name__ == "__main__":
    main()
