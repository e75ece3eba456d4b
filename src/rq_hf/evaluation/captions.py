"""The captions that a text-to-image model is evaluated on."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from ..argument_checks import check_bool, check_integer, check_items, check_size
from ..data.loading import check_columns, find_files, load_files
from ..text import encode_captions
from ..untrusted_files import one_line, shown


def read_captions(path: str | Path) -> list[str]:
    """The lines of a text file in UTF-8, one caption each. Raises `ValueError` for an empty line, by its number."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text file in UTF-8: {one_line(error)}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"line {number} of {path} is empty; there must be one caption per line")
    if not lines:
        raise ValueError(f"{path} holds no captions")
    return lines


def load_captions(
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    data_files: str | None = None,
    split: str = "train",
    text_column: str = "text",
) -> list[str]:
    """
    The captions of a data set, in its order; images are not read. Captions that occur twice are there twice.

    Args:
        dataset_name: data set on the Hub, or a local folder.
        dataset_config: configuration (subset) of that data set.
        data_files: local files instead, a path or glob pattern.

    Raises `ValueError` for neither or both sources, a missing column, and a caption that is not a string, by its
    index.
    """
    if (dataset_name is None) == (data_files is None):
        raise ValueError(f"expected either dataset_name or data_files, got {dataset_name!r} and {data_files!r}")
    if data_files is not None:
        dataset = load_files(find_files(data_files), split, streaming=True)
    else:
        dataset = datasets.load_dataset(dataset_name, dataset_config, split=split, streaming=True)
    check_columns(dataset, (text_column,))
    captions = []
    for example in dataset.select_columns([text_column]):
        caption = example[text_column]
        if not isinstance(caption, str):
            raise ValueError(f"the caption of example {len(captions)} must be a string, got {shown(caption)}")
        captions.append(caption)
    if not captions:
        raise ValueError("the data set holds no captions")
    return captions


def choose_captions(captions: Sequence[str], count: int, seed: int | None = None) -> list[str]:
    """`count` of the captions: the first ones, or with a seed, others at random, each at most once. Raises
    `ValueError` for more than there are."""
    check_items("captions", captions)
    check_size("count", count)
    if count > len(captions):
        raise ValueError(f"there are {len(captions):,} captions, got count={count:,}")
    if seed is None:
        return list(captions[:count])
    check_integer("seed", seed, 0, 2**32 - 1)
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(int(seed)))
    return [captions[i] for i in order[:count].tolist()]


def truncated_cond_ids(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], length: int, truncate: bool = False
) -> torch.Tensor | None:
    """
    The condition ids `(M, L)`, L = `length`, of captions some of which are cut off after L tokens, as in training;
    `None` if all of them fit.

    Raises `ValueError` for captions of more than L tokens unless `truncate` is set.
    """
    check_bool("truncate", truncate)
    cond_ids, num_tokens = encode_captions(tokenizer, captions, length)
    longer = [index for index, count in enumerate(num_tokens) if count > length]
    if not longer:
        return None
    if not truncate:
        raise ValueError(
            f"captions may have at most {length} tokens, but {len(longer):,} of {len(captions):,} have more; the "
            f"first of them has {num_tokens[longer[0]]}: {shown(captions[longer[0]])}"
        )
    return cond_ids
