"""Tables of items and their vectors, which stay on the disk: a row is read when it is needed."""

from collections import Counter
from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ..argument_checks import check_instance
from .collators import check_examples, value_of
from .loading import check_columns, open_dataset

CHUNK = 8192  # rows that are read at once


def load_vector_dataset(
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    data_files: str | None = None,
    split: str = "train",
    vector_column: str = "vector",
    item_column: str | None = None,
) -> datasets.Dataset:
    """
    Opens a table with a vector in every row, and looks at all of its rows.

    Args:
        dataset_name, dataset_config, data_files, split: see [`load_image_dataset`].
        vector_column: column of lists of floating-point numbers, C in every row.
        item_column: column of strings or integers that name the rows; `None` for a table without.

    Raises `ValueError` for a missing column or one of another type, with the row for vectors that are missing, of
    another length than the first, NaN or infinite, and for items that are missing or there more than once.
    """
    dataset = open_dataset(dataset_name, dataset_config, data_files, split)
    check_columns(dataset, (vector_column,) if item_column is None else (vector_column, item_column))
    for _ in vectors_in_chunks(dataset, vector_column):
        pass  # it looks at them
    if item_column is not None:
        read_items(dataset, item_column)
    return dataset


def read_items(dataset: datasets.Dataset, item_column: str) -> list[str] | list[int]:
    """What the rows are called. Raises `ValueError` like [`load_vector_dataset`]."""
    kind = dataset.features.arrow_schema.field(item_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        raise ValueError(f"the column {item_column!r} must hold strings or integers, got {kind}")
    items = list(dataset[item_column])
    if None in items:
        raise ValueError(f"row {items.index(None)} has nothing in the column {item_column!r}")
    item, count = Counter(items).most_common(1)[0]
    if count > 1:
        raise ValueError(f"the column {item_column!r} must name every row differently, got {item!r} {count} times")
    return items


def read_vectors(dataset: datasets.Dataset, vector_column: str) -> torch.Tensor:
    """All vectors in memory: `(N, C)`, in the type that they are stored in. Raises `ValueError` like
    [`load_vector_dataset`]."""
    vectors = None
    for start, rows in vectors_in_chunks(dataset, vector_column):
        if vectors is None:
            vectors = np.empty((len(dataset), rows.shape[1]), rows.dtype)
        vectors[start : start + len(rows)] = rows
    return torch.from_numpy(vectors)


def vectors_in_chunks(dataset: datasets.Dataset, column: str) -> Iterator[tuple[int, np.ndarray]]:
    """The number of a row, and the vectors `(n, C)` from there on. Raises `ValueError` like
    [`load_vector_dataset`]."""
    kind = dataset.features.arrow_schema.field(column).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type):
        raise ValueError(f"the column {column!r} must hold lists of floating-point numbers, got {kind}")
    if not len(dataset):
        raise ValueError(f"the column {column!r} must hold vectors, got a data set without rows")
    tables, length = dataset.with_format("arrow"), None
    for start in range(0, len(dataset), CHUNK):
        lists = tables[start : start + CHUNK][column].combine_chunks()
        lengths = pc.list_value_length(lists).fill_null(-1).to_numpy()
        length = lengths[0] if length is None else length
        for row in (lengths != length).nonzero()[0][:1] if length > 0 else [0]:
            found = {-1: "nothing", 0: "an empty list"}.get(lengths[row], f"{lengths[row]} numbers")
            first = f", as the first row has {length}" if length > 0 else ""
            raise ValueError(f"row {start + row} has {found} in the column {column!r}: it needs a vector{first}")
        rows = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, length)  # of missing numbers, NaN
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            raise ValueError(f"row {start + finite.argmin()} has NaN or infinite numbers in the column {column!r}")
        yield start, rows


class VectorCollator:
    """
    Examples of a data set of [`load_vector_dataset`], in the format of NumPy -> `vectors` `(B, C)` float32, `counts`.

    Args:
        vector_column: column with the vectors.
    """

    def __init__(self, vector_column: str):
        check_instance("vector_column", vector_column, str)
        self.vector_column = vector_column

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor | dict[str, int]]:
        check_examples(examples)
        vectors = np.stack([value_of(example, self.vector_column) for example in examples])
        return {"vectors": torch.from_numpy(vectors).float(), "counts": {"images": len(vectors)}}
