import argparse
import copy
import io
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from rq_hf.untrusted_files import (
    MAX_PICKLE_SIZE,
    StandIn,
    read_state_dict,
    read_torch_file,
    read_yaml,
    shown,
    shown_first,
)

WEIGHTS = {"a": torch.arange(1000.0), "b": torch.ones(3, 5, dtype=torch.float16)}


def saved(contents=None, **options):
    buffer = io.BytesIO()
    torch.save(contents or {"state_dict": WEIGHTS}, buffer, **options)
    return buffer.getvalue()


def rewritten(change=lambda name, content: content, compression=zipfile.ZIP_STORED):
    """A file of `torch.save` with other entries, or compressed ones."""
    source, target = zipfile.ZipFile(io.BytesIO(saved())), io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive:
        for entry in source.infolist():
            archive.writestr(entry.filename, change(entry.filename, source.read(entry)))
    return target.getvalue()


def with_flipped_bit():
    content = bytearray(saved())
    content[content.index(WEIGHTS["a"].numpy().tobytes()) + 2000] ^= 1
    return bytes(content)


def with_overlapping_entries():
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("archive/data/0", bytes(1000))
        archive.filelist *= 3
    return target.getvalue()


def with_large_pickle():
    return rewritten(lambda name, content: bytes(MAX_PICKLE_SIZE + 1) if name.endswith("data.pkl") else content)


def torch_script():
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


REFUSED = {
    "empty": (lambda: b"", "is empty"),
    "git lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*git lfs pull"),
    "web page": (lambda: b"\n <!doctype HTML><html>", "is a web page"),
    "xml": (lambda: b'\xef\xbb\xbf<?xml version="1.0"?>', "is a web page"),
    "legacy": (lambda: saved(_use_new_zipfile_serialization=False), "before 1.6.*save it again"),
    "truncated": (lambda: saved()[:-100], "is a truncated or invalid PyTorch checkpoint"),
    "flipped bit": (with_flipped_bit, "Bad CRC-32 for file .*/data/0"),
    "deflated": (lambda: rewritten(compression=zipfile.ZIP_DEFLATED), "compressed"),
    "lzma": (lambda: rewritten(lambda *_: b"1", zipfile.ZIP_LZMA), "compressed"),
    "big endian": (lambda: rewritten(lambda name, data: b"big" if "byteorder" in name else data), "its byte order is"),
    "overlapping": (with_overlapping_entries, "overlap"),
    "large pickle": (with_large_pickle, "data.pkl is larger than"),
    "script": (torch_script, "is a TorchScript model"),
}


@pytest.mark.parametrize("content, match", REFUSED.values(), ids=REFUSED)
def test_file_that_cannot_be_mapped(tmp_path, content, match):
    (tmp_path / "model.pt").write_bytes(content())
    with pytest.raises(ValueError, match=f"^the checkpoint .*{match}") as caught:
        read_torch_file(tmp_path / "model.pt", "the checkpoint")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [saved, rewritten])
def test_file_that_is_read(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content())
    weights = read_torch_file(tmp_path / "model.pt", "model.pt")["state_dict"]
    assert weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(weights[name], WEIGHTS[name]) for name in weights)


class Executes:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('trace').touch()",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_stand_ins_for_python_objects(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.SiLU())
    contents = {"weights": WEIGHTS, "module": module, "args": argparse.Namespace(bn=False), "evil": Executes()}
    torch.save(contents, "model.pt", pickle_protocol=protocol)
    found = read_torch_file("model.pt", "model.pt", stand_ins=True)
    assert all(torch.equal(found["weights"][name], WEIGHTS[name]) for name in WEIGHTS)
    assert found["args"].bn is False
    linear, activation = found["module"]._modules.values()
    assert torch.equal(linear._parameters["weight"], module[0].weight)
    assert all(isinstance(value, StandIn) for value in (found["args"], linear, activation, found["evil"]))
    assert (type(activation).__name__, type(found["evil"]).__name__) == ("SiLU", "exec")
    assert not Path("trace").exists()


@pytest.mark.parametrize("name", ["truncated", "deflated", "large pickle", "script"])
def test_stand_ins_do_not_make_broken_files_readable(tmp_path, name):
    content, match = REFUSED[name]
    (tmp_path / "model.pt").write_bytes(content())
    with pytest.raises(ValueError, match=f"^the checkpoint .*{match}"):
        read_torch_file(tmp_path / "model.pt", "the checkpoint", stand_ins=True)


def test_state_dict_may_be_all_of_the_file(tmp_path):
    for contents in (WEIGHTS, {"state_dict": WEIGHTS, "epoch": 1}):
        (tmp_path / "model.pt").write_bytes(saved(contents))
        assert read_state_dict(tmp_path / "model.pt").keys() == WEIGHTS.keys()
    for contents in ([1], {"state_dict": 3}):
        (tmp_path / "model.pt").write_bytes(saved(contents))
        with pytest.raises(ValueError, match="model.pt must hold a state dict, got"):
            read_state_dict(tmp_path / "model.pt")


MERGES = "\n".join(["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40)])
ALIASES = "\n".join(["a0: &a0 [1]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)])


@pytest.mark.parametrize(
    "text, match",
    [
        (MERGES, "is not plain YAML: it merges values by <<"),
        ("a: " + "1" * 100_000, "is too large: 100,003 bytes"),
        ("[" * 400, "is not plain YAML"),
        ("a: " + "1" * 5_000, "is not plain YAML"),
        ('a: !!int ""', "is not plain YAML"),
        ("a: !!bool x", "is not plain YAML"),
        ("a: !!timestamp x", "is not plain YAML"),
        ("a: [", "is not plain YAML: .*line 1"),
        ("version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
        ("\n", "must hold named options, got NoneType"),
    ],
)
def test_yaml_that_is_refused_at_once(tmp_path, text, match):
    (tmp_path / "config.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(ValueError, match=f"^the options {match}") as caught:
        read_yaml(tmp_path / "config.yaml", "the options")
    assert time.process_time() - start < 5
    assert str(caught.value).isprintable()


def test_aliases_name_the_same_value(tmp_path):
    (tmp_path / "config.yaml").write_text(f"{ALIASES}\nb: &b {{c: *b}}")
    options = read_yaml(tmp_path / "config.yaml", "config.yaml")
    assert options["a39"][0] is options["a39"][1] is options["a38"]
    assert options["b"]["c"] is options["b"]
    assert shown(options).startswith("{'a0': [1], 'a1': [[1], [1]], ")


def test_names_are_shown_without_control_characters_and_shortened():
    assert shown("encoder.weight") == "encoder.weight"
    assert shown("\x1b[31mred\n\u202e") == r"\x1b[31mred\n\u202e"
    assert shown("x" * 1000) == "x" * 199 + "…"
    assert shown(10**5000) == "an integer of 16610 bits"
    nested = []
    for _ in range(10_000):
        nested = [copy.copy(nested)]
    assert shown(nested) == "[[[[[[[...]]]]]]]"
    assert shown_first("abc", 3) == "a, b, c"
    assert shown_first("abcd", 3) == "a, b, c, …"
