"""Semantic IDs saved to a folder, and what is noticed on loading them."""

import json

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tiny import same_state, tiny_embedding, tiny_vectors

from rq_hf import SemanticIds
from rq_hf.files import checksum

FILES = ["config.json", "diffusion_pytorch_model.safetensors", "semantic_ids.json", "semantic_ids.parquet"]


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(0)
    return SemanticIds.encode(tiny_embedding(), [f"item {i}" for i in range(64)], tiny_vectors(64))


@pytest.fixture
def folder(ids, tmp_path):
    ids.save_pretrained(tmp_path / "new" / "ids")
    return tmp_path / "new" / "ids"


def assert_same(loaded, ids):
    assert loaded.items == ids.items and torch.equal(loaded.codes, ids.codes) and loaded.sizes == ids.sizes
    assert same_state(loaded.model, ids.model)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("items", [[f"名 {i}" for i in range(64)], [2**63 - 1, -(2**63), *range(62)]])
@pytest.mark.parametrize("method", ["keep", "suffix"])
@pytest.mark.parametrize("settings", [{}, {"variant": "small"}])
def test_ids_and_model_come_back(ids, items, method, settings, tmp_path):
    saved, _ = SemanticIds(ids.model, items, ids.codes).resolve(method)
    saved.save_pretrained(tmp_path, **settings)
    assert_same(SemanticIds.from_pretrained(tmp_path, **settings), saved)
    vectors = tiny_vectors(9)
    loaded = SemanticIds.from_pretrained(str(tmp_path), **settings)
    assert torch.equal(loaded.model.encode(vectors), ids.model.encode(vectors))


def test_the_table_is_one_of_pandas(ids, tmp_path):
    resolved, _ = ids.resolve("suffix")
    resolved.save_pretrained(tmp_path)
    table = pandas.read_parquet(tmp_path / "semantic_ids.parquet")
    assert list(table.columns) == ["item", "code_0", "code_1", "code_2", "suffix"]
    assert table["item"].tolist() == ids.items
    assert np.array_equal(table.iloc[:, 1:].to_numpy(), resolved.codes.numpy())


def test_what_is_there_is_replaced_and_other_files_stay(ids, folder):
    assert names(folder) == FILES
    (folder / "notes.txt").touch()
    other = SemanticIds(tiny_embedding(hidden_dims=(), latent_dim=None), [1, 2], torch.zeros(2, 3, dtype=torch.long))
    other.save_pretrained(folder)
    assert names(folder) == sorted([*FILES, "notes.txt"])
    assert_same(SemanticIds.from_pretrained(folder), other)


def test_an_error_leaves_what_was_there(ids, folder, monkeypatch):
    def fail(*arguments, **settings):
        raise OSError("the disk is full")

    other = SemanticIds(tiny_embedding(), ids.items, ids.codes)
    monkeypatch.setattr(pyarrow.parquet, "write_table", fail)
    with pytest.raises(OSError, match="the disk is full"):
        other.save_pretrained(folder)
    assert names(folder) == FILES
    assert_same(SemanticIds.from_pretrained(folder), ids)


def test_a_folder_without_ids(ids, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder '/no/such/folder'"):
        SemanticIds.from_pretrained("/no/such/folder")
    with pytest.raises(FileNotFoundError, match="holds no semantic IDs: it has no semantic_ids.json"):
        SemanticIds.from_pretrained(tmp_path)
    ids.save_pretrained(tmp_path / "sub")
    assert_same(SemanticIds.from_pretrained(tmp_path, subfolder="sub"), ids)
    (tmp_path / "sub" / "semantic_ids.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="holds no semantic IDs: it has no semantic_ids.parquet"):
        SemanticIds.from_pretrained(tmp_path, subfolder="sub")


@pytest.mark.parametrize("weight", ["mean", "scale", "encoder.0.weight", "encoder.2.bias", "quantizer.codebook"])
def test_weights_of_another_encoder_are_noticed(ids, folder, weight):
    other = tiny_embedding()
    other.load_state_dict(ids.model.state_dict())
    other.state_dict()[weight].view(-1)[-1] += 1e-6
    other.save_pretrained(folder)
    with pytest.raises(ValueError, match="the weights in .* are not those that its IDs are of"):
        SemanticIds.from_pretrained(folder)


def test_weights_in_another_precision_are_noticed(folder):
    with pytest.raises(ValueError, match="are not those that its IDs are of, or are in another precision"):
        SemanticIds.from_pretrained(folder, torch_dtype=torch.bfloat16)


def test_a_decoder_that_was_trained_further_is_none_of_the_ids(ids, folder):
    other = tiny_embedding()
    other.load_state_dict(ids.model.state_dict())
    other.decoder[0].bias.data += 1
    other.save_pretrained(folder)
    assert torch.equal(SemanticIds.from_pretrained(folder).codes, ids.codes)


@pytest.mark.parametrize("change", ["a bit", "half", "another table"])
def test_a_damaged_table_is_noticed(ids, folder, change):
    path = folder / "semantic_ids.parquet"
    content = bytearray(path.read_bytes())
    if change == "a bit":
        content[len(content) // 2] ^= 1
    elif change == "half":
        content = content[: len(content) // 2]
    else:
        SemanticIds(ids.model, ids.items, ids.codes.flip(0)).save_pretrained(folder.parent / "other")
        content = (folder.parent / "other" / path.name).read_bytes()
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match="semantic_ids.parquet is damaged, or is not the table that semantic_ids.json"
    ):
        SemanticIds.from_pretrained(folder)


def codes(**columns):
    return {"item": ["a", "b"], "code_0": [0, 1], "code_1": [2, 3], "code_2": [4, 5]} | columns


@pytest.mark.parametrize(
    "table, message",
    [
        ({"item": ["a", "b"], "code_0": [0, 1]}, "must have the columns item, code_0, code_1, code_2, and maybe suf"),
        ({"code_0": [0]} | codes(), "must have the columns item, .* got code_0, item, code_1, code_2"),
        (codes(more=[0, 0]), "got item, code_0, code_1, code_2, more"),
        (codes(code_1=[0.0, float("nan")]), "code_1 in .* must be int64 without gaps, got double"),
        (codes(code_1=[0, None]), "code_1 in .* must be int64 without gaps, got int64 with 1 gaps"),
        (codes(item=["a", None]), "item in .* must be int64 or string without gaps, got string with 1 gaps"),
        (codes(item=[0.5, 1.5]), "item in .* must be int64 or string without gaps, got double"),
        (codes(item=["a", "a"]), "holds no possible IDs: items must differ, got 'a' 2 times"),
        (codes(code_1=[0, 12]), r"holds no possible IDs: codes of level 2 must lie in \[0, 12\), got .* 0 to 12"),
        (codes(code_0=[0, -1]), r"holds no possible IDs: codes of level 1 must lie in \[0, 5\), got .* -1 to 0"),
        (codes(suffix=[0, 2]), r"holds no possible IDs: suffixes must lie in \[0, 2\)"),
        ({name: [] for name in codes()}, "item in .* got null"),
        (codes(), "has 2 items and levels of .5, 12, 7., but semantic_ids.json says 64"),
    ],
)
def test_foreign_tables_are_refused(folder, table, message):
    """Also if the other file names them."""
    path, description = folder / "semantic_ids.parquet", folder / "semantic_ids.json"
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    content = json.loads(description.read_text()) | {"table_sha256": checksum(path)}
    description.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        SemanticIds.from_pretrained(folder)


def test_a_file_of_another_kind_in_the_place_of_the_table(folder):
    path, description = folder / "semantic_ids.parquet", folder / "semantic_ids.json"
    path.write_text("item,code_0,code_1,code_2\n")
    description.write_text(json.dumps(json.loads(description.read_text()) | {"table_sha256": checksum(path)}))
    with pytest.raises(ValueError, match="semantic_ids.parquet is not a parquet file"):
        SemanticIds.from_pretrained(folder)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="semantic_ids.parquet is a Git LFS pointer"):
        SemanticIds.from_pretrained(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 2}, "has the format 2; this release of rq_hf reads 1"),
        ({"format_version": None}, r"semantic_ids.json must say format_version \(int\), got None"),
        ({"format_version": True}, r"semantic_ids.json must say format_version \(int\), got True"),
        ({"sizes": "5"}, r"semantic_ids.json must say sizes \(list\), got '?5"),
        ({"model_sha256": 1}, r"must say model_sha256 \(str\), got 1"),
        ({"sizes": [5, 12, 8]}, "has 64 items and levels of .5, 12, 7., but semantic_ids.json says 64 and .5, 12, 8."),
        ("[]", "semantic_ids.json must be a JSON object, got"),
        ("{", "semantic_ids.json is not valid JSON"),
        ("", "semantic_ids.json is empty; download or copy it again"),
    ],
)
def test_a_damaged_description_is_noticed(folder, change, message):
    path = folder / "semantic_ids.json"
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        SemanticIds.from_pretrained(folder)


def test_without_a_model(folder):
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match="config.json"):
        SemanticIds.from_pretrained(folder)
