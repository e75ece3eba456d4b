import inspect
import io
import math
import os
import re
import sys
import zipfile

import pytest
import torch
import yaml
from original_checkpoints import (
    RQTRANSFORMER_CONFIG,
    RQVAE_CONFIG,
    assert_refused,
    config_with,
    original_rqvae,
    shared_rqvae,
    write,
    write_rqtransformer,
    write_rqvae,
)
from tiny import same_state

from rq_hf import convert_original_checkpoint
from rq_hf.convert.configs import Section, generation_config, rqtransformer_config, rqvae_config
from rq_hf.convert.files import find_checkpoints


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
    "random": (
        lambda: torch.randint(256, (5000,), dtype=torch.uint8).numpy().tobytes(),
        "truncated or invalid PyTorch",
    ),
    "first bytes": (lambda: good()[:100], "truncated or invalid PyTorch checkpoint"),
    "first half": (lambda: good()[: len(good()) // 2], "truncated or invalid PyTorch checkpoint"),
    "last bytes missing": (lambda: good()[:-10], "truncated or invalid PyTorch checkpoint"),
    "whole model": (lambda: saved({"state_dict": torch.nn.Linear(2, 2)}), r"holds Python objects \(torch.nn"),
    "tensor": (lambda: saved(torch.zeros(3)), "has no state_dict; it has Tensor"),
    "list": (lambda: saved([1, 2]), "has no state_dict; it has list"),
    "bare state dict": (lambda: saved({"conv.weight": torch.zeros(3)}), "has no state_dict; it has conv.weight"),
    "many names": (lambda: saved(dict.fromkeys(map(str, range(99)), 0)), "has no state_dict; it has 0, .*, 9, …"),
    "nothing": (lambda: saved({}), "has no state_dict; it has nothing"),
    "state dict of a list": (
        lambda: saved({"state_dict": [1]}),
        "state_dict must be a dictionary of tensors, got list",
    ),
    "numbers": (lambda: saved({"state_dict": {"conv.weight": 3}}), "conv.weight must be a tensor, got int"),
    "None": (lambda: saved({"state_dict": {"conv.weight": None}}), "conv.weight must be a tensor, got NoneType"),
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
    "not YAML": ("arch: [", "config.yaml is not plain YAML"),
    "binary": ("\x00\x01", "config.yaml is not plain YAML"),
    "impossible": ("date: 2022-99-99", "config.yaml is not plain YAML"),
    "code": ("arch: !!python/object/apply:os.getcwd []", "config.yaml is not plain YAML"),
    "empty": ("", "config.yaml is empty"),
    "comment": ("# arch", "config.yaml must hold named options, got NoneType"),
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


def test_folder_that_is_too_deep_to_search(tmp_path):
    (tmp_path / "/".join("a" * 150)).mkdir(parents=True)
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(len(inspect.stack()) + 120)
        with pytest.raises(ValueError, match="church is nested too deeply"):
            find_checkpoints(tmp_path, "church")
    finally:
        sys.setrecursionlimit(limit)


BAD_VALUES = {
    "section": ("abc", 3, [1], True),
    "integer": ("abc", "\x1b[31m", None, [], {}, -1, 1.5, math.nan, 10**12, 10**400, 16**9999, True),
    "integers": ("abc", None, 8, {}, ["a", "b", "c"], [4, 4, -1], [4, 4, 1.5], [10**12] * 3, [4, 4, 10**6 + 1]),
    "share": ("abc", None, [1], {}, -0.1, 1, math.nan, math.inf, 10**400, 1j, True),
    "weight": ("abc", None, [], {}, -1, math.nan, math.inf, 10**400, True),
    "flag": ("true", None, 1, [], {}),
    "temp": ("abc", {}, 0, -1, math.nan, math.inf, True, [1, 1], [1, 1, "abc"]),
    "top_k": ("abc", {}, 0, -1, 1.5, True, [8, 8], [8, 8, None]),
    "top_p": ("abc", {}, 0, 1.1, math.nan, True, [1.0, 1.0], [1.0, 1.0, 2]),
}
RQVAE_OPTIONS = {
    "arch": "section",
    "arch.hparams": "section",
    "arch.hparams.latent_shape": "integers",
    "arch.hparams.code_shape": "integers",
    "arch.hparams.embed_dim": "integer",
    "arch.hparams.n_embed": "integer",
    "arch.hparams.decay": "share",
    "arch.hparams.shared_codebook": "flag",
    "arch.hparams.restart_unused_codes": "flag",
    "arch.ddconfig": "section",
    "arch.ddconfig.in_channels": "integer",
    "arch.ddconfig.out_ch": "integer",
    "arch.ddconfig.ch": "integer",
    "arch.ddconfig.ch_mult": "integers",
    "arch.ddconfig.num_res_blocks": "integer",
    "arch.ddconfig.attn_resolutions": "integers",
    "arch.ddconfig.resolution": "integer",
    "arch.ddconfig.z_channels": "integer",
    "arch.ddconfig.dropout": "share",
}
RQTRANSFORMER_OPTIONS = {
    "arch": "section",
    "arch.block_size": "integers",
    "arch.vocab_size": "integer",
    "arch.vocab_size_cond": "integer",
    "arch.block_size_cond": "integer",
    "arch.embed_dim": "integer",
    "arch.input_embed_dim": "integer",
    "arch.shared_cls_emb": "flag",
    "arch.cumsum_depth_ctx": "flag",
    "arch.input_emb_vqvae": "flag",
    "arch.head_emb_vqvae": "flag",
    "arch.embd_pdrop": "share",
    "arch.body": "section",
    "arch.body.n_layer": "integer",
    "arch.head.block": "section",
    "arch.head.block.n_head": "integer",
    "arch.body.block.attn_bias": "flag",
    "arch.body.block.mlp_bias": "flag",
    "arch.head.block.attn_pdrop": "share",
    "arch.head.block.resid_pdrop": "share",
    "loss": "section",
    "loss.txt_weight": "weight",
    "loss.img_weight": "weight",
    "sampling": "section",
    "sampling.temp": "temp",
    "sampling.top_k": "top_k",
    "sampling.top_p": "top_p",
}


@pytest.mark.parametrize(
    "text, option, kind",
    [(RQVAE_CONFIG, *item) for item in RQVAE_OPTIONS.items()]
    + [(RQTRANSFORMER_CONFIG, *item) for item in RQTRANSFORMER_OPTIONS.items()],
)
def test_bad_option_is_named(text, option, kind):
    for value in BAD_VALUES[kind]:
        config = Section(config_with(text, {option: value}))
        with pytest.raises(ValueError, match=f"^{re.escape(option)}: .* is not supported: ") as caught:
            if text == RQVAE_CONFIG:
                rqvae_config(config)
            else:
                rqtransformer_config(config, shared_codebook=True)
                generation_config(config)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "option, value",
    [
        ("arch.hparams.code_shape", [1, 1, 3]),  # codewords of 6 million numbers
        ("arch.hparams.code_shape", [4, 4, 201]),
        ("arch.hparams.n_embed", []),
        ("arch.ddconfig.ch", 33),
        ("arch.ddconfig.ch", 320_000),
        ("arch.ddconfig.ch_mult", []),
        ("arch.ddconfig.resolution", 2),
    ],
)
def test_sizes_that_no_rqvae_has(option, value):
    sizes = {"arch.hparams.latent_shape": [1000, 1000, 6], "arch.hparams.code_shape": [1000, 1000, 3]}
    config = config_with(RQVAE_CONFIG, {"arch.ddconfig.ch_mult": [1, 1, 4]} | sizes | {option: value})
    with pytest.raises(ValueError, match=f"^{option}: "):
        rqvae_config(Section(config))


@pytest.mark.parametrize(
    "option, value",
    [("arch.body.block.n_head", 3), ("arch.body.block.embed_dim", 18), ("loss", {"txt_weight": 0, "img_weight": 0})],
)
def test_options_of_the_rqtransformer_that_contradict(option, value):
    with pytest.raises(ValueError, match=f"^{option}"):
        rqtransformer_config(Section(config_with(RQTRANSFORMER_CONFIG, {option: value})), shared_codebook=True)


def test_bad_options_are_named_with_their_file(tmp_path):
    rqvae = write_rqvae(tmp_path, options={"arch.ddconfig.dropout": "abc"})
    assert_refused(tmp_path, "stage1/model.pt: arch.ddconfig.dropout: abc is not supported", rqvae=rqvae)
    rqtransformer = write_rqtransformer(tmp_path, options={"arch.head.n_layer": 10**12})
    match = "stage2/model.pt: arch.head.n_layer: 1000000000000 is not supported: it must be an integer from 0 to 200"
    assert_refused(tmp_path, match, rqvae=write_rqvae(tmp_path), rqtransformer=rqtransformer)


def test_largest_sizes_are_refused_by_the_weights(tmp_path):
    sizes = {"arch.hparams.n_embed": 10**6, "arch.ddconfig.ch": 999_968, "arch.ddconfig.z_channels": 10**6}
    rqvae = write_rqvae(tmp_path / "large", options=sizes)
    assert_refused(tmp_path, "the weights do not fit the configuration", rqvae=rqvae)
    options = dict.fromkeys(
        ("embed_dim", "input_embed_dim", "vocab_size", "vocab_size_cond", "block_size_cond"), 10**6
    )
    options |= {"block_size": [10**6, 10**6, 3], "shared_cls_emb": False}
    rqtransformer = write_rqtransformer(tmp_path, options={f"arch.{name}": options[name] for name in options})
    match = "stage2/model.pt: the weights do not fit the configuration"
    assert_refused(tmp_path, match, rqvae=write_rqvae(tmp_path), rqtransformer=rqtransformer)


def test_options_by_a_thousand_million_aliases():
    options = {}
    for _ in range(30):
        options = {"a": options, "b": options}
    config = Section(config_with(RQVAE_CONFIG, {"arch.hparams.bottleneck_type": options, "other": options}))
    with pytest.raises(ValueError, match="^arch.hparams.bottleneck_type: {'a': "):
        rqvae_config(config)
    assert "other" in list(config.unread())


def test_errors_of_the_converter_itself_do_not_blame_the_options(tmp_path, monkeypatch):
    def broken(*args):
        raise KeyError("a name that the table of the converter lacks")

    monkeypatch.setattr("rq_hf.convert.conversion.rqvae_weights", broken)
    with pytest.raises(KeyError):
        convert_original_checkpoint(rqvae=write_rqvae(tmp_path))
