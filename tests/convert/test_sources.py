import re
import shutil

import pytest
import torch
from original_checkpoints import (
    assert_refused,
    original_rqvae,
    pack,
    shared_rqtransformer,
    shared_rqvae,
    write_both,
    write_rqvae,
)
from tiny import same_state

from rq_hf import RQPipeline, RQVAEModel, convert_original_checkpoint

SOURCES = {
    "folder": lambda folder: {"source": folder / "church"},
    "folder above": lambda folder: {"source": str(folder)},
    "tar.gz": lambda folder: {"source": pack(folder / "church", folder / "church.tar.gz")},
    "tar": lambda folder: {"source": pack(folder / "church", folder / "church.tar")},
    "tar.xz": lambda folder: {"source": pack(folder / "church", folder / "church.tar.xz")},
    "files": lambda folder: {
        "rqvae": folder / "church" / "stage1" / "model.pt",
        "rqtransformer": str(folder / "church" / "stage2" / "model.pt"),
    },
    "stage 2 and a file": lambda folder: {
        "source": folder / "church" / "stage2",
        "rqvae": folder / "church" / "stage1" / "model.pt",
    },
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_both_stages_make_a_pipeline(tmp_path, source):
    vae, transformer = write_both(tmp_path / "church")
    pipe = convert_original_checkpoint(**source(tmp_path))
    assert type(pipe) is RQPipeline
    assert same_state(pipe.vae, vae)
    assert same_state(pipe.transformer, transformer)
    assert not pipe.vae.training
    assert not pipe.transformer.training


@pytest.mark.parametrize("source", [SOURCES["folder"], SOURCES["tar.gz"]])
def test_first_stage_alone_makes_an_rqvae(tmp_path, source):
    rqvae = write_rqvae(tmp_path / "church")
    for arguments in (source(tmp_path), {"rqvae": rqvae}):
        vae = convert_original_checkpoint(**arguments)
        assert type(vae) is RQVAEModel
        assert not vae.training
        assert same_state(vae, shared_rqvae())


def test_pt_file_may_have_another_name(tmp_path):
    write_both(tmp_path)
    (tmp_path / "stage1" / "model.pt").rename(tmp_path / "stage1" / "epoch10_model.pt")
    shutil.copy(tmp_path / "stage2" / "model.pt", tmp_path / "stage2" / "last.pt")  # model.pt is taken
    assert same_state(convert_original_checkpoint(tmp_path).transformer, shared_rqtransformer("none", ema=False))


def test_other_configurations_and_files_do_not_matter(tmp_path):
    vae, _ = write_both(tmp_path)
    (tmp_path / "gan").mkdir()
    (tmp_path / "gan" / "config.yaml").write_text("arch: {type: patchgan}")
    (tmp_path / "notes.txt").write_text("hello")
    assert same_state(convert_original_checkpoint(tmp_path).vae, vae)


def test_half_precision_becomes_single(tmp_path):
    state_dict = original_rqvae(shared_rqvae())
    rqvae = write_rqvae(tmp_path, weights={name: weight.half() for name, weight in state_dict.items()})
    vae = convert_original_checkpoint(rqvae=rqvae)
    expected = {name: weight.half().float() for name, weight in shared_rqvae().state_dict().items()}
    assert all(torch.equal(weight, expected[name]) for name, weight in vae.state_dict().items())
    assert {weight.dtype for weight in vae.state_dict().values()} == {torch.float32}


def test_paths_that_are_not_there(tmp_path):
    rqvae = write_rqvae(tmp_path / "church")
    for arguments in (
        {"source": tmp_path / "no"},
        {"source": tmp_path / "no.tar.gz"},
        {"rqvae": tmp_path / "no.pt"},
        {"rqvae": rqvae, "rqtransformer": tmp_path / "no.pt"},
    ):
        assert_refused(tmp_path, r"^no file .*/no(\.pt|\.tar\.gz)?$", FileNotFoundError, **arguments)
    (rqvae.parent / "config.yaml").unlink()
    assert_refused(tmp_path, "no file .*stage1/config.yaml", FileNotFoundError, rqvae=rqvae)
    assert_refused(tmp_path, "church has no config.yaml", source=tmp_path / "church")


def test_stages_that_are_missing_doubled_or_swapped(tmp_path):
    write_both(tmp_path / "church")
    rqvae, rqtransformer = (tmp_path / "church" / stage / "model.pt" for stage in ("stage1", "stage2"))
    assert_refused(tmp_path, "nothing to convert")
    assert_refused(tmp_path, "stage2/model.pt needs its RQ-VAE", rqtransformer=rqtransformer)
    assert_refused(tmp_path, "stage2/model.pt needs its RQ-VAE", source=rqtransformer.parent)
    assert_refused(tmp_path, "stage2/model.pt must be an rq-vae", rqvae=rqtransformer, rqtransformer=rqvae)
    assert_refused(tmp_path, "stage1/model.pt must be an rq-transformer", rqvae=rqvae, rqtransformer=rqvae)
    assert_refused(tmp_path, "has an rq-vae already", source=tmp_path / "church", rqvae=rqvae)
    assert_refused(tmp_path, "model.pt is a single stage; name it by rqvae", source=rqvae)
    write_rqvae(tmp_path / "church" / "older")
    assert_refused(tmp_path, "two checkpoints of an rq-vae", source=tmp_path / "church")


@pytest.mark.parametrize("names", [[], ["a.pt", "b.pt"]])
def test_folder_without_one_checkpoint(tmp_path, names):
    rqvae = write_rqvae(tmp_path)
    for name in names:
        shutil.copy(rqvae, rqvae.with_name(name))
    rqvae.unlink()
    assert_refused(
        tmp_path, re.escape(f"stage1 must hold one .pt file, or one called model.pt; got {names}"), source=tmp_path
    )
