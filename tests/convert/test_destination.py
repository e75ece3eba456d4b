import json
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from original_checkpoints import (
    assert_refused,
    assert_same_pipeline,
    kinds,
    pack,
    sample,
    shared_rqtransformer,
    shared_rqvae,
    write_both,
    write_rqvae,
    write_tokenizer,
)
from tiny import same_state

from rq_hf import RQPipeline, RQTransformerModel, RQVAEModel, convert_original_checkpoint


@kinds
def test_written_pipeline_is_the_returned_one_and_draws(tmp_path, kind):
    vae, transformer = write_both(tmp_path / "church", kind)
    tokenizer = None
    if kind == "text":
        tokenizer = tmp_path / "tokenizer"
        write_tokenizer(tokenizer)
    source = pack(tmp_path / "church", tmp_path / "church.tar.gz")
    destination = tmp_path / "models" / "church"
    returned = convert_original_checkpoint(source, destination, tokenizer=tokenizer)
    assert same_state(returned.vae, vae)
    assert same_state(returned.transformer, transformer)
    assert sample(returned, kind).images.isfinite().all()
    for other in (
        RQPipeline.from_pretrained(destination),
        DiffusionPipeline.from_pretrained(destination),
        convert_original_checkpoint(source, tokenizer=tokenizer),
    ):
        assert_same_pipeline(other, returned, kind)


def test_written_rqvae_is_the_returned_one(tmp_path):
    returned = convert_original_checkpoint(rqvae=write_rqvae(tmp_path), destination=tmp_path / "vae")
    loaded = RQVAEModel.from_pretrained(tmp_path / "vae")
    assert same_state(returned, shared_rqvae())
    assert same_state(loaded, shared_rqvae())
    pixels = torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded.get_codes(pixels), shared_rqvae().get_codes(pixels))
    assert ModelCard.load(tmp_path / "vae" / "README.md").data.license_name == "cc-by-nc-sa-4.0"


@pytest.mark.parametrize("kind, task", [("class", "unconditional-image-generation"), ("text", "text-to-image")])
def test_folder_has_all_that_the_hub_wants(tmp_path, kind, task):
    write_both(tmp_path / "church", kind)
    folder = tmp_path / "model"
    convert_original_checkpoint(tmp_path / "church", folder)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "README.md",
        "model_index.json",
        "pipeline.py",
        "transformer/code_rq.py",
        "transformer/config.json",
        "transformer/generation_config.json",
        "transformer/model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "RQPipeline"
    assert index["vae"] == ["rq_hf", "RQVAEModel"]
    assert index["transformer"] == ["rq_hf", "RQTransformerModel"]
    card = ModelCard.load(folder / "README.md")
    card.data.to_dict()
    assert (card.data.license, card.data.license_name) == ("other", "cc-by-nc-sa-4.0")
    assert card.data.library_name == "rq_hf"
    assert card.data.pipeline_tag == task
    assert "no commercial use" in card.text


def test_destination_may_be_new_or_empty(tmp_path, monkeypatch):
    write_both(tmp_path / "church")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for destination in ("empty", "new/parents/model", tmp_path / "work" / "new" / "absolute"):
        convert_original_checkpoint(tmp_path / "church", destination)
        assert RQPipeline.from_pretrained(destination)
    assert {path.name for path in tmp_path.rglob("*") if path.is_dir()} == {
        *("church", "stage1", "stage2", "work", "empty", "new", "parents", "model", "absolute", "vae", "transformer")
    }


def test_destination_may_be_a_link_to_an_empty_folder(tmp_path):
    write_rqvae(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    convert_original_checkpoint(tmp_path / "stage1", tmp_path / "model")
    assert same_state(RQVAEModel.from_pretrained(tmp_path / "model"), shared_rqvae())


@pytest.mark.parametrize("content", ["a file", "a folder"])
def test_destination_with_content_is_left_alone(tmp_path, content):
    write_rqvae(tmp_path / "church")
    destination = tmp_path / "model"
    if content == "a folder":
        destination.mkdir()
    written = destination / "precious" if content == "a folder" else destination
    written.write_text("precious")
    match = "model is not empty" if content == "a folder" else "model is a file"
    with pytest.raises(FileExistsError, match=match):
        convert_original_checkpoint(tmp_path / "church", destination)
    assert written.read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"church", "model"}


def test_existing_folder_stays_the_same_folder(tmp_path):
    # It may be a mount point, which cannot be replaced, or lie in a folder that belongs to someone else.
    write_both(tmp_path / "church")
    destination = tmp_path / "model"
    (destination / "lost+found").mkdir(parents=True)  # as in a new ext4 volume
    before = destination.stat().st_ino
    convert_original_checkpoint(tmp_path / "church", destination)
    assert destination.stat().st_ino == before
    assert same_state(RQPipeline.from_pretrained(destination).vae, shared_rqvae())
    names = {"README.md", "lost+found", "model_index.json", "pipeline.py", "transformer", "vae"}
    assert {path.name for path in destination.iterdir()} == names
    assert {path.name for path in tmp_path.iterdir()} == {"church", "model"}


def test_destination_may_be_a_mount_point(tmp_path):
    write_both(tmp_path / "church")
    destination = tmp_path / "model"
    destination.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", destination], capture_output=True).returncode:
        pytest.skip("mounts are not permitted")
    try:
        convert_original_checkpoint(tmp_path / "church", destination)
        assert same_state(RQPipeline.from_pretrained(destination).vae, shared_rqvae())
    finally:
        subprocess.run(["umount", "--lazy", destination], check=True)


def test_failure_leaves_an_existing_folder_empty(tmp_path):
    write_rqvae(tmp_path / "church", options={"arch.ddconfig.dropout": 1})
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="dropout"):
        convert_original_checkpoint(tmp_path / "church", tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())


@pytest.mark.parametrize("exists", [True, False])
def test_killed_conversion_is_named_by_the_next(tmp_path, monkeypatch, exists):
    def kill(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    write_both(tmp_path / "church")
    rqvae = tmp_path / "church" / "stage1" / "model.pt"
    destination = tmp_path / "models" / "church"
    (destination if exists else destination.parent).mkdir(parents=True)
    child = os.fork()
    if not child:
        monkeypatch.setattr("rq_hf.convert.conversion.save_file", kill)  # of safetensors
        convert_original_checkpoint(tmp_path / "church", destination)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (left,) = (destination if exists else destination.parent).iterdir()
    with pytest.raises(FileExistsError, match=f"{re.escape(str(left))} belongs to another conversion .* remove it"):
        convert_original_checkpoint(tmp_path / "church", destination)
    for other in ("other", "chur"):
        convert_original_checkpoint(rqvae=rqvae, destination=destination.with_name(other))
    left.with_name(left.name.replace("church", "church-1")).mkdir(exist_ok=exists)  # of a conversion to church-1
    shutil.rmtree(left)
    convert_original_checkpoint(tmp_path / "church", destination)
    assert same_state(RQPipeline.from_pretrained(destination).vae, shared_rqvae())


def test_destination_below_a_file(tmp_path):
    write_rqvae(tmp_path / "church")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match="file is a file; name a new or empty folder"):
        convert_original_checkpoint(tmp_path / "church", tmp_path / "file" / "model")


@pytest.mark.parametrize("write", [write_rqvae, write_both])
@pytest.mark.parametrize("limit", [1_000, 100_000])
def test_full_disk_leaves_nothing_behind(tmp_path, write, limit):
    write(tmp_path / "church")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # of each file
        assert_refused(tmp_path, "(File too large|I/O error)", OSError, source=tmp_path / "church")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_unpacked_archive_is_removed_without_a_destination(tmp_path, monkeypatch):
    write_both(tmp_path / "church")
    source = pack(tmp_path / "church", tmp_path / "church.tar")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    pipe = convert_original_checkpoint(source)
    assert not list((tmp_path / "tmp").iterdir())
    assert same_state(pipe.transformer, shared_rqtransformer("none", ema=False))  # mapped from a file that is gone


def test_transformer_is_written_in_shards(tmp_path, monkeypatch):
    _, transformer = write_both(tmp_path / "church")
    monkeypatch.setattr("rq_hf.convert.conversion.MAX_SHARD_SIZE", "20KB")
    returned = convert_original_checkpoint(tmp_path / "church", tmp_path / "model")
    folder = tmp_path / "model" / "transformer"
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert all((folder / shard).stat().st_size < 25_000 for shard in shards)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["weight_map"].keys() == transformer.state_dict().keys()
    assert same_state(returned.transformer, transformer)
    assert same_state(RQTransformerModel.from_pretrained(folder), transformer)


def test_changing_the_model_does_not_change_the_checkpoint(tmp_path):
    write_both(tmp_path)
    files = sorted(tmp_path.rglob("*.pt"))
    before = [file.read_bytes() for file in files]
    pipe = convert_original_checkpoint(tmp_path)
    with torch.no_grad():
        for weight in (*pipe.vae.state_dict().values(), *pipe.transformer.state_dict().values()):
            weight.add_(1)
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("written", [False, True])
def test_the_transformer_has_a_codebook_of_its_own(tmp_path, written):
    write_both(tmp_path / "church")
    pipe = convert_original_checkpoint(tmp_path / "church", tmp_path / "model" if written else None)
    pipe.vae.quantizer.codebook.data.zero_()  # as training the RQ-VAE would
    assert same_state(pipe.transformer, shared_rqtransformer("none", ema=False))
