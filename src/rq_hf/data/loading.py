"""From any Hub data set or local files to batches of pixels or latents, captions and labels: seeded, sharded,
resumable."""

import glob
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from ..images import to_pixels, to_rgb
from ..text import encode_captions

BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
}


@dataclass
class SourceArguments:
    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub, or a local folder of images or parquet files."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of the data set."})
    data_files: str | None = field(
        default=None,
        metadata={"help": f"Instead of --dataset_name: local files, globs allowed, one of {', '.join(BUILDERS)}."},
    )
    split: str = field(default="train", metadata={"help": "Split to read."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the data set as a stream, without preparing it on disk first."}
    )
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    center_crop: bool = field(
        default=True, metadata={"help": "Keep the middle square of an image; otherwise squeeze it into a square."}
    )
    skip_corrupt_images: bool = field(
        default=False,
        metadata={"help": "Leave out images that cannot be decoded, and log how many (default: stop at the first)."},
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that decode images; 0 decodes in the main process."}
    )


@dataclass
class DataArguments(SourceArguments):
    random_flip: bool = field(default=False, metadata={"help": "Mirror half of the images at random."})
    shuffle_buffer_size: int = field(
        default=10_000,
        metadata={"help": "Examples in the shuffle buffer of a stream; a prepared data set is shuffled whole."},
    )


def load_images(args: SourceArguments, required_columns: tuple[str, ...] = ()):
    """
    Opens the data set that `args` name, images not yet decoded, with an added column `example_index`.

    Returns:
        a `datasets.Dataset` or, with `args.streaming`, a `datasets.IterableDataset`.

    Raises:
        `ValueError`: neither or both of data set name and files, files of unknown kind or that match nothing, or a
        missing column (the message names those there are).
    """
    if (args.dataset_name is None) == (args.data_files is None):
        raise ValueError(
            f"give one of --dataset_name and --data_files, got {args.dataset_name!r} and {args.data_files!r}"
        )
    if args.data_files is not None:
        builder = BUILDERS.get(Path(args.data_files).suffix)
        if builder is None:
            raise ValueError(f"--data_files must end in one of {', '.join(BUILDERS)}, got {args.data_files!r}")
        files = sorted(glob.glob(args.data_files, recursive=True))
        if not files:
            raise ValueError(f"--data_files {args.data_files!r} matches no file")
        dataset = datasets.load_dataset(
            builder, data_files={args.split: files}, split=args.split, streaming=args.streaming
        )
    else:
        dataset = datasets.load_dataset(
            args.dataset_name, args.dataset_config, split=args.split, streaming=args.streaming
        )
    check_columns(dataset, (args.image_column, *required_columns))
    return prepare_images(dataset, args.image_column)


def column_names(dataset) -> list[str]:
    """Columns of a data set; a stream without declared features is asked for its first example."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset), {}))


def check_columns(dataset, columns: tuple[str, ...]) -> None:
    """Raises `ValueError` unless the data set has all `columns`."""
    available = column_names(dataset)
    for column in columns:
        if column not in available:
            raise ValueError(f"the data set has no column {column!r}; its columns are {available}")


def prepare_images(dataset, image_column: str):
    """Leaves images undecoded until a batch needs them, and numbers the examples in a column `example_index`.

    In a stream the numbers count the order of reading; one of several files, once shuffled, counts in each file.
    """
    if isinstance((dataset.features or {}).get(image_column), datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    if isinstance(dataset, datasets.IterableDataset):
        features = dataset.features
        if features is not None:
            features = datasets.Features(features | {"example_index": datasets.Value("int64")})
        return dataset.map(lambda example, index: {"example_index": index}, with_indices=True, features=features)
    return dataset.add_column("example_index", np.arange(len(dataset)))


def decode_image(value) -> Image.Image:
    """An image column's value (PIL image, or undecoded `{"bytes", "path"}`) -> RGB; transparent parts become white."""
    return to_rgb(value if isinstance(value, Image.Image) else datasets.Image().decode_example(value))


class Collator:
    """
    Examples -> a batch: `pixels` `(B, 3, resolution, resolution)` in [-1, 1] and, if asked for, `cond_ids`: tokens
    `(B, L)` of `text_column` or classes `(B, 1)` of `label_column`; also the numbers of `skipped_images` and
    `truncated_captions`.

    Raises `ValueError` with the example's index for a caption that is no string, and for an image that cannot be
    decoded, unless `skip_corrupt_images`; a batch may then be without images, see [`next_readable`].
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
    ):
        self.image_column = image_column
        self.resolution = resolution
        self.random_flip = random_flip
        self.skip_corrupt_images = skip_corrupt_images
        self.text_column = text_column
        self.tokenizer = tokenizer
        self.label_column = label_column
        self.center_crop = center_crop

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor | int]:
        pixels, kept = self.decode(examples)
        batch = {"pixels": pixels, "skipped_images": len(examples) - len(kept)}
        if not kept:
            return batch
        if self.random_flip:
            mirrored = torch.rand(len(kept)) < 0.5
            pixels[mirrored] = pixels[mirrored].flip(-1)
        return batch | encode_conditions(kept, self.text_column, self.tokenizer, self.label_column)

    def decode(self, examples: list[dict]) -> tuple[torch.Tensor, list[dict]]:
        """Pixels `(B, 3, resolution, resolution)` of the examples whose image can be decoded, and these examples."""
        pixels, kept = [], []
        for example in examples:
            try:
                image = decode_image(example[self.image_column])
            except Exception as error:
                if self.skip_corrupt_images:
                    continue
                raise ValueError(
                    f"the image of example {example['example_index']} cannot be decoded ({error}); "
                    "--skip_corrupt_images leaves such examples out and counts them"
                ) from error
            pixels.append(to_pixels(image, self.resolution, self.center_crop))
            kept.append(example)
        return torch.stack(pixels) if kept else torch.empty(0), kept


class LatentCollator:
    """
    Examples of extracted latents -> a batch: `latents` `(B, H, W, C)` in bfloat16 and, if asked for, `cond_ids` as of
    [`Collator`].

    Args:
        shape: of one example's latents, `(H, W, C)`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        text_column: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        label_column: str | None = None,
    ):
        self.shape = shape
        self.text_column = text_column
        self.tokenizer = tokenizer
        self.label_column = label_column

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor | int]:
        values = bytearray().join(example["latents"] for example in examples)
        latents = torch.frombuffer(values, dtype=torch.bfloat16).view(-1, *self.shape)
        batch = {"latents": latents, "skipped_images": 0}
        return batch | encode_conditions(examples, self.text_column, self.tokenizer, self.label_column)


def encode_conditions(
    examples: list[dict],
    text_column: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    label_column: str | None,
) -> dict[str, torch.Tensor | int]:
    """`cond_ids` and the number of `truncated_captions` of examples, see [`Collator`]; nothing without a column.

    Raises `ValueError` for a caption that is no string.
    """
    if text_column is not None:
        captions = [example[text_column] for example in examples]
        for example, caption in zip(examples, captions):
            if not isinstance(caption, str):
                raise ValueError(
                    f"the caption of example {example['example_index']} must be a string, got {caption!r}"
                )
        length = tokenizer.model_max_length
        cond_ids, num_tokens = encode_captions(tokenizer, captions, length)
        return {"cond_ids": cond_ids, "truncated_captions": sum(n > length for n in num_tokens)}
    if label_column is not None:
        return {"cond_ids": torch.tensor([[example[label_column]] for example in examples])}
    return {}


def count_images(batch: dict) -> int:
    """Images of a batch, as pixels or as latents."""
    return len(batch["latents"] if "latents" in batch else batch["pixels"])


def next_readable(batches: Iterator[dict], patience: int = 10_000) -> dict:
    """The next batch that has images; its `skipped_images` include those of the batches passed over.

    Raises `ValueError` when `patience` images in a row cannot be decoded.
    """
    skipped = 0
    for batch in batches:
        skipped += batch["skipped_images"]
        if count_images(batch):
            return {**batch, "skipped_images": skipped}
        if skipped >= patience:
            break
    raise ValueError(f"none of {skipped} images in a row can be decoded")


class TrainingStream:
    """
    Endless batches of one rank's share of a data set, reshuffled every epoch from a seed.

    Its position is (epoch, batches taken in it): a stream with the same arguments and a loaded position goes on
    exactly where the saved one stood.

    Args:
        dataset: a `datasets.Dataset` or `datasets.IterableDataset`.
        collate: list of examples -> batch.
        batch_size: examples per batch; the last batch of an epoch may be smaller.
        seed: of the shuffle; the same on all ranks.
        rank, world_size: this process and the number of processes.
    """

    def __init__(
        self,
        dataset,
        collate,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer_size: int = 10_000,
        num_workers: int = 0,
    ):
        self.dataset = dataset
        self.collate = collate
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shuffle_buffer_size = shuffle_buffer_size
        self.num_workers = num_workers
        self.epoch = 0
        self.batches_in_epoch = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batches_in_epoch": self.batches_in_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batches_in_epoch = state["epoch"], state["batches_in_epoch"]

    def __iter__(self) -> Iterator[dict]:
        while True:
            taken = self.batches_in_epoch
            for batch in self._epoch_batches(skip=taken):
                self.batches_in_epoch += 1
                yield batch
            if taken == 0 and self.batches_in_epoch == 0:
                raise ValueError(f"the data set has no examples for rank {self.rank} of {self.world_size}")
            self.epoch, self.batches_in_epoch = self.epoch + 1, 0

    def _epoch_batches(self, skip: int) -> Iterator[dict]:
        """The batches of this rank in the current epoch, without the first `skip`."""
        seed = self.seed + self.epoch
        # Examples are skipped before they are decoded. Workers deal them out among themselves, and draw random numbers
        # of their own: then whole batches are made and left out.
        skip_examples, skip_batches = (0, skip) if self.num_workers else (skip * self.batch_size, 0)
        if isinstance(self.dataset, datasets.IterableDataset):
            dataset = self.dataset.shuffle(seed=seed, buffer_size=self.shuffle_buffer_size)
            dataset = split_dataset_by_node(dataset, self.rank, self.world_size)
            dataset, sampler = (StreamTail(dataset, skip_examples) if skip_examples else dataset), None
        else:
            dataset, order = self.dataset, np.random.default_rng(seed).permutation(len(self.dataset))
            sampler = order[self.rank :: self.world_size][skip_examples:].tolist()
        loader = DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            # A loader without its own generator draws a seed from the global one, which would disturb an exact resume.
            generator=torch.Generator().manual_seed(seed),
        )
        return itertools.islice(loader, skip_batches, None)


class StreamTail(torch.utils.data.IterableDataset):
    """A stream without its first examples."""

    def __init__(self, stream: datasets.IterableDataset, skip: int):
        self.stream = stream
        self.skip = skip

    def __iter__(self) -> Iterator[dict]:
        return itertools.islice(self.stream, self.skip, None)
