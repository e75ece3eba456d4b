"""
Extracted latents on disk: parquet files with a column `latents`, the bytes of the vectors `(H, W, C)` that an RQ-VAE
quantizes, in bfloat16, and `latents.json`, which says which RQ-VAE they belong to.
"""

import glob
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import torch

from ..argument_checks import check_floating, check_instance, check_items, check_size
from ..models import RQVAEModel
from .loading import check_columns, find_files, load_files, number_examples

DESCRIPTION = "latents.json"
DTYPE = torch.bfloat16


def latents_shape(vae: RQVAEModel) -> tuple[int, int, int]:
    """`(H, W, C)` of the latents of an image."""
    return *vae.code_shape[:2], vae.config.codebook_dim


def describe_latents(vae: RQVAEModel) -> dict:
    """What distinguishes the latents of `vae`: their shape, how they are stored, and a fingerprint of the weights that
    codes depend on."""
    fingerprint = hashlib.sha256()
    for _, weight in sorted(vae.encoding_state_dict().items()):
        fingerprint.update(weight.float().cpu().numpy().tobytes())
    return {
        "shape": list(latents_shape(vae)),
        "dtype": str(DTYPE).removeprefix("torch."),
        "rqvae_sha256": fingerprint.hexdigest(),
    }


def latents_to_bytes(latents: torch.Tensor) -> list[bytes]:
    """Latents `(B, H, W, C)` -> how each image's are stored."""
    check_floating("latents", latents, "B", "H", "W", "C")
    latents = latents.to(DTYPE).cpu().contiguous()
    return [image.view(torch.uint8).numpy().tobytes() for image in latents]


def bytes_to_latents(stored: Sequence[bytes], shape: tuple[int, int, int]) -> torch.Tensor:
    """The inverse of [`latents_to_bytes`]: B stored images of `shape` `(H, W, C)` -> `(B, H, W, C)` bfloat16."""
    check_items("stored", stored)
    check_items("shape", shape, 3)
    for size in shape:
        check_size("shape", size)
    needed = math.prod(shape) * DTYPE.itemsize
    for image in stored:
        if not isinstance(image, bytes) or len(image) != needed:
            found = f"{len(image)}" if isinstance(image, bytes) else f"{image!r:.80}"
            raise ValueError(f"latents of the shape {tuple(shape)} must be {needed} bytes per image, got {found}")
    return torch.frombuffer(bytearray().join(stored), dtype=DTYPE).view(-1, *shape)


def write_latents(
    rows: Iterator[dict], features: datasets.Features, folder: Path, prefix: str, rows_per_file: int
) -> None:
    """Writes rows with `latents` (bytes) and other columns to `{prefix}-00000.parquet` and so on."""
    for number in itertools.count():
        shard = list(itertools.islice(rows, rows_per_file))
        if not shard:
            return
        datasets.Dataset.from_list(shard, features=features).to_parquet(folder / f"{prefix}-{number:05d}.parquet")


def write_description(folder: Path, vae: RQVAEModel) -> None:
    """Marks the latents in a folder as those of `vae`."""
    (folder / DESCRIPTION).write_text(json.dumps(describe_latents(vae)))


def load_latents(
    folder: str, vae: RQVAEModel, streaming: bool = False, required_columns: tuple[str, ...] = ()
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Opens a folder of latents that were extracted with `vae`.

    Raises:
        `ValueError`: a folder without latents or with a broken description, latents of another RQ-VAE, or a missing
        column.
    """
    check_instance("folder", folder, str | Path)
    description = Path(folder, DESCRIPTION)
    if not description.exists():
        raise ValueError(f"latents must be a folder that extract_latents.py wrote; there is no {description}")
    try:
        found = json.loads(description.read_text())
    except ValueError as error:
        raise ValueError(f"{description} is broken ({error}): extract the latents again") from error
    needed = describe_latents(vae)
    if found != needed:
        raise ValueError(
            f"{folder} was extracted with another RQ-VAE: its {DESCRIPTION} says {found}, this RQ-VAE needs {needed}"
        )
    dataset = load_files(find_files(str(Path(glob.escape(folder), "*.parquet"))), "train", streaming)
    check_columns(dataset, ("latents", *required_columns))
    return number_examples(dataset)
