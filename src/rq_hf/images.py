"""Pictures as PIL images and as pixels."""

import math

import numpy as np
import torch
from PIL import Image, ImageOps


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture -> RGB, turned upright as its EXIF tag says; transparent parts become white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image: Image.Image, resolution: int, center_crop: bool = True) -> torch.Tensor:
    """
    RGB image -> `(3, resolution, resolution)` in [-1, 1], resized with bilinear filtering as the authors do.

    Args:
        center_crop: resize the shorter side and keep the middle (their image and class models); otherwise the picture
            is squeezed into the square (their text models).
    """
    width, height = (resolution * side // min(image.size) if center_crop else resolution for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (round((side - resolution) / 2) for side in image.size)
    image = image.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def image_grid(images: torch.Tensor, columns: int = 8) -> Image.Image:
    """Pictures `(B, 3, height, width)` in [0, 1] -> one picture with rows of `columns`."""
    batch_size, channels, height, width = images.shape
    rows = math.ceil(batch_size / columns)
    canvas = torch.ones(rows * columns, channels, height, width)
    canvas[:batch_size] = images.detach().float().cpu().clamp(0, 1)
    canvas = canvas.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    canvas = canvas.reshape(rows * height, columns * width, channels)
    return Image.fromarray((canvas * 255).round().byte().numpy())
