import pytest
import torch
from diffusers import AutoencoderKL

from rq_hf import (
    PRESETS,
    MARTransformerConfig,
    MARTransformerModel,
    RQTransformerConfig,
    RQTransformerModel,
    RQVAEModel,
)
from rq_hf.models.presets import load_preset

PARAMETERS = {  # of the published RQ-Transformers, and what they are conditioned on: vocabulary, length
    "ffhq-355m": (355_393_536, 1, 1),
    "lsun-church-370m": (370_087_936, 1, 1),
    "lsun-cat-612m": (612_061_184, 1, 1),
    "lsun-bedroom-612m": (612_061_184, 1, 1),
    "imagenet-480m": (480_921_088, 1000, 1),
    "imagenet-821m": (820_899_328, 1000, 1),
    "imagenet-1.4b": (1_387_529_728, 1000, 1),
    "imagenet-3.8b": (3_822_488_064, 1000, 1),
    "cc3m-654m": (654_061_568, 16384, 32),
    "cc3m-cc12m-yfcc-3.9b": (3_903_996_928, 16384, 64),
}
BASELINE = "imagenet-1.4b-16x16x1"
MAR_PARAMETERS = {"mar-base": 207_924_768, "mar-large": 478_326_304, "mar-huge": 942_403_104}


def meta(build, *args):
    with torch.device("meta"):
        return build(*args)


def test_there_is_a_preset_of_every_published_model_and_the_baseline():
    assert set(PRESETS) == {*PARAMETERS, BASELINE, *MAR_PARAMETERS}


@pytest.mark.parametrize("name", PARAMETERS)
def test_transformers_have_the_published_size(name):
    config = RQTransformerConfig.from_preset(name)
    parameters, vocab_size, length = PARAMETERS[name]
    assert meta(RQTransformerModel, config).num_parameters() == parameters
    assert (config.cond_vocab_size, config.cond_length) == (vocab_size, length)


@pytest.mark.parametrize("name", PARAMETERS)
def test_rqvaes_have_the_published_size(name):
    vae = meta(RQVAEModel.from_preset, name)
    assert sum(p.numel() for p in vae.parameters()) - vae.quantizer.codebook.numel() == 100_207_491
    assert vae.config.codebook_size == (2048 if name.startswith("ffhq") else 16384)
    assert vae.encode(torch.empty(1, 3, 256, 256, device="meta")).latents.shape == (1, 256, 8, 8)


@pytest.mark.parametrize("name", [*PARAMETERS, BASELINE])
def test_both_stages_fit_together(name):
    vae, config = meta(RQVAEModel.from_preset, name), RQTransformerConfig.from_preset(name)
    assert (vae.config.depth, vae.config.codebook_size, vae.config.codebook_dim, vae.config.shared_codebook) == (
        config.code_shape[-1],
        config.codebook_size,
        config.codebook_dim,
        config.shared_codebook,
    )
    assert vae.code_shape == config.code_shape


def test_the_baseline_has_one_code_at_16_by_16_positions_and_the_layers_of_the_1_4b_model():
    ours, baseline = (RQTransformerConfig.from_preset(name) for name in ("imagenet-1.4b", BASELINE))
    assert (ours.code_shape, baseline.code_shape) == ((8, 8, 4), (16, 16, 1))
    layers = [c.spatial_config.num_hidden_layers + c.depth_config.num_hidden_layers for c in (ours, baseline)]
    assert layers == [48, 48]


@pytest.mark.parametrize("name", MAR_PARAMETERS)
def test_mar_models_have_the_published_size(name):
    config = MARTransformerConfig.from_preset(name)
    assert meta(MARTransformerModel, config).num_parameters() == MAR_PARAMETERS[name]
    assert (config.cond_vocab_size, config.null_cond_id, config.cond_repeats) == (1001, 1000, 64)
    with torch.device("meta"):
        vae = AutoencoderKL(**load_preset(name, "autoencoder_kl"))
    assert vae.num_parameters() == 66_456_019
    latents = vae.encode(torch.empty(1, 3, 256, 256, device="meta")).latent_dist.mean
    assert latents.shape == (1, *config.latent_shape)


@pytest.mark.parametrize(
    "build, name, section, others",
    [
        (RQVAEModel.from_preset, "mar-base", "vae", "cc3m-654m, .*ffhq-355m"),
        (RQTransformerConfig.from_preset, "mar-huge", "transformer", "cc3m-654m, .*ffhq-355m"),
        (MARTransformerConfig.from_preset, "ffhq-355m", "mar_transformer", "mar-base, mar-huge, mar-large"),
    ],
)
def test_a_preset_of_the_other_method_is_refused_with_those_that_fit(build, name, section, others):
    with pytest.raises(ValueError, match=f"the preset '{name}' has .*, but no {section}; {others}.* have one"):
        build(name)


@pytest.mark.parametrize("build", [RQVAEModel.from_preset, RQTransformerConfig.from_preset])
def test_an_unknown_preset_is_refused_with_the_known_ones(build):
    with pytest.raises(ValueError, match="unknown preset 'imagenet'; there are .*imagenet-1.4b, .*lsun-church-370m"):
        build("imagenet")
