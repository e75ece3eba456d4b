"""Image data sets from the Hub or from local files, with their images not yet decoded."""

import functools
import glob
import os
from pathlib import Path

import datasets
import numpy as np

from ..argument_checks import check_instance

BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
}


def load_image_dataset(
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    data_files: str | None = None,
    split: str = "train",
    streaming: bool = False,
    image_column: str = "image",
    required_columns: tuple[str, ...] = (),
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Opens a data set of images, see [`prepare_images`].

    Args:
        dataset_name: data set on the Hub, or a local folder of images or parquet files.
        dataset_config: configuration (subset) of that data set.
        data_files: local files instead, a path or glob pattern that ends in one of [`BUILDERS`].
        split: split to read.
        streaming: returns an `IterableDataset` instead of preparing the data set on disk first.
        image_column: column with the images or, in `data_files` of one folder, their paths, relative to that folder.
        required_columns: further columns that must exist.

    Raises:
        `ValueError`: neither or both of `dataset_name` and `data_files`, files of an unknown kind, a pattern without a
        match, a missing column, or an `image_column` of URLs or of anything else but images.
    """
    dataset = open_dataset(dataset_name, dataset_config, data_files, split, streaming)
    check_columns(dataset, (image_column, *required_columns))
    files = [] if data_files is None else find_files(data_files)
    folders = {os.path.dirname(os.path.abspath(file)) for file in files}
    return prepare_images(dataset, image_column, folders.pop() if len(folders) == 1 else None)


def open_dataset(
    dataset_name: str | None, dataset_config: str | None, data_files: str | None, split: str, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """A data set as it is; see [`load_image_dataset`]. Raises `ValueError` for neither or both of `dataset_name` and
    `data_files`, files of an unknown kind, and a pattern without a match."""
    if (dataset_name is None) == (data_files is None):
        raise ValueError(f"expected either dataset_name or data_files, got {dataset_name!r} and {data_files!r}")
    if data_files is None:
        return datasets.load_dataset(dataset_name, dataset_config, split=split, streaming=streaming)
    check_instance("data_files", data_files, str)
    return load_files(find_files(data_files), split, streaming)


def find_files(pattern: str) -> list[str]:
    """The files that a path or glob pattern matches, sorted. Raises `ValueError` for none, or of an unknown kind."""
    if Path(pattern).suffix not in BUILDERS:
        raise ValueError(f"data_files must end in one of {', '.join(BUILDERS)}, got {pattern!r}")
    files = sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise ValueError(f"data_files {pattern!r} matches no file")
    return files


def load_files(files: list[str], split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    """Opens files of one kind as a data set whose only split is `split`."""
    # datasets takes the names for patterns, and expands them once more.
    names = {split: [glob.escape(file) for file in files]}
    return datasets.load_dataset(BUILDERS[Path(files[0]).suffix], data_files=names, split=split, streaming=streaming)


def find_features(dataset: datasets.Dataset | datasets.IterableDataset) -> datasets.Features:
    """Types of the columns; those of the first example for a stream that does not declare them."""
    if dataset.features is not None:
        return dataset.features
    return datasets.Dataset.from_list(list(dataset.take(1))).features


def is_value(kind, name: str) -> bool:
    """Whether a column's type is a value of this name (`"string"` or `"binary"`), large or not."""
    return isinstance(kind, datasets.Value) and kind.dtype in (name, f"large_{name}")


def check_columns(dataset: datasets.Dataset | datasets.IterableDataset, columns: tuple[str, ...]) -> None:
    """Raises `ValueError` unless the data set has all `columns`."""
    available = list(find_features(dataset))
    for column in columns:
        if column not in available:
            raise ValueError(f"the data set has no column {column!r}; its columns are {available}")


def prepare_images(
    dataset: datasets.Dataset | datasets.IterableDataset, image_column: str, folder: str | None = None
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Leaves images undecoded until a batch needs them, and numbers the examples in a column `example_index`.

    The numbers of a stream follow the order of reading; in a shuffled stream of several files, each file has its own.

    Args:
        folder: where relative paths of images begin; `None` refuses a column of paths.

    Raises `ValueError` for a column of URLs, of paths without a `folder`, or of anything but images.
    """
    kind = find_features(dataset)[image_column]
    if isinstance(kind, datasets.Image):
        if dataset.features is not None:
            dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    elif is_value(kind, "string"):
        dataset = name_images(dataset, image_column, folder)
    elif not is_value(kind, "binary") and not (isinstance(kind, dict) and {"bytes", "path"} <= set(kind)):
        raise ValueError(f"the column {image_column!r} must hold images or paths of images, got {kind}")
    return number_examples(dataset)


def name_images(
    dataset: datasets.Dataset | datasets.IterableDataset, column: str, folder: str | None
) -> datasets.Dataset | datasets.IterableDataset:
    """Paths of images -> images not yet decoded. Raises `ValueError` like [`prepare_images`]."""
    check_path(next(iter(dataset.select_columns(column)), {}).get(column), column)
    if folder is None:
        raise ValueError(
            f"the column {column!r} holds paths; they may name images only in data_files that are all in one folder, "
            "where relative paths begin"
        )
    features = dataset.features
    if features is not None:
        features = datasets.Features(features | {column: datasets.Image(decode=False)})
    return dataset.map(functools.partial(name_image, column=column, folder=folder), features=features)


def name_image(example: dict, column: str, folder: str) -> dict:
    path = example[column]
    check_path(path, column)
    return {column: {"bytes": None, "path": path and os.path.join(folder, path)}}


def check_path(path: str | None, column: str) -> None:
    """Raises `ValueError` for a URL."""
    if path is not None and "://" in path:
        raise ValueError(
            f"the column {column!r} must hold images or paths of local files, got the URL {path!r}: download the "
            "images first"
        )


def number_examples(
    dataset: datasets.Dataset | datasets.IterableDataset,
) -> datasets.Dataset | datasets.IterableDataset:
    """Adds a column `example_index`."""
    if isinstance(dataset, datasets.IterableDataset):
        features = dataset.features
        if features is not None:
            features = datasets.Features(features | {"example_index": datasets.Value("int64")})
        return dataset.map(lambda example, index: {"example_index": index}, with_indices=True, features=features)
    return dataset.add_column("example_index", np.arange(len(dataset)))


def find_class_names(dataset: datasets.Dataset | datasets.IterableDataset, label_column: str) -> list[str] | None:
    """
    Names of the classes 0, 1, ...: those that the data set declares, or the distinct strings of the column, sorted,
    for which all examples are read; `None` for a column of undeclared numbers.

    Raises `ValueError` with the example's index for a label that is not a string among strings.
    """
    kind = find_features(dataset)[label_column]
    if isinstance(kind, datasets.ClassLabel):
        return kind.names
    if not is_value(kind, "string"):
        return None
    names = set()
    for example in dataset.select_columns([label_column, "example_index"]):
        name = example[label_column]
        if not isinstance(name, str):
            raise ValueError(f"the label of example {example['example_index']} must be a string, got {name!r}")
        names.add(name)
    return sorted(names)
