import pytest
import torch
from tiny import tiny_pipeline, tiny_vae

from rq_hf.files import atomic_file, atomic_folder, checksum, weight_checksums


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_complete(tmp_path):
    destination = tmp_path / "new" / "model"
    with atomic_folder(destination) as folder:
        (folder / "weights").write_text("1")
        assert not destination.exists()
    assert (destination / "weights").read_text() == "1"
    assert names(destination.parent) == ["model"]


def test_the_folder_before_stays_beside_it(tmp_path):
    for text in ("first", "second", "third"):
        with atomic_folder(tmp_path / "model") as folder:
            (folder / text).touch()
    assert names(tmp_path) == ["model", "previous-model"]
    assert names(tmp_path / "model") == ["third"]
    assert names(tmp_path / "previous-model") == ["second"]


def test_an_error_leaves_the_folder_before_and_nothing_else(tmp_path):
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "complete").touch()
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model") as folder:
        (folder / "incomplete").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["complete"]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    (tmp_path / "unfinished-model").mkdir()
    (tmp_path / "unfinished-model" / "half").touch()
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "complete").touch()
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["complete"]


def test_a_file_appears_when_it_is_complete_and_replaces_the_one_before(tmp_path):
    for text in ("first", "second"):
        with atomic_file(tmp_path / "new" / "report.json") as path:
            path.write_text(text)
            assert path.suffix == ".json"
    assert (tmp_path / "new" / "report.json").read_text() == "second"
    assert names(tmp_path / "new") == ["report.json"]


def test_an_error_leaves_the_file_before_and_nothing_else(tmp_path):
    (tmp_path / "report.json").write_text("complete")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "report.json") as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "report.json").read_text() == "complete"
    assert names(tmp_path) == ["report.json"]


def test_checksum_is_the_sha256_of_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert checksum(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_weight_checksums_follow_the_files(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / "evaluation" / "shards").mkdir(parents=True)
    (tmp_path / "evaluation" / "shards" / "00000.safetensors").touch()  # no weights of the model
    hashes = weight_checksums(tmp_path)
    assert set(hashes) == {"transformer/model.safetensors", "vae/diffusion_pytorch_model.safetensors"}
    torch.manual_seed(1)
    tiny_vae().save_pretrained(tmp_path / "vae")
    others = weight_checksums(tmp_path)
    assert [name for name in hashes if hashes[name] != others[name]] == ["vae/diffusion_pytorch_model.safetensors"]


def test_weight_checksums_refuse_a_folder_without_any(tmp_path):
    with pytest.raises(ValueError, match="holds no weights"):
        weight_checksums(tmp_path)
