import io
import os
import zipfile

import pytest
import torch
import yaml
from original_checkpoints import (
    REMOVED,
    RQVAE_CONFIG,
    assert_refused,
    original_rqvae,
    shared_rqvae,
    write,
    write_rqtransformer,
    write_rqvae,
)
from tiny import same_state

from rq_hf import convert_original_checkpoint


class Executes:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def saved(contents, **options):
    buffer = io.BytesIO()
    torch.save(contents, buffer, **options)
    return buffer.getvalue()


def pickled(code):
    """A file like those of `torch.save`, with another pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", code)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def good():
    return saved({"state_dict": original_rqvae(shared_rqvae())})


BROKEN_CHECKPOINTS = {
    "empty": (lambda: b"", "truncated or invalid PyTorch checkpoint"),
    "random": (
        lambda: torch.randint(256, (5000,), dtype=torch.uint8).numpy().tobytes(),
        "truncated or invalid PyTorch",
    ),
    "web page": (lambda: b"<!DOCTYPE html><html></html>", "truncated or invalid PyTorch checkpoint"),
    "first bytes": (lambda: good()[:100], "truncated or invalid PyTorch checkpoint"),
    "first half": (lambda: good()[: len(good()) // 2], "truncated or invalid PyTorch checkpoint"),
    "last bytes missing": (lambda: good()[:-10], "truncated or invalid PyTorch checkpoint"),
    "legacy format": (
        lambda: saved({"state_dict": {}}, _use_new_zipfile_serialization=False),
        "truncated or invalid PyTorch checkpoint",
    ),
    "whole model": (lambda: saved({"state_dict": torch.nn.Linear(2, 2)}), r"holds Python objects \(torch.nn"),
    "tensor": (lambda: saved(torch.zeros(3)), "has no state_dict; it has Tensor"),
    "list": (lambda: saved([1, 2]), "has no state_dict; it has list"),
    "bare state dict": (lambda: saved({"conv.weight": torch.zeros(3)}), "has no state_dict; it has conv.weight"),
    "numbers": (lambda: saved({"state_dict": {"conv.weight": 3}}), "has no state_dict; it has state_dict"),
    "no weights": (lambda: saved({"state_dict": {}}), "missing"),
    "broken pickle": (lambda: pickled(b"garbage"), "not a PyTorch checkpoint"),
}
BROKEN_PICKLES = {"no object": b"\x80\x02.", "no memory": b"\x80\x02h\x05.", "no storage": b"\x80\x02K\x01Q."}


def refuse_checkpoint(folder, content, match):
    (folder / "config.yaml").write_text(RQVAE_CONFIG)
    (folder / "model.pt").write_bytes(content)
    assert_refused(folder, f"model.pt.*({match})", rqvae=folder / "model.pt")


@pytest.mark.parametrize("content, match", BROKEN_CHECKPOINTS.values(), ids=BROKEN_CHECKPOINTS)
def test_broken_checkpoint(tmp_path, content, match):
    refuse_checkpoint(tmp_path, content(), match)


@pytest.mark.parametrize("code", BROKEN_PICKLES.values(), ids=BROKEN_PICKLES)
def test_malformed_pickle(tmp_path, code):
    refuse_checkpoint(tmp_path, pickled(code), "not a PyTorch checkpoint|truncated or invalid PyTorch checkpoint")


def test_checkpoint_executes_nothing(tmp_path):
    mark = tmp_path / "executed"
    content = saved({"state_dict": original_rqvae(shared_rqvae()), "hook": Executes(mark)})
    refuse_checkpoint(tmp_path, content, r"holds Python objects \(posix.system\)")
    assert not mark.exists()


def test_contents_without_a_proper_name_do_not_matter(tmp_path):
    rqvae = write(tmp_path / "stage1", yaml.safe_load(RQVAE_CONFIG), original_rqvae(shared_rqvae()))
    torch.save(torch.load(rqvae) | {10: "epoch"}, rqvae)
    assert same_state(convert_original_checkpoint(rqvae=rqvae), shared_rqvae())


BROKEN_CONFIGS = {
    "not YAML": ("arch: [", "config.yaml is not YAML"),
    "binary": ("\x00\x01", "config.yaml is not YAML"),
    "impossible": ("date: 2022-99-99", "config.yaml is not YAML"),
    "code": ("arch: !!python/object/apply:os.getcwd []", "config.yaml is not YAML"),
    "empty": ("", "config.yaml must hold named options, got NoneType"),
    "list": ("- arch", "config.yaml must hold named options, got list"),
    "something else": ("arch: {type: vq-gan}", "config.yaml"),
    "no arch": ("dataset: {type: imagenet}", "config.yaml"),
    "nothing in arch": ("arch: {type: rq-vae}", "config.yaml lacks arch.hparams"),
}


@pytest.mark.parametrize("text, match", BROKEN_CONFIGS.values(), ids=BROKEN_CONFIGS)
def test_broken_configuration(tmp_path, text, match):
    rqvae = write_rqvae(tmp_path)
    rqvae.with_name("config.yaml").write_text(text)
    assert_refused(tmp_path, match, rqvae=rqvae)
    assert_refused(tmp_path, match, source=tmp_path)


def test_endless_configuration(tmp_path):
    rqvae = write_rqvae(tmp_path)
    rqvae.with_name("config.yaml").write_text("arch: &arch {type: rq-vae, hparams: *arch}")
    assert_refused(tmp_path, "config.yaml", rqvae=rqvae)


@pytest.mark.parametrize(
    "option, value",
    [
        ("arch.hparams", None),
        ("arch.hparams.n_embed", "many"),
        ("arch.hparams.code_shape", 8),
        ("arch.hparams.code_shape", [4, 4]),
        ("arch.hparams.decay", "slow"),
        ("arch.ddconfig", [1, 2]),
        ("arch.ddconfig.ch_mult", 2),
        ("arch.ddconfig.attn_resolutions", None),
        ("arch.ddconfig.resolution", "256x256"),
        ("arch.ddconfig.ch_mult", []),
        ("arch.hparams.n_embed", []),
        ("arch.hparams.code_shape", [0, 4, 3]),
        ("arch.ddconfig.z_channels", -1),
    ],
)
def test_option_of_the_rqvae_of_the_wrong_kind(tmp_path, option, value):
    rqvae = write_rqvae(tmp_path, options={option: value})
    assert_refused(tmp_path, "stage1/model.pt: ", rqvae=rqvae)


@pytest.mark.parametrize(
    "option, value",
    [
        ("arch.body", None),
        ("arch.head", REMOVED),
        ("arch.block_size", 8),
        ("arch.block_size", ["a", "b", "c"]),
        ("arch.embed_dim", "wide"),
        ("arch.embed_dim", 18),  # not divisible by the heads
        ("arch.body.n_layer", "deep"),
        ("arch.body.block.n_head", [4]),
        ("arch.vocab_size_cond", "classes"),
        ("dataset.vocab_size", REMOVED),
        ("dataset", "imagenet"),
        ("sampling", "greedy"),
        ("arch.head.block.n_head", 0),
        ("dataset.vocab_size", -1),
        ("sampling", {"top_k": "many"}),
    ],
)
def test_option_of_the_rqtransformer_of_the_wrong_kind(tmp_path, option, value):
    rqvae, rqtransformer = write_rqvae(tmp_path), write_rqtransformer(tmp_path, options={option: value})
    assert_refused(tmp_path, "stage2/model.pt: ", rqvae=rqvae, rqtransformer=rqtransformer)


def test_errors_of_the_converter_itself_do_not_blame_the_options(tmp_path, monkeypatch):
    def broken(*args):
        raise KeyError("a name that the table of the converter lacks")

    monkeypatch.setattr("rq_hf.convert.conversion.rqvae_weights", broken)
    with pytest.raises(KeyError):
        convert_original_checkpoint(rqvae=write_rqvae(tmp_path))
