"""Images as PIL images and as pixels."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE

from .argument_checks import check_bool, check_choice, check_floating, check_instance, check_size, check_unit_interval

WIDEST = 8  # of an image whose centre is kept, in lengths of the shorter side
UINT8_RULES = ("round", "round-half-up", "truncate")


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Any image -> RGB, rotated as its EXIF orientation says; transparent parts become white.

    Raises `ValueError` for 32-bit integers and floats, of which no file says what is white.
    """
    bits = bits_per_channel(image)
    image = ImageOps.exif_transpose(image)
    if bits > 8:
        values = np.asarray(image)
        is_transparent = values == image.info.get("transparency")
        image = Image.fromarray(np.where(is_transparent, 255, values >> (bits - 8)).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def bits_per_channel(image: Image.Image) -> int:
    """8, or 12 or 16 for a greyscale image that has as many. Raises `ValueError` like [`to_rgb`]."""
    if image.mode.startswith("I;16"):
        return getattr(image, "tag_v2", {}).get(BITSPERSAMPLE, (16,))[0]
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # formats of at most 16 bits
        return 16
    if image.mode in ("I", "F"):
        kind = "integers" if image.mode == "I" else "floats"
        raise ValueError(f"32-bit {kind} do not say what is white: save the image with 8 or 16 bits per channel")
    return 8


def color_mode(channels: int) -> str:
    """Mode of a PIL image of so many channels. Raises `ValueError` for any number but 1 (grey) and 3 (RGB)."""
    if channels not in (1, 3):
        raise ValueError(f"images must have 1 channel (grey) or 3 (RGB), got {channels}")
    return "L" if channels == 1 else "RGB"


def to_pixels(image: Image.Image, resolution: int, center_crop: bool = True) -> torch.Tensor:
    """
    RGB or greyscale image -> `(3, resolution, resolution)` or `(1, resolution, resolution)` in [-1, 1], resized with
    bilinear filtering as by the authors.

    Args:
        center_crop: resize the shorter side and crop the centre (their unconditional and class-conditional models);
            otherwise resize to the square without keeping the aspect ratio (their text-to-image models).

    Raises `ValueError` for an image without pixels.
    """
    check_instance("image", image, Image.Image)
    check_size("resolution", resolution)
    check_bool("center_crop", center_crop)
    if image.mode not in ("RGB", "L"):
        raise ValueError(f"image must have the mode RGB or L, got {image.mode}")
    if not all(image.size):
        raise ValueError(f"an image must have pixels, got the size {image.size}")
    width = height = resolution
    if center_crop:
        # The ends of a strip are cut off first: resized whole, it would take gigabytes. The centre stays.
        shorter = min(image.size)
        image = crop_centre(image, *(min(side, WIDEST * shorter + side % 2) for side in image.size))
        width, height = (resolution * side // shorter for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    values = np.array(crop_centre(image, resolution, resolution)).reshape(resolution, resolution, -1)
    return torch.from_numpy(values).permute(2, 0, 1).float() / 127.5 - 1


def crop_centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (round((side - kept) / 2) for side, kept in zip(image.size, (width, height)))
    return image.crop((left, top, left + width, top + height))


def to_uint8(images: torch.Tensor, rule: str) -> torch.Tensor:
    """
    Images `(B, C, height, width)` in [0, 1] -> the same as uint8 in [0, 255]. Evaluations that use different rules
    cannot be compared.

    Args:
        rule: `"round"` to the nearest, halves to even, as `numpy_to_pil` of diffusers; `"round-half-up"`, as
            `save_image` of torchvision; or `"truncate"`, as the sampling scripts of ADM (guided-diffusion).

    Raises `ValueError` for another rule and for values outside of [0, 1].
    """
    check_choice("rule", rule, UINT8_RULES)
    check_floating("images", images, "B", "C", "height", "width")
    check_unit_interval("images", images)
    levels = images.to(torch.promote_types(images.dtype, torch.float32)) * 255
    if rule == "round":
        levels = levels.round()
    elif rule == "round-half-up":
        levels = levels + 0.5
    return levels.to(torch.uint8)


def image_grid(images: torch.Tensor, columns: int = 8) -> Image.Image:
    """
    RGB images `(B, 3, height, width)` in [0, 1] -> one image with rows of `columns`.

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


def captioned_grid(images: list[Image.Image], captions: list[str], columns: int = 4) -> Image.Image:
    """Images of the same size, small ones enlarged a whole number of times, with their captions below -> one RGB
    image."""
    font = ImageFont.load_default(13)
    scale = max(1, 128 // max(images[0].size))
    width, height = (scale * side for side in images[0].size)
    cell_width = max(width + 24, 176)
    texts = [wrap(caption, font, cell_width - 8) for caption in captions]
    most_lines = max(2, *(text.count("\n") + 1 for text in texts))
    cell_height = height + 17 * most_lines + 14
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (image, text) in enumerate(zip(images, texts)):
        left, top = i % columns * cell_width, i // columns * cell_height
        canvas.paste(
            image.resize((width, height), Image.Resampling.LANCZOS), (left + (cell_width - width) // 2, top + 8)
        )
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
