"""Folders that appear only when they are complete."""

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


def replace_folder(destination: Path, finished: Path) -> None:
    """Renames `finished` to `destination`; a folder that was there before stays as `previous-…`."""
    if destination.exists():
        previous = destination.with_name(f"previous-{destination.name}")
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(destination, previous)
    os.rename(finished, destination)
