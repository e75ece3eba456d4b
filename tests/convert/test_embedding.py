"""Conversion of models of semantic IDs: the same codes and vectors, what is recognised, what is refused, and what is
written."""

import argparse
import json
import os
import re

import pytest
import torch
from huggingface_hub import ModelCard
from original_checkpoints import listing, run_main
from original_embeddings import LCRec, ResKMeans, RQVAERecommender
from safetensors.torch import save_file
from tiny import same_state
from torch import nn

from rq_hf import RQEmbeddingModel, convert_embedding_checkpoint
from rq_hf.convert.embedding import is_embedding_checkpoint

SILU = {"activation": "silu"}
ORIGINALS = {  # class, its arguments, and options of the converter
    "residual k-means": (ResKMeans, {}, {}),
    "residual k-means of one level": (ResKMeans, {"sizes": (5,)}, {}),
    "LC-Rec": (LCRec, {}, {}),
    "LC-Rec, one hidden layer": (LCRec, {"sizes": (8, 8), "widths": (20, 16, 6)}, {}),
    "LC-Rec, batch normalisation": (LCRec, {"batch_norm": True}, {}),
    "LETTER, batch normalisation": (LCRec, {"batch_norm": True, "last_batch_norm": True}, {}),
    "RQ-VAE-Recommender, SiLU": (RQVAERecommender, {}, SILU),
    "RQ-VAE-Recommender, ReLU": (RQVAERecommender, {"activation": nn.ReLU}, {"activation": "relu"}),
    "RQ-VAE-Recommender, biases": (RQVAERecommender, {"bias": True}, SILU),
    "RQ-VAE-Recommender, SimVQ": (RQVAERecommender, {"sim_vq": True}, SILU),
    "RQ-VAE-Recommender, unit length": (
        RQVAERecommender,
        {"codebook_normalize": True, "sim_vq": True},
        SILU | {"codebook_normalize": True},
    ),
}


class Executes:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def random_original(cls, **arguments):
    torch.manual_seed(0)
    return cls(**arguments).eval()


def random_vectors(count=400):
    return torch.randn(count, 20, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(model, original):
    """Equal codes, and vectors that differ by the rounding of float32 alone."""
    vectors = random_vectors()
    codes = original.codes(vectors)
    assert torch.equal(model.encode(vectors), codes)
    assert all(len(level.unique()) > 1 for level in codes.T)
    expected = original.reconstruct(codes)
    assert (model.decode(codes) - expected).abs().max() <= 1e-6 * expected.abs().max()


def training_contents(original, **changes):
    """What RQ-VAE-Recommender saves in training: its model as a Python object among the rest."""
    contents = {
        "iter": 9,
        "model": original.state_dict(),
        "model_config": original.config,
        "optimizer": torch.optim.AdamW(original.parameters()).state_dict(),
    }
    return contents | changes


def changed(weights, **changes):
    """`weights` with others; a name of `None` is left out. Dots in names are written as `__`."""
    changes = {name.replace("__", "."): weight for name, weight in changes.items()}
    return {name: weight for name, weight in (weights | changes).items() if weight is not None}


def assert_refused(folder, match, checkpoint, error=ValueError, **options):
    """The conversion fails with one line, and leaves no trace in `folder`."""
    before = listing(folder)
    with pytest.raises(error, match=match) as caught:
        convert_embedding_checkpoint(checkpoint, folder / "new" / "model", **options)
    assert "\n" not in str(caught.value)
    assert listing(folder) == before


# What a model computes


@pytest.mark.parametrize("cls, arguments, options", ORIGINALS.values(), ids=ORIGINALS)
def test_codes_and_vectors_are_those_of_the_original(cls, arguments, options):
    original = random_original(cls, **arguments)
    model = convert_embedding_checkpoint(original.state_dict(), **options)
    assert type(model) is RQEmbeddingModel and not model.training
    assert_same(model, original)


@pytest.mark.parametrize(
    "cls, arguments, expected",
    [
        (ResKMeans, {}, {"hidden_dims": [], "latent_dim": 20, "codebook_size": [12, 9, 12]}),
        (ResKMeans, {"sizes": (8, 8)}, {"codebook_size": 8, "depth": 2}),
        (LCRec, {}, {"hidden_dims": [16, 12], "latent_dim": 6, "codebook_size": [12, 9, 12], "activation": "relu"}),
        (RQVAERecommender, {}, {"hidden_dims": [16, 12], "latent_dim": 6, "codebook_size": 12, "activation": "silu"}),
    ],
)
def test_sizes_are_those_of_the_weights(cls, arguments, expected):
    options = SILU if cls is RQVAERecommender else {}
    config = convert_embedding_checkpoint(random_original(cls, **arguments).state_dict(), **options).config
    expected = {"input_dim": 20, "depth": 3} | expected
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    assert {name: found[name] for name in expected} == expected


def test_half_precision_becomes_single():
    weights = {name: weight.half() for name, weight in random_original(LCRec).state_dict().items()}
    model = convert_embedding_checkpoint(weights)
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.state_dict()["encoder.0.weight"], weights["encoder.mlp_layers.1.weight"].float())


def test_further_training_keeps_codewords_that_it_does_not_use():
    model = convert_embedding_checkpoint(random_original(LCRec).state_dict()).train()
    before = model.quantizer.codebook.clone()
    codes = model(random_vectors(2)).codes
    unused = torch.ones(12, dtype=torch.bool)
    unused[codes[:, 0]] = False
    torch.testing.assert_close(model.quantizer.codebook[0, unused], before[0, unused], rtol=1e-4, atol=1e-4)
    assert not torch.equal(model.quantizer.codebook[0, ~unused], before[0, ~unused])


# Files


def test_checkpoints_of_training_scripts(tmp_path):
    original = random_original(LCRec)
    contents = {"args": argparse.Namespace(bn=False, layers=[16, 12]), "epoch": 1, "state_dict": original.state_dict()}
    torch.save(contents, tmp_path / "best_collision_model.pth", pickle_protocol=4)
    assert_same(convert_embedding_checkpoint(tmp_path / "best_collision_model.pth"), original)


@pytest.mark.parametrize("arguments", [{}, {"activation": nn.ReLU}, {"codebook_normalize": True}])
def test_training_checkpoints_say_what_weights_do_not(tmp_path, arguments):
    original = random_original(RQVAERecommender, **arguments)
    torch.save(training_contents(original), tmp_path / "checkpoint_9.pt")
    model = convert_embedding_checkpoint(str(tmp_path / "checkpoint_9.pt"))
    assert_same(model, original)
    assert model.config.activation == ("relu" if "activation" in arguments else "silu")


def test_weights_from_the_hub_lie_beside_a_configuration(tmp_path):
    original = random_original(RQVAERecommender, codebook_normalize=True)
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    config = {name: value for name, value in original.config.items() if not name.endswith(("self", "__"))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(convert_embedding_checkpoint(tmp_path / "model.safetensors", **SILU), original)
    match = "codebook_normalize must be True, as the checkpoint says, got False"
    assert_refused(tmp_path, match, tmp_path / "model.safetensors", **SILU, codebook_normalize=False)
    (tmp_path / "config.json").write_text("{")
    assert_refused(tmp_path, "config.json is not JSON", tmp_path / "model.safetensors", **SILU)


def test_other_places_and_names_of_the_weights(tmp_path):
    original = random_original(ResKMeans)
    weights = original.state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "model.pt")
    for checkpoint in (
        tmp_path / "model.safetensors",
        tmp_path / "model.pt",
        {"model": weights},
        {"state_dict": weights, "epoch": 3},
        {f"module.{name}": weight for name, weight in weights.items()},
        dict(original.named_parameters()),
    ):
        assert_same(convert_embedding_checkpoint(checkpoint), original)


def test_nothing_in_a_file_is_executed(tmp_path):
    original = random_original(RQVAERecommender)
    trace = tmp_path / "trace"
    torch.save(training_contents(original, optimizer=Executes(trace)), tmp_path / "checkpoint.pt")
    assert_same(convert_embedding_checkpoint(tmp_path / "checkpoint.pt"), original)
    original.config["self"] = Executes(trace)
    torch.save(training_contents(original), tmp_path / "checkpoint.pt")
    assert_refused(tmp_path, "checkpoint.pt: the weights do not say their activation", tmp_path / "checkpoint.pt")
    assert not trace.exists()


def test_files_that_are_not_whole(tmp_path):
    save_file(random_original(ResKMeans).state_dict(), tmp_path / "model.safetensors")
    torch.save(random_original(ResKMeans).state_dict(), tmp_path / "model.pt")
    for path in (tmp_path / "model.safetensors", tmp_path / "model.pt"):
        path.write_bytes(path.read_bytes()[:-500])
        assert_refused(tmp_path, f"{path.name} is a truncated or invalid", path)
        path.write_bytes(b"")
        assert_refused(tmp_path, f"{path.name} is empty", path)
    assert_refused(tmp_path, "no file .*none.pt", tmp_path / "none.pt", error=FileNotFoundError)
    assert_refused(tmp_path, "no file", tmp_path, error=FileNotFoundError)


# What is refused


LC_REC = {
    "missing": ({"rq__vq_layers__0__embedding__weight": None}, "no weights of a semantic-ID model that is known, but"),
    "no encoder": ({"encoder__mlp_layers__1__weight": None}, "the weights lack encoder.mlp_layers.1.weight"),
    "no bias": ({"decoder__mlp_layers__4__bias": None}, "the weights lack decoder.mlp_layers.4.bias"),
    "a level is left out": (
        {"rq__vq_layers__1__embedding__weight": None},
        r"1 weights are left over \(rq.vq_layers.2.embedding.weight\)",
    ),
    "a layer is left out": (
        {"decoder__mlp_layers__4__weight": None, "decoder__mlp_layers__4__bias": None},
        r"2 weights are left over \(decoder.mlp_layers.7.weight, decoder.mlp_layers.7.bias\)",
    ),
    "extra": ({"cf__weight": torch.ones(1)}, r"1 weights are left over \(cf.weight\)"),
    "another bias": (
        {"encoder__mlp_layers__4__bias": torch.ones(3)},
        r"encoder.mlp_layers.4.bias must have the shape \(12,\), got \(3,\)",
    ),
    "another width": (
        {"encoder__mlp_layers__4__weight": torch.ones(12, 15)},
        r"encoder.mlp_layers.4.weight must have the shape \(out, 16\), got \(12, 15\)",
    ),
    "another codebook": (
        {"rq__vq_layers__2__embedding__weight": torch.ones(9, 7)},
        r"rq.vq_layers.2.embedding.weight must have the shape \(K, 6\), got \(9, 7\)",
    ),
    "empty": (
        {"rq__vq_layers__2__embedding__weight": torch.ones(0, 6)},
        r"rq.vq_layers.2.embedding.weight must have the shape \(K, 6\), not empty",
    ),
    "another decoder": (
        {"decoder__mlp_layers__7__weight": torch.ones(9, 16), "decoder__mlp_layers__7__bias": torch.ones(9)},
        r"the decoder must mirror the encoder, which has the widths \[20, 16, 12, 6\]; it has \[6, 12, 16, 9\]",
    ),
    "integers": (
        {"encoder__mlp_layers__1__bias": torch.ones(16, dtype=torch.int64)},
        "encoder.mlp_layers.1.bias must be a dense tensor of float",
    ),
    "no tensor": ({"encoder__mlp_layers__1__bias": "text"}, "encoder.mlp_layers.1.bias must be a tensor, got str"),
    "NaN": (
        {"encoder__mlp_layers__1__bias": torch.full((16,), float("nan"))},
        "encoder.mlp_layers.1.bias has values that are NaN or infinite",
    ),
    "shared memory": (
        {"rq__vq_layers__2__embedding__weight": torch.ones(1).expand(2**40, 6)},
        "weights share memory",
    ),
    "a residual encoder": (
        {"encoder__mlp__mlp_layers__1__weight": torch.ones(16, 20)},
        r"encoders that add their input to their output \(RQ-KMeans\+ of MiniOneRec\) are not supported",
    ),
}


@pytest.mark.parametrize("changes, match", LC_REC.values(), ids=LC_REC)
def test_weights_that_are_not_those_of_a_model(tmp_path, changes, match):
    weights = changed(random_original(LCRec).state_dict(), **changes)
    assert_refused(tmp_path, f"the checkpoint: .*{match}", weights)


def test_weights_of_other_models(tmp_path):
    one_layer = random_original(LCRec, widths=(20, 6)).state_dict()
    assert_refused(tmp_path, "an encoder of one linear layer is not supported", one_layer)
    weights = random_original(LCRec, batch_norm=True).state_dict()
    weights["encoder.mlp_layers.2.running_var"].fill_(-1)
    assert_refused(tmp_path, "encoder.0.weight must be finite", weights)
    weights = random_original(RQVAERecommender, sim_vq=True).state_dict()
    weights["layers.1.out_proj.0.weight"] = torch.ones(6, 5)
    assert_refused(tmp_path, r"layers.1.out_proj.0.weight must have the shape \(6, 6\)", weights, **SILU)
    centroids = {"centroids.0": torch.ones(4, 3), "centroids.1": torch.ones(4, 2)}
    assert_refused(tmp_path, r"centroids.1 must have the shape \(K, 3\), got \(4, 2\)", centroids)
    for contents in ({}, {"model": {}}, {"state_dict": {"weight": torch.ones(1)}}):
        assert_refused(tmp_path, "it has no weights of a semantic-ID model that is known", contents)
    assert_refused(tmp_path, "weights must have names, got 1", {1: torch.ones(1)})
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    assert_refused(tmp_path, "model.pt: it must be a state dict or hold one, got Linear", tmp_path / "model.pt")


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({}, ValueError, "the weights do not say their activation; give activation: silu until .*, or relu"),
        ({"activation": "gelu"}, ValueError, "activation must be one of"),
        ({"activation": "silu", "codebook_normalize": 1}, TypeError, "codebook_normalize must be True or False"),
    ],
)
def test_what_weights_do_not_say_must_be_given(tmp_path, options, error, match):
    assert_refused(tmp_path, match, random_original(RQVAERecommender).state_dict(), error=error, **options)


@pytest.mark.parametrize("options", [SILU, {"codebook_normalize": False}])
def test_options_of_other_models(tmp_path, options):
    match = f"{next(iter(options))} is not an option of LC-Rec or LETTER or MiniOneRec"
    assert_refused(tmp_path, match, random_original(LCRec).state_dict(), **options)


@pytest.mark.parametrize(
    "arguments, options, match",
    [
        ({}, {"activation": "relu"}, "activation must be silu, as the checkpoint says, got relu"),
        ({}, {"codebook_normalize": True}, "codebook_normalize must be False, as the checkpoint says, got True"),
        ({"activation": nn.GELU}, {}, r"activations other than one of \['ReLU', 'SiLU'\] are not supported, .*GELU"),
        ({"n_cat_features": 18}, {}, "n_cat_features must be 0, got 18: it decodes to categories"),
        ({"n_cat_features": "none"}, {}, "n_cat_features must be 0, got none"),
        ({"codebook_normalize": 1}, {}, "codebook_normalize must be True or False, got 1"),
    ],
)
def test_what_training_checkpoints_say(tmp_path, arguments, options, match):
    torch.save(training_contents(random_original(RQVAERecommender, **arguments)), tmp_path / "checkpoint_9.pt")
    assert_refused(tmp_path, f"checkpoint_9.pt: .*{match}", tmp_path / "checkpoint_9.pt", **options)


# What is written


def test_a_folder_with_a_card(tmp_path):
    original = random_original(LCRec, batch_norm=True)
    saved = convert_embedding_checkpoint(original.state_dict(), tmp_path / "models" / "ids")
    assert_same(saved, original)
    assert same_state(RQEmbeddingModel.from_pretrained(tmp_path / "models" / "ids"), saved)
    card = ModelCard.load(tmp_path / "models" / "ids" / "README.md")
    assert card.data.license == "unknown" and "semantic-ids" in card.data.tags
    for text in ("https://github.com/zhengbw0324/LC-Rec", "20 → 16 → 12 → 6", "12, 9, 12", "is that of their authors"):
        assert text in card.text


def test_command_line_recognises_the_weights(tmp_path, monkeypatch, capsys):
    k_means, lc_rec, recommender = map(random_original, (ResKMeans, LCRec, RQVAERecommender))
    torch.save(k_means.state_dict(), tmp_path / "model.pt")
    torch.save({"state_dict": lc_rec.state_dict(), "epoch": 1}, tmp_path / "model.pth", pickle_protocol=4)
    save_file(recommender.state_dict(), tmp_path / "model.safetensors")
    for name, original, options in (
        ("model.pt", k_means, ()),
        ("model.pth", lc_rec, ()),
        ("model.safetensors", recommender, ("--activation", "silu")),
    ):
        run_main(monkeypatch, tmp_path / name, tmp_path / "ids" / name, *options)
        assert_same(RQEmbeddingModel.from_pretrained(tmp_path / "ids" / name), original)
    lines = capsys.readouterr().out.splitlines()
    assert f"ignored  {tmp_path / 'model.pth'}: epoch" in lines
    assert "made     codebooks of 12, 12, 12 codewords of 6" in lines
    assert "made     encoder: 20 → 16 → 12 → 6, silu" in lines


@pytest.mark.parametrize(
    "name, options, match",
    [
        ("ids.pth", ("--ema",), "--ema is not an option of a semantic-ID model"),
        ("ids.pth", ("--vae", "kl16.ckpt"), "--vae is not an option of a semantic-ID model"),
        ("mar.pth", ("--activation", "silu"), "--activation is not an option of a MAR model"),
        ("rq.tar", ("--no-codebook-normalize",), "--codebook-normalize is not an option of an RQ model"),
    ],
)
def test_command_line_options_of_other_models(tmp_path, monkeypatch, capsys, name, options, match):
    monkeypatch.chdir(tmp_path)
    torch.save(random_original(LCRec).state_dict(), "ids.pth")
    with pytest.raises(SystemExit) as exit:
        run_main(monkeypatch, name, "out", *options)
    assert exit.value.code == 2
    assert re.search(match, capsys.readouterr().err)


def test_other_files_are_not_recognised(tmp_path):
    torch.save({"model": {"mask_token": torch.ones(1)}}, tmp_path / "mar.pth")
    (tmp_path / "text.pt").write_text("centroids.0")
    for name in ("mar.pth", "text.pt"):
        assert not is_embedding_checkpoint(tmp_path / name)
