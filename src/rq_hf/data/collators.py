"""
Examples -> batches: dictionaries of tensors, with the number of examples of each kind in `counts`, a `dict[str, int]`.

`counts["images"]` is the size of the batch. `counts["skipped_images"]` (images that could not be decoded) and
`counts["truncated_captions"]` exist where they can occur.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence

import datasets
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from ..argument_checks import check_bool, check_instance, check_items, check_size
from ..images import color_mode, to_pixels, to_rgb
from ..text import encode_captions
from .latents import bytes_to_latents, check_dtype


def decode_image(value: Image.Image | dict | bytes) -> Image.Image:
    """An image column's value (PIL image, undecoded `{"bytes", "path"}`, or bytes) -> RGB, see [`to_rgb`]."""
    if value is None:
        raise ValueError("there is none")
    if isinstance(value, bytes):
        value = {"bytes": value, "path": None}
    return to_rgb(value if isinstance(value, Image.Image) else datasets.Image().decode_example(value))


def check_examples(examples: list[dict]) -> None:
    """Raises `TypeError` unless this is a list of dictionaries."""
    check_items("examples", examples)
    for example in examples:
        check_instance("examples", example, dict)


def value_of(example: dict, column: str):
    """Raises `ValueError` for a column that the example lacks."""
    if column not in example:
        raise ValueError(f"the data has no column {column!r}; there are {', '.join(example)}")
    return example[column]


def caption_of(example: dict, column: str) -> str:
    """Raises `ValueError` with the example's index for a caption that is not a string."""
    caption = value_of(example, column)
    if not isinstance(caption, str):
        raise ValueError(f"the caption of example {example['example_index']} must be a string, got {caption!r}")
    return caption


def label_of(
    example: dict, column: str, num_classes: int | None = None, class_names: Sequence[str] | None = None
) -> int:
    """
    The number of an example's class: its label, or the index of its label among `class_names`.

    Raises `ValueError` with the example's index for a label that is neither an integer nor one of `class_names`, or
    that does not lie in [0, num_classes).
    """
    label, index = value_of(example, column), example["example_index"]
    if class_names is not None and isinstance(label, str):
        if label not in class_names:
            raise ValueError(f"the label of example {index} must be one of {len(class_names)} names, got {label!r}")
        label = class_names.index(label)
    try:
        label = int(operator.index(label))
    except TypeError as error:
        raise ValueError(f"the label of example {index} must be an integer, got {label!r}") from error
    if num_classes is not None and not 0 <= label < num_classes:
        raise ValueError(f"the label of example {index} must lie in [0, {num_classes}), got {label}")
    return label


class ImageCollator:
    """
    Examples -> `pixels` `(B, in_channels, resolution, resolution)` in [-1, 1], `counts` and, with a text or label
    column, `cond_ids`.

    Args:
        image_column: column with the images.
        resolution: height and width of the pixels.
        random_flip: mirror half of the images at random.
        skip_corrupt_images: leave out images that cannot be decoded; the batch may then be empty, without `cond_ids`.
        text_column, tokenizer: captions become tokens `(B, L)`, L being the tokenizer's `model_max_length`.
        label_column: labels become classes `(B, 1)`.
        center_crop: keep the middle square of an image; otherwise squeeze it into a square.
        num_classes: labels must lie in [0, num_classes); `None` accepts any integer.
        class_names: labels may also be names; a name becomes its index here.
        in_channels: of the pixels: 1, grey, or 3, RGB.

    Calling it raises `ValueError` with the example's index for a caption that is not a string, for a label that is
    no class, and for an image that cannot be decoded, unless `skip_corrupt_images`.
    """

    def __init__(
        self,
        image_column: str,
        resolution: int,
        random_flip: bool = False,
        skip_corrupt_images: bool = False,
        text_column: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        label_column: str | None = None,
        center_crop: bool = True,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        in_channels: int = 3,
    ):
        check_instance("image_column", image_column, str)
        check_size("resolution", resolution)
        check_bool("random_flip", random_flip)
        check_bool("skip_corrupt_images", skip_corrupt_images)
        check_bool("center_crop", center_crop)
        check_conditions(text_column, tokenizer, label_column, num_classes)
        self.image_column = image_column
        self.resolution = resolution
        self.random_flip = random_flip
        self.skip_corrupt_images = skip_corrupt_images
        self.text_column = text_column
        self.tokenizer = tokenizer
        self.label_column = label_column
        self.center_crop = center_crop
        self.num_classes = num_classes
        self.class_names = class_names
        self.mode = color_mode(in_channels)

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor | dict[str, int]]:
        pixels, decoded = self.decode(examples)
        counts = {"images": len(decoded), "skipped_images": len(examples) - len(decoded)}
        if not decoded:
            return {"pixels": pixels, "counts": counts}
        if self.random_flip:
            mirrored = torch.rand(len(decoded)) < 0.5
            pixels[mirrored] = pixels[mirrored].flip(-1)
        conditions, more_counts = encode_conditions(
            decoded, self.text_column, self.tokenizer, self.label_column, self.num_classes, self.class_names
        )
        return {"pixels": pixels, **conditions, "counts": counts | more_counts}

    def decode(self, examples: list[dict]) -> tuple[torch.Tensor, list[dict]]:
        """Pixels `(B, in_channels, resolution, resolution)` of the examples whose image can be decoded, and these
        examples."""
        check_examples(examples)
        pixels, decoded = [], []
        for example in examples:
            value = value_of(example, self.image_column)
            try:
                image = decode_image(value).convert(self.mode)
                pixels.append(to_pixels(image, self.resolution, self.center_crop))
            except Exception as error:
                if self.skip_corrupt_images:
                    continue
                raise ValueError(
                    f"the image of example {example['example_index']} cannot be decoded ({error}); "
                    "skip_corrupt_images leaves such examples out and counts them"
                ) from error
            decoded.append(example)
        return torch.stack(pixels) if decoded else torch.empty(0), decoded


class LatentCollator:
    """
    Examples of [`load_latents`] -> `latents` `(B, H, W, C)`, `counts` and, with a text or label column, `cond_ids` as
    [`ImageCollator`] gives them. The latents of an `AutoencoderKL` are moments: means, then log-variances.

    Args:
        shape: of one example's latents, `(H, W, C)`.
        text_column, tokenizer, label_column, num_classes, class_names: see [`ImageCollator`].
        dtype: that they are stored in, see [`stored_dtype`].

    Calling it raises `ValueError` for a caption or a label like [`ImageCollator`], and with the example's index for
    latents of another length.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        text_column: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        label_column: str | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ):
        check_items("shape", shape, 3)
        for size in shape:
            check_size("shape", size)
        check_dtype(dtype)
        check_conditions(text_column, tokenizer, label_column, num_classes)
        self.shape = shape
        self.text_column = text_column
        self.tokenizer = tokenizer
        self.label_column = label_column
        self.num_classes = num_classes
        self.class_names = class_names
        self.dtype = dtype

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor | dict[str, int]]:
        check_examples(examples)
        size = math.prod(self.shape) * self.dtype.itemsize
        stored = [value_of(example, "latents") or b"" for example in examples]
        for example, latents in zip(examples, stored):
            if len(latents) != size:
                index = example["example_index"]
                raise ValueError(f"the latents of example {index} must have {size} bytes, got {len(latents)}")
        latents = bytes_to_latents(stored, self.shape, self.dtype)
        conditions, counts = encode_conditions(
            examples, self.text_column, self.tokenizer, self.label_column, self.num_classes, self.class_names
        )
        return {"latents": latents, **conditions, "counts": {"images": len(examples), **counts}}


def first_batches(
    dataset: datasets.Dataset | datasets.IterableDataset,
    collate: Callable[[list[dict]], dict],
    count: int,
    batch_size: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """The first `count` examples of a data set, in its order, as batches without their counts."""
    examples = itertools.islice(dataset, count)
    while chunk := list(itertools.islice(examples, batch_size)):
        batch = collate(chunk)
        if batch.pop("counts")["images"]:
            yield batch


def check_conditions(
    text_column: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    label_column: str | None,
    num_classes: int | None,
) -> None:
    """Raises `TypeError`/`ValueError` for these arguments of the collators where they are of another type or size, and
    for a text column without a tokenizer."""
    for name, column in (("text_column", text_column), ("label_column", label_column)):
        if column is not None:
            check_instance(name, column, str)
    if text_column is not None:
        check_instance("tokenizer", tokenizer, PreTrainedTokenizerBase)
    if num_classes is not None:
        check_size("num_classes", num_classes)


def encode_conditions(
    examples: list[dict],
    text_column: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    label_column: str | None,
    num_classes: int | None,
    class_names: Sequence[str] | None,
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """
    `cond_ids` of examples, see [`ImageCollator`], and the count of `truncated_captions`; nothing without a column.

    Raises `ValueError` like [`caption_of`] and [`label_of`].
    """
    if text_column is not None:
        captions = [caption_of(example, text_column) for example in examples]
        length = tokenizer.model_max_length
        cond_ids, num_tokens = encode_captions(tokenizer, captions, length)
        return {"cond_ids": cond_ids}, {"truncated_captions": sum(n > length for n in num_tokens)}
    if label_column is not None:
        labels = [[label_of(example, label_column, num_classes, class_names)] for example in examples]
        return {"cond_ids": torch.tensor(labels)}, {}
    return {}, {}
