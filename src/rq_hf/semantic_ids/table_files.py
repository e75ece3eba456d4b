"""Semantic IDs on disk, beside the files of their model: `semantic_ids.parquet` and `semantic_ids.json`."""

import json
from pathlib import Path

import numpy as np
import torch

from ..argument_checks import is_integer
from ..files import checksum
from ..models import RQEmbeddingModel
from ..models.pretrained import fingerprint, read_json
from ..untrusted_files import check_contents_are_there, one_line, shown, shown_first

DESCRIPTION_FILE = "semantic_ids.json"
TABLE_FILE = "semantic_ids.parquet"
FORMAT_VERSION = 1
DESCRIPTION = {"format_version": int, "items": int, "sizes": list, "model_sha256": str, "table_sha256": str}


def column_names(depth: int, levels: int) -> list[str]:
    return ["item", *(f"code_{d}" for d in range(depth)), *(["suffix"] if levels > depth else [])]


def model_fingerprint(model: RQEmbeddingModel) -> str:
    """That of the weights that codes depend on."""
    names = ("mean", "scale", "quantizer.codebook")
    weights = model.state_dict()
    return fingerprint({name: weights[name] for name in weights if name in names or name.startswith("encoder.")})


def write_table(
    folder: Path, items: list[str] | list[int], codes: torch.Tensor, sizes: tuple[int, ...], model: RQEmbeddingModel
) -> None:
    """Writes the codes `(N, L)` of items, and the checksums by which table and weights know each other."""
    import pyarrow
    import pyarrow.parquet

    kind = pyarrow.string() if isinstance(items[0], str) else pyarrow.int64()
    columns = [pyarrow.array(items, kind), *(pyarrow.array(column.numpy()) for column in codes.t())]
    names = column_names(model.config.depth, len(sizes))
    pyarrow.parquet.write_table(pyarrow.table(columns, names=names), folder / TABLE_FILE)
    description = {
        "format_version": FORMAT_VERSION,
        "items": len(items),
        "sizes": list(sizes),
        "model_sha256": model_fingerprint(model),
        "table_sha256": checksum(folder / TABLE_FILE),
    }
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def read_description(folder: Path) -> dict:
    """What [`write_table`] says about a table. Raises `FileNotFoundError` for a folder without semantic IDs,
    `ValueError` for a file of another kind, or of a later format."""
    path = folder / DESCRIPTION_FILE
    for file in (path, folder / TABLE_FILE):
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no semantic IDs: it has no {file.name}")
        check_contents_are_there(file, str(file))
    description = read_json(path)
    found = description.get("format_version")
    if is_integer(found) and found != FORMAT_VERSION:
        raise ValueError(f"{path} has the format {shown(found)}; this release of rq_hf reads {FORMAT_VERSION}")
    for name, kind in DESCRIPTION.items():
        if type(description.get(name)) is not kind:  # true is no integer
            raise ValueError(f"{path} must say {name} ({kind.__name__}), got {shown(description.get(name))}")
    return description


def read_table(folder: Path, depth: int, sha256: str) -> tuple[list[str] | list[int], torch.Tensor]:
    """The items and codes `(N, L)` of a table with this checksum. Raises `ValueError` for a damaged or another
    file."""
    import pyarrow
    import pyarrow.parquet

    path = folder / TABLE_FILE
    if checksum(path) != sha256:
        raise ValueError(f"{path} is damaged, or is not the table that {DESCRIPTION_FILE} was written for")
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file: {one_line(error)}") from error
    accepted = [column_names(depth, levels) for levels in (depth, depth + 1)]
    if table.column_names not in accepted:
        raise ValueError(
            f"{path} must have the columns {', '.join(accepted[0])}, and maybe suffix; got "
            f"{shown_first(table.column_names, 20)}"
        )
    for name, column in zip(table.column_names, table.columns):
        kinds = (pyarrow.int64(), pyarrow.string()) if name == "item" else (pyarrow.int64(),)
        if column.type not in kinds or column.null_count:
            raise ValueError(
                f"{name} in {path} must be {' or '.join(map(str, kinds))} without gaps, got {shown(str(column.type))} "
                f"with {column.null_count} gaps"
            )
    codes = np.stack([column.to_numpy() for column in table.columns[1:]], axis=1)
    return table["item"].to_pylist(), torch.from_numpy(codes)
