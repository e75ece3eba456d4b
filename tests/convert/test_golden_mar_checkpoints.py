"""Equality with the authors' implementation of what the converter makes of their MAR checkpoints; see
`golden_mar.py`."""

import json
import math

import golden_mar
import pytest
import torch
from diffusers import AutoencoderKL
from tiny import same_state

from rq_hf import MARTransformerConfig, MARTransformerModel, convert_mar_checkpoint
from rq_hf.convert.mar_weights import mar_parts
from rq_hf.convert.weights import rqvae_parts
from rq_hf.models.presets import load_preset

SCALING_FACTOR = 0.2325


def close(ours, theirs, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@golden_mar.cases("vae")
@torch.no_grad()
def test_autoencoders(case):
    vae, io = golden_mar.converted_vae(case), golden_mar.recorded(case, "vae")
    assert vae.config.scaling_factor == SCALING_FACTOR
    sizes = {name.split("/")[1] for name in io}
    assert sizes
    for size in sizes:
        theirs = {name.split("/")[2]: value for name, value in io.items() if f"/{size}/" in name}
        posterior = vae.encode(theirs["x"]).latent_dist
        close(posterior.parameters, theirs["moments"])
        close(vae.encode(theirs["x"].flip(3)).latent_dist.parameters, theirs["moments_flip"])
        close(posterior.mode(), theirs["mode"])
        close(posterior.logvar, theirs["logvar"])
        close(posterior.std, theirs["std"])
        close(posterior.kl(), theirs["kl"])
        sample = posterior.mode() + posterior.std * theirs["posterior_noise"]
        close(sample, theirs["sample"])
        close(sample * vae.config.scaling_factor, theirs["latents"])
        close(vae.decode(theirs["mode"]).sample, theirs["decode_mode"])
        close(vae.decode(theirs["latents"] / vae.config.scaling_factor).sample, theirs["decode_sample"])


@golden_mar.cases("mar")
@torch.no_grad()
def test_transformers_of_every_layout(case):
    io, options = golden_mar.recorded(case), golden_mar.config("mar", case)
    transformer = golden_mar.converted_transformer(case)
    assert transformer.num_parameters() == golden_mar.MANIFEST["mar"][case]["parameters"]
    config = transformer.config
    assert config.latent_shape == (options["vae_embed_dim"], *io["in/latents"].shape[2:])
    assert (config.null_cond_id, config.cond_repeats) == (options["class_num"], options["buffer_size"])
    mask = io["out/random_masking"][1].bool()
    for ema, name in ((True, "out/masked/z"), (False, "out/model/z")):
        if name in io:
            model = golden_mar.converted_transformer(case, ema)
            tokens = model.patchify(io["in/latents"])
            close(model.predict_conditions(tokens, io["in/labels"][:, None], mask), io[name])


@golden_mar.cases("mar", accept=lambda case: golden_mar.MANIFEST["mar"][case]["checkpoint"] == "training")
def test_options_that_weights_do_not_say_come_from_the_training_checkpoint(case):
    options = golden_mar.config("mar", case)
    heads = options["encoder_num_heads"], options["decoder_num_heads"]
    config = convert_mar_checkpoint(golden_mar.weights(case), heads=heads).config
    assert config.patch_size == options["patch_size"]
    assert config.mask_ratio_min == options["mask_ratio_min"]
    assert config.diffusion_batch_mul == options["diffusion_batch_mul"]
    assert config.encoder_config.attention_dropout == options["attn_dropout"]
    assert config.decoder_config.hidden_dropout == options["proj_dropout"]


@golden_mar.require("mar_full_size/state_dict_shapes.json")
def test_presets_have_the_weights_of_the_released_models():
    shapes = json.loads((golden_mar.FOLDER / "mar_full_size" / "state_dict_shapes.json").read_text())
    for name, theirs in shapes.items():
        with torch.device("meta"):
            if name.startswith("kl"):
                ours = golden_mar.original_shapes(
                    AutoencoderKL(**load_preset("mar-base", "autoencoder_kl")), rqvae_parts
                )
            else:
                config = MARTransformerConfig.from_preset(name.replace("_", "-"))
                ours = golden_mar.original_shapes(MARTransformerModel(config), mar_parts)
        assert {name: list(shape) for name, shape in ours.items()} == theirs


@pytest.mark.slow
@golden_mar.cases("mar_full_size")
@torch.no_grad()
def test_full_size(case, tmp_path):
    io, meta = golden_mar.recorded(case, "mar_full_size"), golden_mar.meta_transformer(case)
    prefix = golden_mar.MANIFEST["mar_full_size"][case]["prefix"]
    weights = golden_mar.recipe_weights(prefix, golden_mar.original_shapes(meta, mar_parts))
    torch.save({"model": {}, "model_ema": weights}, tmp_path / "checkpoint-last.pth")
    del weights
    transformer = convert_mar_checkpoint(tmp_path / "checkpoint-last.pth")  # heads are those of a released model
    assert transformer.config.to_dict() == meta.config.to_dict() | {"dtype": transformer.config.dtype}

    tokens = transformer.patchify(io["in/latents"])
    mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    number = math.ceil(tokens.shape[1] * io["in/mask_rate"].item())
    mask.scatter_(1, io["in/orders"][:, :number], True)
    visible = (~mask).nonzero()[:, 1][None]
    z = {}
    for kind, label in (("conditional", io["in/labels"]), ("unconditional", transformer.config.null_cond_id)):
        cond_ids = torch.as_tensor(label).reshape(1, 1)
        encoder_out = transformer.encode(tokens, cond_ids, visible)
        close(encoder_out[:, ::16], io[f"out/{kind}/encoder_out"], atol=1e-4)
        z[kind] = transformer.decode(encoder_out, visible, positions=io["in/positions"][None])
        close(z[kind], io[f"out/{kind}/z"], atol=1e-4)

    conditions = torch.cat([io["out/conditional/z"], io["out/unconditional/z"]], dim=1)[0]
    close(transformer.head(io["in/net/x"], io["in/net/t"], conditions), io["out/net/output"], atol=1e-4)
    x = io["in/net/x"].chunk(2)[0].repeat(2, 1)
    noise, fractions = transformer.head(x, io["in/net/t"], conditions).chunk(2, dim=1)
    conditional, unconditional = noise.chunk(2)
    guided = (unconditional + 3 * (conditional - unconditional)).repeat(2, 1)
    close(torch.cat([guided, fractions], dim=1), io["out/net/output_cfg3"], atol=1e-4)


@golden_mar.cases("mar")
def test_saved_transformers_are_those_in_memory(case, tmp_path):
    saved = golden_mar.converted_transformer(case, destination=tmp_path / "model")
    assert same_state(saved, golden_mar.converted_transformer(case))
    assert same_state(MARTransformerModel.from_pretrained(tmp_path / "model"), saved)


@golden_mar.cases("mar", accept=lambda case: golden_mar.config("mar", case)["vae"] is not None)
def test_pipelines_decode_recorded_samples(case, tmp_path):
    io, options = golden_mar.recorded(case), golden_mar.config("mar", case)
    pipe = convert_mar_checkpoint(
        golden_mar.weights(case),
        vae=golden_mar.autoencoder_weights(options["vae"], tmp_path),
        heads=(options["encoder_num_heads"], options["decoder_num_heads"]),
    )
    assert pipe.transformer.config.patch_size == options["patch_size"]  # by the channels of the autoencoder
    assert pipe.vae.config.sample_size == options["img_size"]
    runs = {name.removesuffix("/images") for name in io if name.endswith("/images")}
    assert runs
    for run in runs:
        images = pipe.decode_latents(io[f"{run}/latents"], output_type="pt")
        close(images, (io[f"{run}/images"] / 2 + 0.5).clamp(0, 1))
        difference = (images * 255).round().permute(0, 2, 3, 1) - io[f"{run}/uint8"]
        assert difference.abs().max() <= 1
