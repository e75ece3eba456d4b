"""usage: python make_dataset.py [--output_dir DIR] [--font FILE] [--font_size N] [--image_size N]

Render a colour emoji font into a data set of captioned pictures, with a held-out split of caption combinations.

Each fully-qualified emoji that the font draws as a single glyph becomes one RGB picture on white. Its caption is the
English name in the `emoji` package, for example "woman astronaut medium skin tone". Lone skin tones and hair styles
are not fully-qualified emoji and get no picture. Left out and counted:

  missing      the font has no glyph for it
  not joined   the font draws the sequence as several glyphs side by side
  tone unseen  a skin tone that leaves the picture the same as without it

Two files are written, with the columns `image` and `text`: DIR/train.parquet and DIR/held_out.parquet. The held-out
captions are skin-tone variants, spread over the emoji that have them. Every word of theirs occurs in training
captions, and the same emoji in other skin tones stays in training. The same font and library versions give the same
files.

options:
  --output_dir DIR   folder to write to (default: data/emoji)
  --font FILE        colour font with bitmap strikes (default: Noto Color Emoji where the Debian package
                     fonts-noto-color-emoji installs it)
  --font_size N      size of a bitmap strike of the font (default: 109, the only one of Noto Color Emoji)
  --image_size N     height and width of the pictures in pixels (default: 64)
  -h, --help         print this text

needs: pip install datasets emoji pillow
"""

import argparse
import io
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import emoji
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw, ImageFont, features

NOTO = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
ONE_GLYPH = "\N{GRINNING FACE}"
NO_GLYPH = "\U0010ffff"  # a noncharacter, which every font draws as a missing glyph
SKIN_TONE = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")
HOLD_OUT_EVERY = 11  # shares no factor with the 5 skin tones, so that all tones are held out equally often
FEWEST_VARIANTS = 4


def main():
    args = parse_args()
    pictures, left_out = render_all(load_font(args.font, args.font_size), args.image_size)
    train, held_out = split_captions(pictures)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_parquet(args.output_dir / "train.parquet", train, pictures)
    write_parquet(args.output_dir / "held_out.parquet", held_out, pictures)

    words = [caption.split() for caption in pictures]
    print(f"pictures: {len(pictures)} ({len(train)} train, {len(held_out)} held out)")
    for reason, count in left_out.items():
        print(f"left out, {reason}: {count}")
    print(f"most words in a caption: {max(map(len, words))}")
    print(f"distinct words: {len(set().union(*words))}")


def parse_args():
    parser = argparse.ArgumentParser(usage=__doc__.splitlines()[0].removeprefix("usage: "))
    parser.format_help = lambda: __doc__
    parser.add_argument("--output_dir", type=Path, default=Path("data/emoji"))
    parser.add_argument("--font", type=Path, default=Path(NOTO))
    parser.add_argument("--font_size", type=int, default=109)
    parser.add_argument("--image_size", type=int, default=64)
    args = parser.parse_args()
    if args.image_size < 1:
        raise ValueError(f"--image_size must be at least 1, got {args.image_size}")
    return args


def load_font(path, size):
    if not features.check("raqm"):
        raise ValueError(
            "This Pillow has no raqm layout, which joins emoji sequences: install a Pillow wheel from PyPI and the "
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
    red, _, blue = draw(font, ONE_GLYPH, 64).split()
    if red.tobytes() == blue.tobytes():
        raise ValueError(f"{path} does not draw {ONE_GLYPH} in colour: --font takes a colour emoji font")
    return font


def emoji_by_caption():
    """The fully-qualified emoji as {caption: sequence}, in the order of the captions."""
    fully_qualified = emoji.STATUS["fully_qualified"]
    return {
        entry["en"].strip(":").replace("_", " "): sequence
        for sequence, entry in sorted(emoji.EMOJI_DATA.items(), key=lambda item: item[1]["en"])
        if entry["status"] == fully_qualified
    }


def render_all(font, image_size):
    """Returns ({caption: picture}, {reason: number of emoji left out})."""
    widest = 1.5 * font.getlength(ONE_GLYPH)
    missing = draw(font, NO_GLYPH, image_size)
    pictures, left_out = {}, Counter({"missing": 0, "not joined": 0, "tone unseen": 0})
    for caption, sequence in emoji_by_caption().items():
        if font.getlength(sequence) > widest:
            left_out["not joined"] += 1
            continue
        picture = draw(font, sequence, image_size)
        if picture == missing:
            left_out["missing"] += 1
        else:
            pictures[caption] = picture

    unseen = [c for c in pictures if c != without_tone(c) and pictures[c] == pictures.get(without_tone(c))]
    for caption in unseen:
        del pictures[caption]
    left_out["tone unseen"] = len(unseen)
    return pictures, left_out


def draw(font, sequence, image_size):
    """The whole bitmap of the glyph, not only its ink, is centred: small emoji stay small."""
    left, top, right, bottom = font.getbbox(sequence)
    side = max(right - left, bottom - top, 1)
    corner = ((side - right - left) // 2, (side - bottom - top) // 2)
    picture = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(picture).text(corner, sequence, font=font, embedded_color=True)
    return picture.resize((image_size, image_size), Image.Resampling.LANCZOS)


def without_tone(caption):
    return SKIN_TONE.sub("", caption)


def split_captions(captions):
    """Returns (train, held_out), both sorted.

    Every eleventh skin-tone variant is held out, of emoji with at least four variants. At most one in four variants
    of an emoji goes, so at least three stay in training, and with them each word of the emoji's name. Pairs of skin
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


def write_parquet(path, captions, pictures):
    columns = {"image": [{"bytes": png(pictures[c]), "path": None} for c in captions], "text": captions}
    beside = path.with_suffix(".partial")
    Dataset.from_dict(columns, Features({"image": ImageFeature(), "text": Value("string")})).to_parquet(beside)
    os.replace(beside, path)


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
