"""Images as PIL images and as pixels."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .argument_checks import check_bool, check_floating, check_instance, check_size


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image -> RGB, rotated as its EXIF orientation says; transparent parts become white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image: Image.Image, resolution: int, center_crop: bool = True) -> torch.Tensor:
    """
    RGB image -> `(3, resolution, resolution)` in [-1, 1], resized with bilinear filtering as by the authors.

    Args:
        center_crop: resize the shorter side and crop the centre (their unconditional and class-conditional models);
            otherwise resize to the square without keeping the aspect ratio (their text-to-image models).
    """
    check_instance("image", image, Image.Image)
    if image.mode != "RGB":
        raise ValueError(f"image must have the mode RGB, got {image.mode}")
    check_size("resolution", resolution)
    check_bool("center_crop", center_crop)
    width, height = (resolution * side // min(image.size) if center_crop else resolution for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (round((side - resolution) / 2) for side in image.size)
    image = image.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def image_grid(images: torch.Tensor, columns: int = 8) -> Image.Image:
    """
    Images `(B, 3, height, width)` in [0, 1] -> one image with rows of `columns`.

    Unlike `diffusers.utils.make_image_grid`, it takes tensors and leaves the rest of an incomplete row white.
    """
    check_floating("images", images, "B", 3, "height", "width")
    check_size("columns", columns)
    batch_size, channels, height, width = images.shape
    rows = math.ceil(batch_size / columns)
    canvas = torch.ones(rows * columns, channels, height, width)
    canvas[:batch_size] = images.detach().float().cpu().clamp(0, 1)
    canvas = canvas.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    canvas = canvas.reshape(rows * height, columns * width, channels)
    return Image.fromarray((canvas * 255).round().byte().numpy())


def captioned_grid(images: list[Image.Image], captions: list[str], columns: int = 4, scale: int = 2) -> Image.Image:
    """Images of the same size, enlarged `scale` times, with their captions below -> one image."""
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
    """Breaks `text` between words into lines of at most `width` pixels, except for wider words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        fits = not lines[-1] or font.getlength(longer) <= width
        lines = [*lines[:-1], longer] if fits else [*lines, word]
    return "\n".join(lines)
