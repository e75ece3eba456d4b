"""
Extracted latents on disk: parquet files with a column `latents`, and `latents.json`.

`latents` has the bytes of an array `(H, W, C)`, one vector per position: of an RQ-VAE the vectors that it quantizes,
of an `AutoencoderKL` the moments, means and then log-variances, not scaled. `latents.json` has the `shape`, the
`dtype` (`bfloat16` or `float32`) and a fingerprint of the encoder, `rqvae_sha256` or `autoencoder_kl_sha256`.
"""

import glob
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import torch

from ..argument_checks import check_choice, check_floating, check_instance, check_items, check_size
from ..models import RQVAEModel
from ..models.continuous_latents import Autoencoder, latent_shape
from ..models.pretrained import fingerprint
from .loading import check_columns, find_files, load_files, number_examples

DESCRIPTION = "latents.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def stored_shape(vae: Autoencoder) -> tuple[int, int, int]:
    """`(H, W, C)` of what is stored for an image; of an `AutoencoderKL`, C is twice the channels of its latents."""
    channels, height, width = latent_shape(vae)
    return height, width, channels if isinstance(vae, RQVAEModel) else 2 * channels


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The type of the numbers in a folder of latents. Raises `ValueError` for a folder without a valid description."""
    return DTYPES[read_description(folder)["dtype"]]


def describe_latents(vae: Autoencoder, dtype: torch.dtype = torch.bfloat16) -> dict:
    """What distinguishes the latents of `vae`: their shape, how they are stored, and a fingerprint of the weights that
    they (and codes) depend on."""
    if isinstance(vae, RQVAEModel):
        name, weights = "rqvae_sha256", vae.encoding_state_dict()
    else:
        name, weights = "autoencoder_kl_sha256", vae.state_dict()
        weights = {key: weights[key] for key in weights if key.startswith(("encoder.", "quant_conv."))}
    return {
        "shape": list(stored_shape(vae)),
        "dtype": str(dtype).removeprefix("torch."),
        name: fingerprint(weights),
    }


def latents_to_bytes(latents: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> list[bytes]:
    """Latents `(B, H, W, C)` -> how each image's are stored."""
    check_floating("latents", latents, "B", "H", "W", "C")
    check_dtype(dtype)
    latents = latents.to(dtype).cpu().contiguous()
    return [image.view(torch.uint8).numpy().tobytes() for image in latents]


def bytes_to_latents(
    stored: Sequence[bytes], shape: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """The inverse of [`latents_to_bytes`]: B stored images of `shape` `(H, W, C)` -> `(B, H, W, C)` of `dtype`."""
    check_items("stored", stored)
    check_items("shape", shape, 3)
    for size in shape:
        check_size("shape", size)
    check_dtype(dtype)
    needed = math.prod(shape) * dtype.itemsize
    for image in stored:
        if not isinstance(image, bytes) or len(image) != needed:
            found = f"{len(image)}" if isinstance(image, bytes) else f"{image!r:.80}"
            raise ValueError(f"latents of the shape {tuple(shape)} must be {needed} bytes per image, got {found}")
    return torch.frombuffer(bytearray().join(stored), dtype=dtype).view(-1, *shape)


def check_dtype(dtype: torch.dtype) -> None:
    """Raises `TypeError`/`ValueError` unless latents can be stored in this type."""
    check_instance("dtype", dtype, torch.dtype)
    check_choice("dtype", str(dtype).removeprefix("torch."), list(DTYPES))


def write_latents(
    rows: Iterator[dict], features: datasets.Features, folder: Path, prefix: str, rows_per_file: int
) -> None:
    """Writes rows with `latents` (bytes) and other columns to `{prefix}-00000.parquet` and so on."""
    for number in itertools.count():
        shard = list(itertools.islice(rows, rows_per_file))
        if not shard:
            return
        datasets.Dataset.from_list(shard, features=features).to_parquet(folder / f"{prefix}-{number:05d}.parquet")


def write_description(folder: Path, vae: Autoencoder, dtype: torch.dtype = torch.bfloat16) -> None:
    """Marks the latents in a folder as those of `vae`, stored in `dtype`."""
    (folder / DESCRIPTION).write_text(json.dumps(describe_latents(vae, dtype)))


def read_description(folder: str | Path) -> dict:
    """What [`write_description`] wrote. Raises `ValueError` where there is nothing, or something else."""
    check_instance("folder", folder, str | Path)
    path = Path(folder, DESCRIPTION)
    if not path.exists():
        raise ValueError(f"latents must be a folder that extract_latents.py wrote; there is no {path}")
    try:
        description = json.loads(path.read_text())
        check_choice("dtype", description["dtype"], list(DTYPES))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is broken ({error}): extract the latents again") from error
    return description


def load_latents(
    folder: str, vae: Autoencoder, streaming: bool = False, required_columns: tuple[str, ...] = ()
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Opens a folder of latents that were extracted with `vae`.

    Raises:
        `ValueError`: a folder without latents or with a broken description, latents of another autoencoder, or a
        missing column.
    """
    found = read_description(folder)
    needed = describe_latents(vae, DTYPES[found["dtype"]])
    if found != needed:
        raise ValueError(
            f"{folder} was extracted with another autoencoder: its {DESCRIPTION} says {found}, "
            f"this {type(vae).__name__} needs {needed}"
        )
    dataset = load_files(find_files(str(Path(glob.escape(folder), "*.parquet"))), "train", streaming)
    check_columns(dataset, ("latents", *required_columns))
    return number_examples(dataset)
