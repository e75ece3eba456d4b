"""Files that others made. What a file is and how large it is are looked at before it is read.

Messages quote such a file by [`shown`] and [`one_line`]: names in it may hold control characters of terminals.
"""

import math
import os
import pickle
import re
import reprlib
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
import yaml

MAX_YAML_SIZE = 100_000  # bytes, read in about 1 s; the authors' files have 3,000
MAX_PICKLE_SIZE = 2**24  # bytes of names and shapes in a .pt file: about 100,000 weights
LEGACY_START = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
TENSOR_PARTS = {  # what tensors in files of torch.save are made by
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
}


def shown(value) -> str:
    """A value or name for a message: one line without control characters, of at most 200 characters."""
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to print long integers
        return f"an integer of {value.bit_length()} bits"
    text = value if isinstance(value, str) else reprlib.repr(value)
    return printable(text if len(text) <= 200 else f"{text[:199]}…")


def shown_first(names: Iterable, number: int) -> str:
    """The first names of a list for a message."""
    names = list(names)
    return ", ".join(map(shown, names[:number])) + (", …" if len(names) > number else "")


def one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split())) or type(error).__name__


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_contents_are_there(path: str | Path, label: str) -> None:
    """Raises `ValueError` for what downloads leave in the place of a file: nothing, a Git LFS pointer, a web page."""
    with open(path, "rb") as file:
        start = file.read(200)
    if not start:
        raise ValueError(f"{label} is empty; download or copy it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{label} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{label} is a web page, such as a log-in or error page; download the file itself")


class StandIn:
    """Stands for a Python object in a file: it has the name of its class and its attributes, but no code."""

    def __new__(cls, *arguments, **named):
        return super().__new__(cls)


class StandInPickle:
    """For `torch.load`: makes tensors and plain values, and a [`StandIn`] of everything else. Unlike the one of
    `weights_only=True`, which takes protocol 2 alone, it reads pickles of every protocol."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            return TENSOR_PARTS.get((module, name)) or type(name, (StandIn,), {})


def read_torch_file(path: str | Path, label: str, classes: Sequence[type] = (), stand_ins: bool = False):
    """The contents of a file of `torch.save`, with its tensors memory-mapped. No code in the file is executed.

    Besides tensors and plain values it may hold objects of `classes`, which are created and filled by PyTorch, so
    that only classes whose creation is harmless may be named; with `stand_ins` instead, any objects, for each of which
    a [`StandIn`] is made.

    The file is read through once, to compare its checksums. Raises `ValueError`, which calls the file `label`, for
    anything that PyTorch would not map as it was saved: damaged or compressed entries, another byte order, files of
    PyTorch before 1.6, TorchScript, Python objects.
    """
    check_contents_are_there(path, label)
    with open(path, "rb") as file:
        if file.read(len(LEGACY_START)) == LEGACY_START:
            raise ValueError(
                f"{label} has the format of PyTorch before 1.6, which cannot be mapped; save it again by "
                "torch.save(torch.load(file, weights_only=True), file)"
            )
    try:
        check_zip_entries(path)
        if stand_ins:
            options = {"weights_only": False, "pickle_module": StandInPickle}
            return torch.load(path, map_location="cpu", mmap=True, **options)
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name:
            raise ValueError(f"{label} holds Python objects ({shown(name[1])}); only tensors are read") from error
        raise ValueError(f"{label} is not a PyTorch checkpoint") from error
    except Exception as error:  # a broken archive or pickle can raise anything
        raise ValueError(f"{label} is a truncated or invalid PyTorch checkpoint: {one_line(error)}") from error


def check_zip_entries(path: str | Path) -> None:
    """Raises an error unless all entries of the zip archive are stored as they are, whole, and for this machine.

    With `mmap=True`, `torch.load` takes the bytes as they lie there, and it never looks at checksums.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise zipfile.BadZipFile("it is a TorchScript model, not a state dict")
        if sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise zipfile.BadZipFile("its entries are compressed or overlap, torch.save stores them one after another")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{entry.filename} is compressed, torch.save stores entries as they are")
            if entry.filename.endswith("/data.pkl") and entry.file_size > MAX_PICKLE_SIZE:
                raise zipfile.BadZipFile(f"{entry.filename} is larger than {MAX_PICKLE_SIZE:,} bytes")
            if entry.filename.endswith("/byteorder") and archive.open(entry).read(10) != sys.byteorder.encode():
                raise zipfile.BadZipFile(
                    f"its byte order is not {sys.byteorder}; save it again on a machine like this"
                )
        for entry in entries:
            with archive.open(entry) as content:
                while content.read(2**20):  # up to the checksum
                    pass


def read_state_dict(path: str | Path) -> dict:
    """The state dict in a file of `torch.save`, or its `"state_dict"`. Raises `ValueError` if there is none."""
    contents = read_torch_file(path, str(path))
    state_dict = contents.get("state_dict", contents) if isinstance(contents, dict) else contents
    if not isinstance(state_dict, dict):
        raise ValueError(f"{path} must hold a state dict, got {type(state_dict).__name__}")
    return state_dict


class PlainLoader(yaml.SafeLoader):
    """Without merge keys: a few hundred bytes of them copy billions of values. Aliases only name the same value."""

    def flatten_mapping(self, node):
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("it merges values by <<; write them out")
        super().flatten_mapping(node)


def read_yaml(path: str | Path, label: str) -> dict:
    """The named options in a YAML file of at most 100 kB. Values by an alias are the same object, maybe in a circle.

    Raises `ValueError`, which calls the file `label`, for any other file and for merge keys (`<<`).
    """
    check_contents_are_there(path, label)
    if os.path.getsize(path) > MAX_YAML_SIZE:
        raise ValueError(f"{label} is too large: {os.path.getsize(path):,} bytes, at most {MAX_YAML_SIZE:,} are read")
    try:
        options = yaml.load(Path(path).read_text(encoding="utf-8"), PlainLoader)
    except Exception as error:  # the constructors of PyYAML raise anything for a value that is not of its tag
        raise ValueError(f"{label} is not plain YAML: {shown(one_line(error))}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{label} must hold named options, got {type(options).__name__}")
    return options


class NumpyArchive:
    """
    The arrays in a file of `numpy.savez`, none of which is read before it is asked for.

    `headers` are their shapes and types. Raises `ValueError`, which names the file, for one of another kind and for
    arrays that are not as long as their headers say or that hold Python objects; `read` and `read_in_parts` raise it
    for damaged ones.
    """

    def __init__(self, path: str | Path):
        self.path = path
        check_contents_are_there(path, str(path))
        with self.naming_the_file(), zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
            self.headers = {e.filename.removesuffix(".npy"): read_header(archive, e) for e in entries}

    @contextmanager
    def naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a broken archive can raise anything
            raise ValueError(f"{self.path} is not a whole file of numpy.savez: {one_line(error)}") from error

    def read(self, name: str) -> np.ndarray:
        with self.naming_the_file(), zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            file.read()  # up to the checksum
            return array

    def read_in_parts(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """The array in parts of so many rows; the last one may have fewer."""
        (length, *sizes), dtype = self.headers[name]
        with self.naming_the_file(), zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
            if read_array_header(file)[1]:
                raise ValueError(f"{name} is stored by columns; save it again in C order")
            for start in range(0, length, rows):
                count = min(rows, length - start)
                part = file.read(count * math.prod(sizes) * dtype.itemsize)
                yield np.frombuffer(part, dtype).reshape(count, *sizes)


def read_header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array of a [`NumpyArchive`]."""
    with archive.open(entry) as file:
        shape, _, dtype = read_array_header(file)
        found = entry.file_size - file.tell()
    if dtype.hasobject:
        raise zipfile.BadZipFile(f"{shown(entry.filename)} holds Python objects")
    if found != math.prod(shape) * dtype.itemsize:
        raise zipfile.BadZipFile(f"{shown(entry.filename)} of shape {shown(shape)} has {found:,} bytes")
    return shape, dtype


def read_array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape of an array of NumPy, whether it is stored by columns, and its type; the file is then at its values."""
    if np.lib.format.read_magic(file) == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)
