"""Draw emoji from words with the model that comes with the package.

    python examples/demo.py
    python examples/demo.py --prompt "fire engine"

Writes a captioned grid of pictures and prints its path and the speed.
"""

import argparse
import time
from pathlib import Path

import torch

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
    parser.add_argument("--prompt", help="draw 16 pictures of this, instead of one for each of 16 prompts")
    parser.add_argument("--model", default=EMOJI_MODEL, help="any text-to-image pipeline: a folder or a Hub id")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="picture to write")
    args = parser.parse_args()

    pipe = RQPipeline.from_pretrained(args.model)
    prompts = PROMPTS if args.prompt is None else [args.prompt] * 16
    start = time.perf_counter()
    images = pipe(prompts, generator=torch.Generator().manual_seed(args.seed)).images
    seconds = time.perf_counter() - start
    captioned_grid(images, prompts).save(args.output)
    print(f"{args.output.resolve()}: {len(images)} pictures, {len(images) / seconds:.1f} images/s")


if __name__ == "__main__":
    main()
