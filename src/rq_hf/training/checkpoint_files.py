"""The files of a checkpoint: whether they are as they were written, and reading them without executing any."""

import hashlib
import json
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import load
from safetensors import safe_open

from ..files import checksum
from ..model_cards import first_line

MANIFEST = "checkpoint.json"


class UnreadableFile(ValueError):
    """A file of a checkpoint that is missing, damaged, or holds more than tensors and plain values."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} cannot be read ({reason})")


def read_json(path: Path, *keys: str) -> dict:
    """The dictionary in a file, which must have these keys."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UnreadableFile(path, "it is missing") from error
    except ValueError as error:
        raise UnreadableFile(path, first_line(error)) from error
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        raise UnreadableFile(path, f"it lacks {', '.join(keys)}")
    return content


def write_manifest(checkpoint: Path, configuration: dict) -> None:
    """Notes the configuration of the run, and the SHA-256 of all files and of this itself."""
    content = {"configuration": configuration, "files": checksums(checkpoint)}
    (checkpoint / MANIFEST).write_text(json.dumps({**content, "sha256": digest(content)}, indent=2))


def read_manifest(checkpoint: Path) -> dict:
    manifest = read_json(checkpoint / MANIFEST, "configuration", "files", "sha256")
    if manifest.pop("sha256") != digest(manifest):
        raise UnreadableFile(checkpoint / MANIFEST, "it is damaged")
    return manifest


def digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        return dict(zip([path.relative_to(folder).as_posix() for path in paths], pool.map(checksum, paths)))


def check_contents(checkpoint: Path) -> None:
    """Raises [`UnreadableFile`] unless all files are as the manifest says."""
    found = checksums(checkpoint)
    for name, expected in read_manifest(checkpoint)["files"].items():
        if name not in found:
            raise UnreadableFile(checkpoint / name, "it is missing")
        if found[name] != expected:
            raise UnreadableFile(checkpoint / name, "it is truncated or damaged")


def check_plain(path: Path) -> None:
    """Raises [`UnreadableFile`] unless a file can be read and holds nothing but tensors and plain values."""
    try:
        if path.suffix in (".bin", ".pkl", ".pt"):
            load(path, map_location="cpu", mmap=True)
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.name == ".metadata":
            with open(path, "rb") as file:
                ShardMapUnpickler(file).load()
    except FileNotFoundError as error:
        raise UnreadableFile(path, "it is missing") from error
    except pickle.UnpicklingError as error:
        raise UnreadableFile(path, "it is damaged, or holds more than tensors and plain values") from error
    except Exception as error:
        raise UnreadableFile(path, first_line(error)) from error


class ShardMapUnpickler(pickle.Unpickler):
    """Reads which tensors are where in a sharded checkpoint; torch itself would execute what it finds there."""

    CLASSES = {
        "torch": ("Size",),
        "torch.serialization": ("_get_layout",),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.distributed.checkpoint.metadata": (
            *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
            *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        ),
        "pathlib": ("PosixPath",),
        "pathlib._local": ("PosixPath",),
    }

    def find_class(self, module: str, name: str):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in self.CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


@contextmanager
def plain_data_only(accelerator: Accelerator) -> Iterator[None]:
    """Inside, `torch.load` unpickles tensors and plain values only, even for callers that ask for more, as accelerate,
    torch and DeepSpeed do; and the classes of DeepSpeed's own state where that is used."""
    classes = []
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        classes = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    forced = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ[name] for name in forced if name in os.environ}
    os.environ.update(forced)
    try:
        with torch.serialization.safe_globals(classes):
            yield
    finally:
        for name in forced:
            del os.environ[name]
        os.environ.update(before)
