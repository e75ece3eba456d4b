"""Conversion of the authors' MAR checkpoints: what is inferred, what is refused, and what is written."""

import argparse
import os

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from huggingface_hub import ModelCard
from original_checkpoints import listing, run_main
from original_mar import (
    HEADS,
    MAR,
    original_autoencoder,
    original_transformer,
    training_contents,
    write_autoencoder,
    write_transformer,
)
from tiny import same_state

from rq_hf import MARPipeline, MARTransformerConfig, MARTransformerModel, convert_mar_checkpoint
from rq_hf.convert.mar_card import mar_card

SIZES = {"heads": HEADS, "patch_size": 1}


class Executes:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def changed(weights, **changes):
    """`weights` with others; a name of `None` is left out. Dots in names are written as `__`."""
    changes = {name.replace("__", "."): weight for name, weight in changes.items()}
    return {name: weight for name, weight in (weights | changes).items() if weight is not None}


def assert_refused(folder, match, *arguments, error=ValueError, **options):
    """The conversion fails with one line, and leaves no trace in `folder` or beside it."""
    before = listing(folder)
    with pytest.raises(error, match=match) as caught:
        convert_mar_checkpoint(*arguments, destination=folder / "new" / "model", **options)
    assert "\n" not in str(caught.value)
    assert listing(folder) == before


# What weights say, and what they do not


def test_sizes_are_those_of_the_weights(tmp_path):
    transformer = convert_mar_checkpoint(write_transformer(tmp_path), **SIZES)
    assert transformer.config.to_dict() == MARTransformerConfig(**MAR).to_dict()
    assert not transformer.training


def test_model_and_its_moving_average(tmp_path):
    weights = original_transformer()
    path = write_transformer(tmp_path, weights)
    average, current = (convert_mar_checkpoint(path, ema=ema, **SIZES) for ema in (True, False))
    assert torch.equal(average.mask_token, weights["mask_token"][0])
    assert not torch.equal(current.mask_token, weights["mask_token"][0])


@pytest.mark.parametrize("heads, expected", [(2, (2, 2)), ((4, 2), (4, 2)), ([2, 4], (2, 4))])
def test_heads(tmp_path, heads, expected):
    config = convert_mar_checkpoint(write_transformer(tmp_path), heads=heads, patch_size=1).config
    assert (config.encoder_config.num_attention_heads, config.decoder_config.num_attention_heads) == expected


def test_patches_and_grid(tmp_path):
    path = write_transformer(tmp_path, original_transformer(latent_shape=(4, 6, 4)))
    config = convert_mar_checkpoint(path, heads=HEADS, patch_size=2, grid_size=(4, 6)).config
    assert (config.latent_shape, config.patch_size, config.grid_size) == ((1, 8, 12), 2, (4, 6))


def test_training_checkpoints_say_more(tmp_path):
    args = {"patch_size": 2, "attn_dropout": 0, "proj_dropout": 0.2, "mask_ratio_min": 0.5, "diffusion_batch_mul": 1}
    contents = training_contents(**args, model="mar_tiny", lr=None)
    config = convert_mar_checkpoint(write_transformer(tmp_path, **contents), heads=HEADS).config
    assert (config.latent_shape, config.patch_size) == ((1, 8, 8), 2)
    for stack in (config.encoder_config, config.decoder_config):
        assert (stack.attention_dropout, stack.hidden_dropout) == (0, 0.2)
    assert (config.mask_ratio_min, config.diffusion_batch_mul) == (0.5, 1)


@pytest.mark.parametrize("option", ["patch_size", "attn_dropout", "mask_ratio_min", "diffusion_batch_mul"])
@pytest.mark.parametrize("value", [0.5 + 0.5j, "1", float("nan"), -1, 10**400, True, None, [2]])
def test_training_options_that_are_no_numbers_of_a_model(tmp_path, option, value):
    path = write_transformer(tmp_path, **training_contents(**{option: value}))
    assert_refused(tmp_path, f"checkpoint-last.pth: args.{option} must be", path, **SIZES)


@pytest.mark.parametrize(
    "changes, options, match",
    [
        (
            {},
            {"patch_size": 1},
            "how many attention heads the encoder has, which is 16 wide and 2 blocks .* give heads",
        ),
        ({}, {"heads": HEADS}, "of how many latents a token of 4 numbers is made; give patch_size, or .* as vae"),
        ({}, {"heads": 5, "patch_size": 1}, "hidden_size must be divisible by num_attention_heads, got 16 and 5"),
        ({}, {"heads": HEADS, "patch_size": 3}, "a token of 4 numbers is no patch of 3×3 latents"),
        ({"latent_shape": (4, 2, 5)}, SIZES, "10 tokens form no square; give grid_size"),
        ({}, SIZES | {"grid_size": (4, 5)}, r"grid_size must be that of 16 tokens, got \(4, 5\)"),
    ],
)
def test_what_weights_do_not_say_must_be_given(tmp_path, changes, options, match):
    assert_refused(tmp_path, match, write_transformer(tmp_path, original_transformer(**changes)), **options)


# What does not fit


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"fake_latent": None}, r"the weights do not fit the configuration: 1 missing \(fake_latent\)"),
        ({"extra__weight": torch.ones(1)}, r"1 left over \(extra.weight\)"),
        ({"mask_token": torch.ones(1, 24)}, r"mask_token: \(1, 24\) instead of \(1, 1, 24\)"),
        ({"class_emb__weight": torch.ones(5, 8)}, r"class_emb.weight: \(5, 8\) instead of \(5, 16\)"),
        ({"z_proj__weight": None}, "the weights lack z_proj.weight"),
        ({"z_proj__weight": torch.ones(16)}, r"z_proj.weight must have from 1 to .* along dimension 1, got \(16,\)"),
        ({"z_proj__weight": torch.ones(16, 0)}, r"z_proj.weight must have from 1 to .* along dimension 1"),
        ({"encoder_pos_embed_learned": torch.ones(1, 16, 16)}, "must have more than 16 rows, .* got 16"),
        ({"encoder_blocks__7__norm1__weight": torch.ones(16)}, "missing"),
        ({"z_proj__bias": torch.full((16,), float("nan"))}, "z_proj.bias has values that are NaN or infinite"),
        ({"z_proj__bias": torch.ones(16, dtype=torch.int64)}, "z_proj.bias must be a dense tensor of float"),
        ({"z_proj__bias": "no tensor"}, "z_proj.bias must be a tensor, got str"),
        ({"class_emb__weight": torch.ones(1, 16).expand(5, 16)}, "weights share memory"),
    ],
)
def test_weights_that_are_not_those_of_a_model(tmp_path, changes, match):
    path = write_transformer(tmp_path, changed(original_transformer(), **changes))
    assert_refused(tmp_path, f"checkpoint-last.pth: .*{match}", path, **SIZES)


def test_more_blocks_than_a_model_has(tmp_path):
    extra = {f"encoder_blocks.{n}.norm1.weight": torch.ones(1) for n in range(300)}
    path = write_transformer(tmp_path, original_transformer() | extra)
    assert_refused(tmp_path, "300 blocks encoder_blocks are not supported, at most 200", path, **SIZES)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"encoder__conv_in__weight": torch.ones(64, 3, 3, 3)}, "ch_mult must start with 1, .* 64 channels, then"),
        ({"encoder__conv_in__weight": None}, "the weights lack encoder.conv_in.weight"),
        ({"quant_conv__weight": None}, r"1 missing \(quant_conv.weight\)"),
        ({"loss__logvar": torch.ones(1)}, r"1 left over \(loss.logvar\)"),
        ({"decoder__conv_out__bias": torch.full((3,), float("inf"))}, "conv_out.bias has values that are NaN or inf"),
    ],
)
def test_weights_that_are_not_those_of_an_autoencoder(tmp_path, changes, match):
    path = write_autoencoder(tmp_path, changed(original_autoencoder(), **changes))
    assert_refused(tmp_path, f"kl16.ckpt: .*{match}", vae=path)


def test_files_that_do_not_fit_each_other(tmp_path):
    vae = write_autoencoder(tmp_path, original_autoencoder(latent_channels=3))
    match = "a token of 4 numbers is no patch of 1×1 latents of 3 channels, as the autoencoder has"
    assert_refused(tmp_path, match, write_transformer(tmp_path), vae=vae, heads=HEADS)


@pytest.mark.parametrize("contents", [{}, {"model": {}}, {"model_ema": [1]}, [1], torch.ones(3)])
def test_files_without_weights(tmp_path, contents):
    path = tmp_path / "checkpoint-last.pth"
    torch.save(contents, path)
    match = "checkpoint-last.pth(: model_ema must be a dictionary of tensors, got list| has no model_ema; it has)"
    assert_refused(tmp_path, match, path, **SIZES)


def test_each_file_has_its_place(tmp_path):
    vae, transformer = write_autoencoder(tmp_path), write_transformer(tmp_path)
    assert_refused(tmp_path, "kl16.ckpt has no model_ema; it has model", vae, **SIZES)
    assert_refused(tmp_path, "checkpoint-last.pth: the weights lack encoder.conv_in.weight", vae=transformer)
    assert_refused(tmp_path, "no file .*none.ckpt", vae=tmp_path / "none.ckpt", error=FileNotFoundError)
    assert_refused(tmp_path, "nothing to convert: give checkpoint or vae")


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"heads": (2, 4, 8)}, ValueError, "heads must have 2 items"),
        ({"heads": "24"}, TypeError, "heads must be a list or tuple"),
        ({"heads": (0, 4)}, ValueError, "heads must be at least 1"),
        ({"heads": True}, TypeError, "heads must be a list or tuple"),
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1"),
        ({"patch_size": (1, 1)}, TypeError, "patch_size must be an integer"),
        ({"grid_size": 4}, TypeError, "grid_size must be a list or tuple"),
        ({"layer_norm_eps": 0}, ValueError, "layer_norm_eps must be greater than 0"),
        ({"scaling_factor": float("nan")}, ValueError, "scaling_factor must be greater than 0"),
        ({"ema": "no"}, TypeError, "ema must be True or False"),
    ],
)
def test_arguments_are_checked(tmp_path, options, error, match):
    path, vae = write_transformer(tmp_path), write_autoencoder(tmp_path)
    assert_refused(tmp_path, match, path, vae=vae, error=error, **SIZES | options)


# Files of others


@pytest.mark.parametrize("place", ["args", "optimizer", "namespace"])
def test_nothing_in_a_file_is_executed(tmp_path, place):
    trace, evil = tmp_path / "trace", Executes(tmp_path / "trace")
    contents = training_contents(patch_size=1)
    if place == "namespace":
        contents["args"].model = evil
    else:
        contents[place] = evil
    path = write_transformer(tmp_path, **contents)
    assert_refused(tmp_path, "checkpoint-last.pth holds Python objects", path, **SIZES)
    assert not trace.exists()


def test_other_files_may_not_hold_a_namespace(tmp_path):
    from rq_hf.untrusted_files import read_torch_file

    torch.save({"args": argparse.Namespace(model="mar_base")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="holds Python objects"):
        read_torch_file(tmp_path / "model.pt", "model.pt")


def test_args_of_another_type(tmp_path):
    path = write_transformer(tmp_path, args={"patch_size": 2})
    assert_refused(tmp_path, "args must be an argparse.Namespace, got dict", path, heads=HEADS)


# What is written


def test_one_file_makes_one_model(tmp_path):
    path, vae = write_transformer(tmp_path), write_autoencoder(tmp_path)
    for arguments, options, cls in (
        ((path,), SIZES, MARTransformerModel),
        ((), {"vae": vae, "scaling_factor": 0.5}, AutoencoderKL),
    ):
        folder = tmp_path / cls.__name__
        saved = convert_mar_checkpoint(*arguments, destination=folder, **options)
        assert type(saved) is cls and not saved.training
        assert same_state(saved, convert_mar_checkpoint(*arguments, **options))
        assert same_state(cls.from_pretrained(folder), saved)
        assert ModelCard.load(folder / "README.md").data.license_name == "mit"
    assert saved.config.scaling_factor == 0.5


def test_both_files_make_a_pipeline(tmp_path):
    path, vae = write_transformer(tmp_path), write_autoencoder(tmp_path)
    folder = tmp_path / "model"
    saved = convert_mar_checkpoint(path, folder, vae=vae, heads=HEADS)  # the patch size is 1, by the channels
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == {
        "README.md",
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        "transformer/code_rq.py",
        "transformer/config.json",
        "transformer/model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    sampling = {"class_labels": [1, 4], "num_iterations": 2, "num_inference_steps": 2, "temperature": 0.0}
    expected = None
    for pipe in (
        saved,
        DiffusionPipeline.from_pretrained(folder),
        convert_mar_checkpoint(path, vae=vae, heads=HEADS),
    ):
        assert type(pipe) is MARPipeline
        assert same_state(pipe.transformer, saved.transformer) and same_state(pipe.vae, saved.vae)
        assert (pipe.vae.config.scaling_factor, pipe.vae.config.sample_size) == (0.2325, 8)
        pipe.set_progress_bar_config(disable=True)
        latents = pipe(**sampling, output_type="latent", generator=[1, 2]).latents
        expected = latents if expected is None else expected
        assert torch.equal(latents, expected)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license_name == "mit" and "rq_hf.MARPipeline.from_pretrained" in card.text


def test_large_transformers_are_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr("rq_hf.convert.conversion.MAX_SHARD_SIZE", 10_000)
    path = write_transformer(tmp_path)
    saved = convert_mar_checkpoint(path, tmp_path / "model", **SIZES)
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    assert same_state(saved, convert_mar_checkpoint(path, **SIZES))


@pytest.mark.parametrize("name, guidance", [("mar-base", 2.9), ("mar-large", 3.0), ("mar-huge", 3.2)])
def test_cards_of_published_sizes_quote_the_figures_of_the_authors(name, guidance):
    with torch.device("meta"):
        model = MARTransformerModel(MARTransformerConfig.from_preset(name))
    card = mar_card(model, "models/mar")
    assert f"`guidance_scale={guidance}`" in card and "not measured with this conversion" in card
    assert f"{model.num_parameters():,} parameters" in card


def test_cards_of_other_sizes_quote_none(tmp_path):
    convert_mar_checkpoint(write_transformer(tmp_path), tmp_path / "model", **SIZES)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "4×4 tokens of 4, conditioned on 5 classes in 3 slots" in card
    assert "FID" not in card and "MIT licence" in card


# Command line


def test_command_line(tmp_path, monkeypatch, capsys):
    path = write_transformer(tmp_path, **training_contents(patch_size=2))
    run_main(monkeypatch, path, tmp_path / "model", "--heads", *HEADS)
    saved = MARTransformerModel.from_pretrained(tmp_path / "model")
    assert same_state(saved, convert_mar_checkpoint(path, heads=HEADS))
    assert capsys.readouterr().out.splitlines() == [
        f"read     {path}",
        f"made     MAR transformer: {saved.num_parameters():,} parameters",
        "made     4×4 tokens of 4 (patches of 2×2 latents), conditioned on 5 classes in 3 slots",
        "made     encoder: 2 blocks of 2 heads, width 16, MLP 64",
        "made     decoder: 1 blocks of 4 heads, width 24, MLP 96",
        "made     diffusion head: 2 blocks of width 8",
        f"ignored  {path}: model, optimizer, epoch, scaler",
        f"written  {tmp_path / 'model'}",
    ]
    run_main(monkeypatch, path, tmp_path / "current", "--heads", *HEADS, "--no-ema")
    current = MARTransformerModel.from_pretrained(tmp_path / "current")
    assert same_state(current, convert_mar_checkpoint(path, heads=HEADS, ema=False))


def test_command_line_with_both_files(tmp_path, monkeypatch, capsys):
    path, vae = write_transformer(tmp_path), write_autoencoder(tmp_path)
    run_main(monkeypatch, path, tmp_path / "model", "--vae", vae, "--heads", *HEADS)
    pipe = MARPipeline.from_pretrained(tmp_path / "model")
    assert same_state(pipe.transformer, convert_mar_checkpoint(path, **SIZES))
    assert same_state(pipe.vae, convert_mar_checkpoint(vae=vae))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"read     {vae}", f"read     {path}"]
    size = sum(weight.numel() for weight in pipe.vae.parameters())
    assert f"made     KL autoencoder: {size:,} parameters; 4 channels, 1/2 of height and width" in lines[2]


def test_command_line_with_an_autoencoder_alone(tmp_path, monkeypatch):
    run_main(monkeypatch, tmp_path / "kl", "--vae", write_autoencoder(tmp_path), "--scaling-factor", 0.5)
    assert AutoencoderKL.from_pretrained(tmp_path / "kl").config.scaling_factor == 0.5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a.pth", "out", "--tokenizer", "b"], "--tokenizer is not an option of a MAR model"),
        (["out", "--vae", "a.ckpt", "--rqvae", "b.pt"], "--rqvae is not an option of a MAR model"),
        (["a.tar", "out", "--heads", "2", "4"], "--heads is not an option of an RQ model"),
        (["a.tar", "out", "--patch-size", "2"], "--patch-size is not an option of an RQ model"),
    ],
)
def test_options_of_the_other_method(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        run_main(monkeypatch, *arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
