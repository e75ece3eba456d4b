"""A procedural data set of captioned shapes: "a red circle", "a large blue square", ..."""

from pathlib import Path

import datasets
from PIL import Image, ImageDraw

COLORS = {"red": (230, 30, 40), "green": (20, 160, 60), "blue": (30, 70, 220), "yellow": (250, 210, 20)}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small ": 0.4, "": 0.6, "large ": 0.8}

# Every combination once: so many examples differ in their captions, more of them differ in their positions.
CAPTIONS = [f"a {size}{color} {shape}" for size in SIZES for color in COLORS for shape in SHAPES]


def draw_shape(number: int, resolution: int) -> Image.Image:
    """Image of `CAPTIONS[number % len(CAPTIONS)]`, on a background whose shade depends on `number`."""
    combination = number % len(CAPTIONS)
    shape = SHAPES[combination % len(SHAPES)]
    color = list(COLORS.values())[combination // len(SHAPES) % len(COLORS)]
    share = list(SIZES.values())[combination // (len(SHAPES) * len(COLORS))]
    shade = 255 - 7 * (number // len(CAPTIONS)) % 64
    image = Image.new("RGB", (resolution, resolution), (shade, shade, shade))
    draw = ImageDraw.Draw(image)
    low, high = (1 - share) / 2 * (resolution - 1), (1 + share) / 2 * (resolution - 1)
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=color)
    elif shape == "square":
        draw.rectangle((low, low, high, high), fill=color)
    else:
        draw.polygon([(low, high), (high, high), ((low + high) / 2, low)], fill=color)
    return image


def create_shapes(count: int = 48, resolution: int = 16) -> datasets.Dataset:
    """`count` examples with the columns image, text and label (the shape)."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=list(SHAPES)),
        }
    )
    columns = {
        "image": [draw_shape(number, resolution) for number in range(count)],
        "text": [CAPTIONS[number % len(CAPTIONS)] for number in range(count)],
        "label": [number % len(SHAPES) for number in range(count)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def write_shapes(folder: Path, count: int = 48, resolution: int = 16, num_shards: int = 1) -> str:
    """Writes the data set as parquet files and returns a pattern that matches them in order."""
    return write_parquet(create_shapes(count, resolution), folder, num_shards)


def write_parquet(dataset: datasets.Dataset, folder: Path, num_shards: int = 1) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num_shards):
        shard = dataset.shard(num_shards, index, contiguous=True)
        shard.to_parquet(folder / f"shapes-{index:03d}.parquet")
    return str(folder / "*.parquet")
