"""Image data sets from the Hub or from local files, with their images not yet decoded."""

import glob
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
    Opens a data set of images, not yet decoded, with an added column `example_index`.

    Args:
        dataset_name: data set on the Hub, or a local folder of images or parquet files.
        dataset_config: configuration (subset) of that data set.
        data_files: local files instead, a path or glob pattern that ends in one of [`BUILDERS`].
        split: split to read.
        streaming: returns an `IterableDataset` instead of preparing the data set on disk first.
        image_column: column with the images.
        required_columns: further columns that must exist.

    Raises:
        `ValueError`: neither or both of `dataset_name` and `data_files`, files of an unknown kind, a pattern without a
        match, or a missing column.
    """
    if (dataset_name is None) == (data_files is None):
        raise ValueError(f"expected either dataset_name or data_files, got {dataset_name!r} and {data_files!r}")
    if data_files is not None:
        check_instance("data_files", data_files, str)
        builder = BUILDERS.get(Path(data_files).suffix)
        if builder is None:
            raise ValueError(f"data_files must end in one of {', '.join(BUILDERS)}, got {data_files!r}")
        files = sorted(glob.glob(data_files, recursive=True))
        if not files:
            raise ValueError(f"data_files {data_files!r} matches no file")
        # datasets expands patterns once more.
        files = [glob.escape(file) for file in files]
        dataset = datasets.load_dataset(builder, data_files={split: files}, split=split, streaming=streaming)
    else:
        dataset = datasets.load_dataset(dataset_name, dataset_config, split=split, streaming=streaming)
    check_columns(dataset, (image_column, *required_columns))
    return prepare_images(dataset, image_column)


def column_names(dataset: datasets.Dataset | datasets.IterableDataset) -> list[str]:
    """Columns of a data set; reads the first example of a stream without declared features."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset), {}))


def check_columns(dataset: datasets.Dataset | datasets.IterableDataset, columns: tuple[str, ...]) -> None:
    """Raises `ValueError` unless the data set has all `columns`."""
    available = column_names(dataset)
    for column in columns:
        if column not in available:
            raise ValueError(f"the data set has no column {column!r}; its columns are {available}")


def prepare_images(
    dataset: datasets.Dataset | datasets.IterableDataset, image_column: str
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Leaves images undecoded until a batch needs them, and numbers the examples in a column `example_index`.

    The numbers of a stream follow the order of reading; in a shuffled stream of several files, each file has its own.
    """
    if isinstance((dataset.features or {}).get(image_column), datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    if isinstance(dataset, datasets.IterableDataset):
        features = dataset.features
        if features is not None:
            features = datasets.Features(features | {"example_index": datasets.Value("int64")})
        return dataset.map(lambda example, index: {"example_index": index}, with_indices=True, features=features)
    return dataset.add_column("example_index", np.arange(len(dataset)))
