"""Given images, and masks of their pixels, as tensors."""

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor

from ..argument_checks import check_bool, check_dense, check_floating, check_shape, check_values
from ..images import color_mode, to_pixels, to_rgb


def prepare_image(
    image: PipelineImageInput, resize: bool, channels: int, sample_size: int, pixels_per_position: tuple[int, int]
) -> torch.Tensor:
    """
    Images as pixels `(B, channels, height, width)` in [-1, 1].

    Args:
        image: PIL images, arrays `(B, height, width, 3)` or tensors `(B, 3, height, width)` in [0, 1]. PIL images are
            made white where they are transparent, and grey for one channel.
        resize: prepare PIL images of any size as for training: resize the shorter side to `sample_size`, with bilinear
            filtering, and keep the centre.
        pixels_per_position: rows and columns that must divide the sides of PIL images.

    Raises:
        `ValueError`: no images; pixels outside [0, 1]; PIL images of 32-bit integers or floats; without `resize`, PIL
            images that cannot be divided, or have different sizes.
        `TypeError`: integer pixels, a mixture of PIL images and arrays or tensors, or `resize` without PIL images.
    """
    check_bool("resize", resize)
    images = as_images("image", image)
    converted = [to_rgb(i).convert(color_mode(channels)) for i in images if isinstance(i, PIL.Image.Image)]
    if resize and not converted:
        raise TypeError(f"resize=True takes PIL images, got {type(images[0])}")
    if resize:
        return torch.stack([to_pixels(i, sample_size) for i in converted])
    if converted:
        check_sizes({i.size for i in converted}, pixels_per_position)
        pixels = VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(converted))
    else:
        pixels = torch.cat([to_unit_pixels(i, channels) for i in images])
    return VaeImageProcessor.normalize(pixels.float())


def as_images(name: str, image: PipelineImageInput) -> list:
    """One image, or several of one kind, as a list. Raises `ValueError` for none, `TypeError` for a mixture."""
    images = list(image) if isinstance(image, list | tuple) else [image]
    if not images:
        raise ValueError(f"{name} must be an image or a list of images, got an empty list")
    if len({PIL.Image.Image if isinstance(i, PIL.Image.Image) else type(i) for i in images}) > 1:
        raise TypeError(f"{name} must be images of one kind, got {[type(i).__name__ for i in images]}")
    return images


def to_unit_pixels(image: np.ndarray | torch.Tensor, channels: int) -> torch.Tensor:
    """
    Arrays `(height, width, 3)` or tensors `(3, height, width)` in [0, 1], with or without a batch dimension ->
    `(B, 3, height, width)`.

    Raises `TypeError` unless they are floating point, and `ValueError` for another shape or range.
    """
    if not isinstance(image, np.ndarray | torch.Tensor):
        raise TypeError(f"image must be a PIL image, array or tensor, or a list of them, got {image!r:.80}")
    pixels = image
    if isinstance(image, np.ndarray):
        if image.dtype.kind != "f":
            raise TypeError(f"image must be floating point in [0, 1], got {image.dtype}")
        if image.ndim < 3 or image.shape[-1] != channels:
            raise ValueError(f"image must have the shape (B, height, width, {channels}), got {image.shape}")
        pixels = torch.from_numpy(image.astype(np.float32)).movedim(-1, -3)
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    check_floating("image", pixels, "B", channels, "height", "width")
    check_unit_range("image", pixels)
    return pixels


def check_unit_range(name: str, pixels: torch.Tensor) -> None:
    """Raises `ValueError` unless all values lie in [0, 1]."""
    check_values(name, pixels)
    lowest, highest = (float(value) for value in pixels.aminmax())
    if not 0 <= lowest <= highest <= 1:  # aminmax gives NaN where there is one
        raise ValueError(f"{name} must lie in [0, 1], got values from {lowest:.4g} to {highest:.4g}")


def check_sizes(sizes: set[tuple[int, int]], pixels_per_position: tuple[int, int]) -> None:
    """Raises `ValueError` unless there is one (width, height), divisible by (rows, columns) of pixels per position."""
    rows, columns = pixels_per_position
    if len(sizes) > 1:
        raise ValueError(
            f"images of one batch must have the same size, got {sorted(sizes)}; resize=True gives them one"
        )
    (size,) = sizes
    if size[0] % columns or size[1] % rows:
        raise ValueError(
            f"width and height must be divisible by {columns} and {rows}, got {size}; resize=True makes images of any "
            "size fit"
        )


def prepare_mask_image(mask_image: PipelineImageInput, height: int, width: int) -> torch.Tensor:
    """
    Masks as `(B, height, width)` bool, true where they are white: at 0.5 of [0, 1] and above.

    Args:
        mask_image: PIL images, white where they are transparent; arrays `(height, width)`, `(B, height, width)` or
            `(B, height, width, 1)`, or tensors `(height, width)`, `(B, height, width)` or `(B, 1, height, width)`,
            floating point in [0, 1] or bool.

    Raises `ValueError` for another size or range, and `TypeError` for what is no mask.
    """
    masks = [to_pixel_mask(mask) for mask in as_images("mask_image", mask_image)]
    for mask in masks:
        check_shape("mask_image", mask, "B", height, width)
    return torch.cat(masks)


def to_pixel_mask(mask: PIL.Image.Image | np.ndarray | torch.Tensor) -> torch.Tensor:
    """A mask of [`prepare_mask_image`], or several, as `(B, height, width)` bool."""
    if isinstance(mask, PIL.Image.Image):
        return torch.from_numpy(np.asarray(to_rgb(mask).convert("L")) > 127)[None]
    if not isinstance(mask, np.ndarray | torch.Tensor):
        raise TypeError(f"mask_image must be a PIL image, array or tensor, or a list of them, got {mask!r:.80}")
    channel = 1
    if isinstance(mask, np.ndarray):
        if mask.dtype.kind not in "fb":
            raise TypeError(f"mask_image must be floating point in [0, 1] or bool, got {mask.dtype}")
        mask, channel = torch.from_numpy(mask.astype(np.float32)), 3
    check_dense("mask_image", mask)
    if not mask.is_floating_point() and mask.dtype != torch.bool:
        raise TypeError(f"mask_image must be floating point in [0, 1] or bool, got {mask.dtype}")
    if mask.ndim == 2:
        mask = mask[None]
    elif mask.ndim == 4 and mask.shape[channel] == 1:
        mask = mask.squeeze(channel)
    check_shape("mask_image", mask, "B", "height", "width")
    check_unit_range("mask_image", mask.float())
    return mask.cpu() >= 0.5


def mask_tokens(pixel_mask: torch.Tensor, pixels_per_token: tuple[int, int]) -> torch.Tensor:
    """Masks of pixels `(B, height, width)` -> of tokens `(B, T)`: a token is hidden if any of its pixels is."""
    return F.max_pool2d(pixel_mask.float()[:, None], pixels_per_token).flatten(1) > 0
