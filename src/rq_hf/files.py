"""Files and folders that appear only when they are complete."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """
    A new folder beside `destination`, which becomes `destination` when the block ends without an error and is removed
    otherwise. A folder that was there before stays as `previous-…`.
    """
    unfinished = destination.with_name(f"unfinished-{destination.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    replace_folder(destination, unfinished)


@contextmanager
def atomic_file(destination: Path) -> Iterator[Path]:
    """
    A path beside `destination` to write to. The file becomes `destination`, in the place of what was there, when the
    block ends without an error, and is removed otherwise.
    """
    unfinished = destination.with_name(f"unfinished-{destination.name}")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        os.replace(unfinished, destination)
    finally:
        unfinished.unlink(missing_ok=True)


def checksum(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_checksums(folder: str | Path) -> dict[str, str]:
    """The SHA-256 of every file of weights in the folder of a model or in those of a pipeline's components, by its
    path there, as `sha256sum` prints it. Raises `ValueError` for a folder without any."""
    found = [path for pattern in ("*", "*/*") for path in Path(folder).glob(pattern)]
    paths = sorted(path for path in found if path.suffix in (".safetensors", ".bin"))
    if not paths:
        raise ValueError(f"{folder} holds no weights, files that end in .safetensors or .bin")
    return {path.relative_to(folder).as_posix(): checksum(path) for path in paths}


def replace_folder(destination: Path, finished: Path) -> None:
    """Renames `finished` to `destination`; a folder that was there before stays as `previous-…`."""
    if destination.exists():
        previous = destination.with_name(f"previous-{destination.name}")
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(destination, previous)
    os.rename(finished, destination)
