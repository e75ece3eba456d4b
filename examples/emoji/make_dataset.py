"""Render a colour emoji font into a data set of captioned images, with a held-out split of caption combinations.

    python examples/emoji/make_dataset.py
    python examples/emoji/make_dataset.py --output_dir data/emoji-32 --image_size 32

Each fully-qualified emoji that the font has as a single glyph becomes one RGB image on white. Its caption is the
English name in the `emoji` package, for example "woman astronaut medium skin tone". Skin tones and hair styles on
their own are not fully-qualified emoji and get no image. Left out and counted:

  missing      the font has no glyph for it
  not joined   the font shows the sequence as several glyphs side by side
  tone unseen  a skin tone that does not change the image

OUTPUT_DIR gets two files with the columns `image` and `text`, train.parquet and held_out.parquet; an older folder is
kept as `previous-...`. The held-out captions are skin-tone variants, spread over the emoji that have them. Each of
their words occurs in training captions, and the same emoji in other skin tones stays in the training split. The same
versions of the font and the libraries give the same files.

Needs `pip install emoji` and a Pillow with raqm.
"""

import argparse
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw, ImageFont, features

from rq_hf.files import atomic_folder

NOTO = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
ONE_GLYPH = "\N{GRINNING FACE}"
NO_GLYPH = "\U0010ffff"  # a noncharacter, shown by every font as its missing glyph
SKIN_TONE = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")
HOLD_OUT_EVERY = 11  # shares no factor with the 5 skin tones, so that all tones are held out equally often
FEWEST_VARIANTS = 4


def load_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """Raises `ValueError` or `FileNotFoundError` unless this Pillow can render emoji of this size with the font."""
    if not features.check("raqm"):
        raise ValueError(
            "This Pillow lacks the raqm layout, which joins emoji sequences: install a Pillow wheel from PyPI and the "
            "fribidi library (Debian package libfribidi0)"
        )
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"No font at {path}: install the Debian package fonts-noto-color-emoji, or name a colour font with --font"
        )
    try:
        font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.RAQM)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Cannot load {path} at size {size} ({error}): --font takes a font file with bitmap strikes, "
            "--font_size the size of one of its strikes (109 for Noto Color Emoji)"
        ) from error
    red, _, blue = render(font, ONE_GLYPH, 64).split()
    if red.tobytes() == blue.tobytes():
        raise ValueError(f"{path} does not show {ONE_GLYPH} in colour: --font takes a colour emoji font")
    return font


def emoji_by_caption() -> dict[str, str]:
    """Caption -> sequence of all fully-qualified emoji, sorted by caption."""
    import emoji

    fully_qualified = emoji.STATUS["fully_qualified"]
    return {
        entry["en"].strip(":").replace("_", " "): sequence
        for sequence, entry in sorted(emoji.EMOJI_DATA.items(), key=lambda item: item[1]["en"])
        if entry["status"] == fully_qualified
    }


def render_all(font: ImageFont.FreeTypeFont, image_size: int) -> tuple[dict[str, Image.Image], dict[str, int]]:
    """Caption -> image, and reason -> number of emoji left out."""
    widest = 1.5 * font.getlength(ONE_GLYPH)
    missing = render(font, NO_GLYPH, image_size)
    images, left_out = {}, Counter({"missing": 0, "not joined": 0, "tone unseen": 0})
    for caption, sequence in emoji_by_caption().items():
        if font.getlength(sequence) > widest:
            left_out["not joined"] += 1
            continue
        image = render(font, sequence, image_size)
        if image == missing:
            left_out["missing"] += 1
        else:
            images[caption] = image

    unseen = [c for c in images if c != without_tone(c) and images[c] == images.get(without_tone(c))]
    for caption in unseen:
        del images[caption]
    left_out["tone unseen"] = len(unseen)
    return images, left_out


def render(font: ImageFont.FreeTypeFont, sequence: str, image_size: int) -> Image.Image:
    """The image of an emoji. The bitmap of the glyph is centred with its margins, so that small emoji stay small."""
    left, top, right, bottom = font.getbbox(sequence)
    side = max(right - left, bottom - top, 1)
    corner = ((side - right - left) // 2, (side - bottom - top) // 2)
    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).text(corner, sequence, font=font, embedded_color=True)
    return image.resize((image_size, image_size), Image.Resampling.LANCZOS)


def without_tone(caption: str) -> str:
    return SKIN_TONE.sub("", caption)


def split_captions(captions: Iterable[str]) -> tuple[list[str], list[str]]:
    """Training and held-out captions, both sorted.

    Every eleventh skin-tone variant of the emoji with at least four variants is held out: at most one in four variants
    of an emoji. At least three stay in the training split, and with them each word of the emoji's name. Pairs of skin
    tones count as variants of the same emoji.
    """
    captions = sorted(captions)
    variants = defaultdict(list)
    for caption in captions:
        if caption != without_tone(caption):
            variants[without_tone(caption)].append(caption)
    toned = [c for base in sorted(variants) if len(variants[base]) >= FEWEST_VARIANTS for c in variants[base]]
    held_out = set(toned[::HOLD_OUT_EVERY])
    return [c for c in captions if c not in held_out], sorted(held_out)


def write_parquet(path: Path, captions: list[str], images: dict[str, Image.Image]) -> None:
    columns = {"image": [{"bytes": png(images[c]), "path": None} for c in captions], "text": captions}
    Dataset.from_dict(columns, Features({"image": ImageFeature(), "text": Value("string")})).to_parquet(path)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("data/emoji"), help="default: data/emoji")
    parser.add_argument(
        "--font",
        type=Path,
        default=Path(NOTO),
        help="colour font with bitmap strikes; default: Noto Color Emoji as installed by the Debian package "
        "fonts-noto-color-emoji",
    )
    parser.add_argument(
        "--font_size",
        type=int,
        default=109,
        help="size of a bitmap strike of the font; default: 109, the only one of Noto Color Emoji",
    )
    parser.add_argument("--image_size", type=int, default=64, help="height and width of the images; default: 64")
    args = parser.parse_args()
    if args.image_size < 1:
        raise ValueError(f"--image_size must be at least 1, got {args.image_size}")

    images, left_out = render_all(load_font(args.font, args.font_size), args.image_size)
    train, held_out = split_captions(images)
    with atomic_folder(args.output_dir) as folder:
        write_parquet(folder / "train.parquet", train, images)
        write_parquet(folder / "held_out.parquet", held_out, images)

    words = [caption.split() for caption in images]
    print(f"images: {len(images)} ({len(train)} train, {len(held_out)} held out)")
    for reason, count in left_out.items():
        print(f"left out, {reason}: {count}")
    print(f"most words in a caption: {max(map(len, words))}")
    print(f"distinct words: {len(set().union(*words))}")


if __name__ == "__main__":
    main()
