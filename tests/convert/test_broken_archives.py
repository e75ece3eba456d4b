import gzip
import io
import tarfile

import pytest
from original_checkpoints import assert_refused, pack, shared_rqvae, write_both, write_rqvae
from tiny import same_state

from rq_hf import convert_original_checkpoint


@pytest.mark.parametrize("length", [1, 100, 5000, 0.5, 0.9, 0.99])
def test_truncated_archive(tmp_path, length):
    write_both(tmp_path / "church")
    archive = pack(tmp_path / "church", tmp_path / "church.tar.gz")
    content = archive.read_bytes()
    archive.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    assert_refused(tmp_path, "church.tar.gz is a truncated or invalid tar archive", source=archive)


@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_archive_truncated_between_the_stages(tmp_path, compress, offset):
    write_both(tmp_path / "church")
    archive = pack(tmp_path / "church", tmp_path / "church.tar")
    with tarfile.open(archive) as tar:
        stage2 = tar.getmember("church/stage2").offset
    archive.write_bytes(compress(archive.read_bytes()[: stage2 + offset]))
    assert_refused(tmp_path, "church.tar is a truncated or invalid tar archive", source=archive)


def test_damaged_archive(tmp_path):
    write_both(tmp_path / "church")
    archive = pack(tmp_path / "church", tmp_path / "church.tar.gz")
    content = bytearray(archive.read_bytes())
    content[-8] ^= 1  # of the checksum, as if it were the contents
    archive.write_bytes(content)
    assert_refused(tmp_path, "church.tar.gz is a truncated or invalid tar archive", source=archive)


@pytest.mark.parametrize("content", [b"hello" * 1000, b"PK\x03\x04" + bytes(5000), bytes(range(256)) * 20])
def test_something_else_than_an_archive(tmp_path, content):
    (tmp_path / "church.tar.gz").write_bytes(content)
    assert_refused(tmp_path, "church.tar.gz is a truncated or invalid tar archive", source=tmp_path / "church.tar.gz")


@pytest.mark.parametrize(
    "content, match",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "is a web page"),
    ],
)
def test_what_is_there_instead_of_an_archive(tmp_path, content, match):
    (tmp_path / "church.tar.gz").write_bytes(content)
    assert_refused(tmp_path, f"church.tar.gz {match}", source=tmp_path / "church.tar.gz")


def test_archive_without_checkpoints(tmp_path):
    (tmp_path / "church").mkdir()
    archive = pack(tmp_path / "church", tmp_path / "church.tar.gz")
    assert_refused(tmp_path, "church.tar.gz has no config.yaml of an RQ-VAE", source=archive)


def member(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "evil",
    [
        member("../evil.txt"),
        member("../../evil.pt"),
        member("../../../evil.pt"),
        member("church/../../../evil/config.yaml"),
        member("church/stage2", tarfile.SYMTYPE, "/etc"),
        member("church/stage2/model.pt", tarfile.SYMTYPE, "../../../../evil.pt"),
        member("church/stage2/model.pt", tarfile.LNKTYPE, "/etc/passwd"),
        member("church/stage2/model.pt", tarfile.FIFOTYPE),
    ],
    ids=lambda evil: f"{evil.name} {evil.linkname}",
)
def test_archive_that_reaches_outside(tmp_path, evil):
    work = tmp_path / "a" / "b"
    write_rqvae(work / "church")
    archive = pack(work / "church", work / "church.tar")
    with tarfile.open(archive, "a") as tar:
        tar.addfile(evil, io.BytesIO())
    assert_refused(work, "church.tar is refused", source=archive)
    assert not list(tmp_path.rglob("evil*"))


def test_archive_with_absolute_names_stays_inside(tmp_path):
    write_rqvae(tmp_path / "church")
    outside = tmp_path / "outside"
    with tarfile.open(tmp_path / "church.tar", "w") as tar:
        for path in sorted((tmp_path / "church" / "stage1").iterdir()):
            info = tar.gettarinfo(path)
            info.name = str(outside / path.name)
            tar.addfile(info, path.open("rb"))
    assert same_state(convert_original_checkpoint(tmp_path / "church.tar"), shared_rqvae())
    assert not outside.exists()


def test_archive_of_too_many_folders(tmp_path):
    # Python cannot search a folder that is so deep, and cannot remove it.
    config = b"arch: {type: rq-vae}"
    with tarfile.open(tmp_path / "church.tar", "w") as tar:
        info = member("a/" * 2000 + "config.yaml")
        info.size = len(config)
        tar.addfile(info, io.BytesIO(config))
    assert_refused(tmp_path, r"church.tar is .* a/a/.* lies in more than 20 folders", source=tmp_path / "church.tar")


def test_archive_larger_than_the_disk(tmp_path):
    info = member("church/model.pt")
    info.size = 2**60
    (tmp_path / "church.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    match = "church/model.pt unpacks to 1,152,921,504,606,846,976 bytes, but the disk has"
    assert_refused(tmp_path, match, OSError, source=tmp_path / "church.tar")
