"""Finding and reading the authors' files: tar archives, folders, `model.pt` beside `config.yaml`."""

import errno
import gzip
import lzma
import shutil
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..untrusted_files import (
    check_contents_are_there,
    one_line,
    printable,
    read_torch_file,
    read_yaml,
    shown,
    shown_first,
)
from .configs import RQTRANSFORMER, RQVAE, Section, stage_of

MAX_FOLDERS = 20  # that a member of an archive may lie in; Python itself cannot remove 1,000


@dataclass
class Checkpoint:
    """One stage: its weights file, its `config.yaml`, its name in messages, and the contents that are not used."""

    weights: Path
    config: Section
    label: str
    unused: list[str] = field(default_factory=list)

    def load(self, ema: bool) -> dict[str, torch.Tensor]:
        """The memory-mapped state dict, or its moving average.

        Raises `ValueError` for a file that [`read_torch_file`] refuses, or one without a dictionary of that name.
        """
        contents = read_torch_file(self.weights, self.label)
        key = "state_dict_ema" if ema else "state_dict"
        state_dict = named_state_dict(contents, key, self.label)
        self.unused += [shown(name) for name in contents if name != key]
        return state_dict


def named_state_dict(contents, key: str, label: str) -> dict[str, torch.Tensor]:
    """`contents[key]`. Raises `ValueError` unless the contents of the file `label` hold a dictionary of that name."""
    if not isinstance(contents, dict) or key not in contents:
        found = shown_first(contents, 10) if isinstance(contents, dict) else type(contents).__name__
        raise ValueError(f"{label} has no {key}; it has {found or 'nothing'}")
    if not isinstance(contents[key], dict):
        raise ValueError(f"{label}: {key} must be a dictionary of tensors, got {type(contents[key]).__name__}")
    return contents[key]


def single_checkpoint(weights: str | Path, stage: str) -> Checkpoint:
    """The `.pt` file of a stage, `"rq-vae"` or `"rq-transformer"`, with the `config.yaml` beside it.

    Raises `FileNotFoundError` for a missing file, `ValueError` for one of another stage.
    """
    weights = Path(weights)
    config_path = weights.with_name("config.yaml")
    for path in (weights, config_path):
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
    config = Section(read_yaml(config_path, str(config_path)))
    if stage_of(config) != stage:
        found = stage_of(config) or "something else"
        raise ValueError(f"{weights} must be an {stage}, but {config_path} describes {found}")
    return Checkpoint(weights, config, str(weights))


def find_checkpoints(folder: Path, name: str) -> dict[str, Checkpoint]:
    """All stages below a folder, which messages call `name`: each `config.yaml` with the `.pt` file beside it.

    Raises `ValueError` if there are none, two of the same stage, or a checkpoint of another kind of model.
    """
    try:
        paths = sorted(folder.rglob("config.yaml"))
    except RecursionError as error:
        raise ValueError(
            f"{name} is nested too deeply to be searched; name the files by rqvae and rqtransformer"
        ) from error
    found = {}
    for path in paths:
        place = printable(str(Path(name, path.parent.relative_to(folder))))
        config = Section(read_yaml(path, f"{place}/config.yaml"))
        stage = stage_of(config)
        files = sorted(path.parent.glob("*.pt"))
        if stage is None and files and "arch" in config:
            raise ValueError(
                f"{place}/config.yaml describes neither an {RQVAE} nor an {RQTRANSFORMER} by its arch.type"
            )
        if stage is None:
            continue
        if len(files) > 1:
            files = [file for file in files if file.name == "model.pt"] or files
        if len(files) != 1:
            raise ValueError(f"{place} must hold one .pt file, or one called model.pt; got {[f.name for f in files]}")
        label = f"{place}/{printable(files[0].name)}"
        if stage in found:
            raise ValueError(f"two checkpoints of an {stage}: {found[stage].label} and {label}; name the file to use")
        found[stage] = Checkpoint(files[0], config, label)
    if not found:
        raise ValueError(f"{name} has no config.yaml of an RQ-VAE or RQ-Transformer")
    return found


def extract_archive(archive: Path, folder: Path) -> None:
    """Extracts the `.pt` files and `config.yaml`s of a tar archive.

    Raises `ValueError` for a broken archive (also one that ends between two members or whose checksum is wrong), and
    for one with a member outside `folder` or more than 20 folders deep; `OSError` if the disk is too small.
    """
    check_contents_are_there(archive, str(archive))
    folder.mkdir()
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                tarfile.data_filter(member, str(folder))
                if member.isfile() and (member.name.endswith(".pt") or Path(member.name).name == "config.yaml"):
                    check_extractable(member, folder)
                    tar.extract(member, folder, filter="data")
            if tar.fileobj.tell() < tar.offset + tarfile.BLOCKSIZE:
                raise tarfile.ReadError("the end of the archive is missing")
            while tar.fileobj.read(2**20):  # up to the checksum
                pass
    except tarfile.FilterError as error:
        raise ValueError(f"{archive} is refused: {one_line(error)}") from error
    except (tarfile.TarError, ValueError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{archive} is a truncated or invalid tar archive: {one_line(error)}") from error


def check_extractable(member: tarfile.TarInfo, folder: Path) -> None:
    if len(Path(member.name).parts) > MAX_FOLDERS:
        raise tarfile.ReadError(f"{shown(member.name)} lies in more than {MAX_FOLDERS} folders")
    free = shutil.disk_usage(folder).free
    if member.size > free:
        raise OSError(
            errno.ENOSPC,
            f"{shown(member.name)} unpacks to {member.size:,} bytes, but the disk has {free:,}",
            str(folder),
        )
