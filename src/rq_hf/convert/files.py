"""Finding and reading the authors' files: tar archives, folders, `model.pt` beside `config.yaml`."""

import gzip
import lzma
import pickle
import re
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .configs import RQTRANSFORMER, RQVAE, Section, read_config, stage_of


@dataclass
class Checkpoint:
    """One stage: its weights file, its `config.yaml`, its name in messages, and the contents that are not used."""

    weights: Path
    config: Section
    label: str
    unused: list[str] = field(default_factory=list)

    def load(self, ema: bool) -> dict[str, torch.Tensor]:
        """The memory-mapped state dict, or its moving average.

        No code in the file is executed. Raises `ValueError` unless the file contains a dictionary of tensors that
        PyTorch can map.
        """
        try:
            contents = torch.load(self.weights, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL (\S+)", str(error))
            if name:
                raise ValueError(f"{self.label} holds Python objects ({name[1]}); only tensors are read") from error
            raise ValueError(f"{self.label} is not a PyTorch checkpoint") from error
        except Exception as error:  # a broken pickle can raise anything
            raise ValueError(
                f"{self.label} is a truncated or invalid PyTorch checkpoint (torch.save since 1.6): {one_line(error)}"
            ) from error
        key = "state_dict_ema" if ema else "state_dict"
        state_dict = contents.get(key) if isinstance(contents, dict) else None
        if not isinstance(state_dict, dict) or not all(isinstance(w, torch.Tensor) for w in state_dict.values()):
            found = ", ".join(map(str, contents)) if isinstance(contents, dict) else type(contents).__name__
            raise ValueError(f"{self.label} has no {key}; it has {found}")
        self.unused += [str(name) for name in contents if name != key]
        return state_dict


def single_checkpoint(weights: str | Path, stage: str) -> Checkpoint:
    """The `.pt` file of a stage, `"rq-vae"` or `"rq-transformer"`, with the `config.yaml` beside it.

    Raises `FileNotFoundError` for a missing file, `ValueError` for one of another stage.
    """
    weights = Path(weights)
    config_path = weights.with_name("config.yaml")
    for path in (weights, config_path):
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
    config = read_config(config_path)
    if stage_of(config) != stage:
        found = stage_of(config) or "something else"
        raise ValueError(f"{weights} must be an {stage}, but {config_path} describes {found}")
    return Checkpoint(weights, config, str(weights))


def find_checkpoints(folder: Path, name: str) -> dict[str, Checkpoint]:
    """All stages below a folder, which messages call `name`: each `config.yaml` with the `.pt` file beside it.

    Raises `ValueError` if there are none, two of the same stage, or a checkpoint of another kind of model.
    """
    found = {}
    for path in sorted(folder.rglob("config.yaml")):
        config = read_config(path)
        stage = stage_of(config)
        place = Path(name, path.parent.relative_to(folder))
        files = sorted(path.parent.glob("*.pt"))
        if stage is None and files and "arch" in config:
            raise ValueError(
                f"{place / path.name} describes neither an {RQVAE} nor an {RQTRANSFORMER} by its arch.type"
            )
        if stage is None:
            continue
        if len(files) > 1:
            files = [file for file in files if file.name == "model.pt"] or files
        if len(files) != 1:
            raise ValueError(f"{place} must hold one .pt file, or one called model.pt; got {[f.name for f in files]}")
        label = str(place / files[0].name)
        if stage in found:
            raise ValueError(f"two checkpoints of an {stage}: {found[stage].label} and {label}; name the file to use")
        found[stage] = Checkpoint(files[0], config, label)
    if not found:
        raise ValueError(f"{name} has no config.yaml of an RQ-VAE or RQ-Transformer")
    return found


def extract_archive(archive: Path, folder: Path) -> None:
    """Extracts the `.pt` files and `config.yaml`s of a tar archive.

    Raises `ValueError` for a broken archive (also one that ends between two members or whose checksum is wrong), and
    for one with a member outside `folder`.
    """
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                tarfile.data_filter(member, str(folder))
                if member.isfile() and (member.name.endswith(".pt") or Path(member.name).name == "config.yaml"):
                    tar.extract(member, folder, filter="data")
            if tar.fileobj.tell() < tar.offset + tarfile.BLOCKSIZE:
                raise tarfile.ReadError("the end of the archive is missing")
            while tar.fileobj.read(2**20):  # up to the checksum
                pass
    except tarfile.FilterError as error:
        raise ValueError(f"{archive} is refused: {one_line(error)}") from error
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{archive} is a truncated or invalid tar archive: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
