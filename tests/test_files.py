import pytest

from rq_hf.files import atomic_folder


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
