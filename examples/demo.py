"""Draw emoji from words with the model that comes with the package.

    python examples/demo.py
    python examples/demo.py --prompt "fire engine"

Writes a captioned grid of pictures and prints its path and the speed.
"""

import argparse
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from rq_hf import EMOJI_MODEL, RQPipeline

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


def captioned_grid(images: list[Image.Image], captions: list[str], columns: int = 4, scale: int = 2) -> Image.Image:
    """Pictures, enlarged, with their captions below."""
    font = ImageFont.load_default(13)
    width, height = (scale * side for side in images[0].size)
    cell_width, cell_height = max(width + 24, 176), height + 48
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (image, caption) in enumerate(zip(images, captions)):
        left, top = i % columns * cell_width, i // columns * cell_height
        canvas.paste(
            image.resize((width, height), Image.Resampling.LANCZOS), (left + (cell_width - width) // 2, top + 8)
        )
        text = wrap(caption, font, cell_width - 8)
        draw.multiline_text(
            (left + cell_width // 2, top + height + 12), text, "black", font, anchor="ma", align="center"
        )
    return canvas


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Breaks `text` between words into lines no wider than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return "\n".join(lines)


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
