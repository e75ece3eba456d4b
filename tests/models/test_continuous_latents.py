import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from tiny import MAR_SCALE, C, tiny_kl, tiny_pixels, tiny_vae

from rq_hf import RQVAEModel
from rq_hf.models.continuous_latents import (
    decode_latents,
    encode_latents,
    encode_moments,
    latent_shape,
    load_autoencoder,
    measure_scaling_factor,
    pixels_per_latent,
    sample_latents,
)

MAKERS = {"kl": tiny_kl, "rq": tiny_vae}
each_kind = pytest.mark.parametrize("kind", MAKERS)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@each_kind
def test_shapes(kind):
    vae = MAKERS[kind]()
    moments = encode_moments(vae, tiny_pixels(2, 4, 6))
    assert latent_shape(vae) == (C, 4, 4)
    assert pixels_per_latent(vae) == (2, 2)
    assert moments.shape == (2, C if kind == "rq" else 2 * C, 2, 3)
    latents = sample_latents(vae, moments)
    assert latents.shape == encode_latents(vae, tiny_pixels(2, 4, 6)).shape == (2, C, 2, 3)
    assert decode_latents(vae, latents).shape == (2, 3, 4, 6)


def test_shapes_of_images_that_are_not_square():
    assert latent_shape(tiny_kl(sample_size=(8, 12))) == (C, 4, 6)


def test_codes_that_cover_patches_are_one_latent_each():
    vae = tiny_vae(code_patch_size=(1, 2))
    assert (latent_shape(vae), pixels_per_latent(vae)) == ((C, 4, 2), (2, 4))
    pixels = tiny_pixels(2, 4, 8)
    latents = encode_latents(vae, pixels)
    assert torch.equal(latents.permute(0, 2, 3, 1), vae.encode_to_vectors(pixels))
    torch.testing.assert_close(decode_latents(vae, latents), vae.decode(vae.encode(pixels).latents).sample)


@pytest.mark.parametrize("shift", [None, 0.3])
@pytest.mark.parametrize("has_convolutions", [True, False])
def test_latents_of_an_autoencoder_kl_are_those_of_diffusers(shift, has_convolutions):
    vae = tiny_kl(shift_factor=shift, use_quant_conv=has_convolutions, use_post_quant_conv=has_convolutions)
    pixels, offset = tiny_pixels(2, 8, 8), shift or 0
    posterior = vae.encode(pixels).latent_dist
    moments = encode_moments(vae, pixels)
    assert torch.equal(moments, posterior.parameters)
    torch.testing.assert_close(encode_latents(vae, pixels), (posterior.mode() - offset) * MAR_SCALE)
    actual = sample_latents(vae, moments, torch.Generator().manual_seed(1))
    torch.testing.assert_close(actual, (posterior.sample(torch.Generator().manual_seed(1)) - offset) * MAR_SCALE)
    torch.testing.assert_close(decode_latents(vae, actual), vae.decode(actual / MAR_SCALE + offset).sample)


def test_one_generator_per_image_samples_each_one_alone():
    vae = tiny_kl()
    moments = encode_moments(vae, tiny_pixels(2, 8, 8))
    together = sample_latents(vae, moments, [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    alone = sample_latents(vae, moments[1:], torch.Generator().manual_seed(2))
    torch.testing.assert_close(together[1:], alone)


def test_latents_of_an_rqvae_have_no_variance_and_are_scaled():
    vae, pixels = tiny_vae(scaling_factor=2.5), tiny_pixels(2, 8, 8)
    latents = encode_latents(vae, pixels)
    assert torch.equal(latents, sample_latents(vae, encode_moments(vae, pixels)))
    torch.testing.assert_close(latents, vae.encode(pixels).latents * 2.5)
    torch.testing.assert_close(decode_latents(vae, latents), vae.decode(vae.encode(pixels).latents).sample)


def test_scaling_factor_of_an_rqvae_is_saved_and_changes_no_codes(tmp_path):
    vae, pixels = tiny_vae(), tiny_pixels(2, 8, 8)
    codes = vae.get_codes(pixels)
    vae.register_to_config(scaling_factor=2.5)
    vae.save_pretrained(tmp_path)
    loaded = RQVAEModel.from_pretrained(tmp_path)
    assert loaded.config.scaling_factor == 2.5
    assert torch.equal(loaded.get_codes(pixels), codes)


@each_kind
def test_latents_are_float32_in_bfloat16(kind):
    vae = MAKERS[kind]().bfloat16()
    moments = encode_moments(vae, tiny_pixels(2, 8, 8))
    latents = sample_latents(vae, moments)
    assert (moments.dtype, latents.dtype) == (torch.bfloat16, torch.float32)
    assert decode_latents(vae, latents).dtype == torch.bfloat16


@each_kind
def test_load_autoencoder_finds_the_class(kind, tmp_path):
    vae = MAKERS[kind]()
    vae.save_pretrained(tmp_path)
    loaded = load_autoencoder(tmp_path)
    assert type(loaded) is type(vae)
    pixels = tiny_pixels(1, 8, 8)
    assert torch.equal(encode_latents(loaded, pixels), encode_latents(vae, pixels))


def test_load_autoencoder_refuses_missing_weights(tmp_path):
    tiny_kl().save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"layers_per_block": 1', '"layers_per_block": 2'))
    with pytest.raises(ValueError, match="lacks weights, or its config.json is of another model"):
        load_autoencoder(tmp_path)


def test_measured_scale_gives_unit_variance():
    latents = torch.randn(7, 2, 3, 4) * 5 + 1
    scale = measure_scaling_factor(latents.split(3))
    assert (latents * scale).std().item() == pytest.approx(1)


@pytest.mark.parametrize("latents", [[], [torch.ones(2, 3)], [torch.tensor([1.0, float("inf")])]])
def test_scale_of_latents_without_a_variance_is_an_error(latents):
    with pytest.raises(ValueError, match="finite variance greater than 0"):
        measure_scaling_factor(latents)


@pytest.mark.parametrize("vae", [VQModel(block_out_channels=(8,), norm_num_groups=4), None, torch.nn.Identity()])
def test_refuses_other_classes(vae):
    with pytest.raises(TypeError, match=r"vae must be of type \S+AutoencoderKL \| \S+RQVAEModel, got"):
        latent_shape(vae)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scaling_factor": 0.0}, "scaling_factor must be greater than 0, got 0.0"),
        ({"latents_mean": [0.0] * C}, "latents_mean must be None"),
        ({"latents_std": [1.0] * C}, "latents_std must be None"),
        ({"shift_factor": float("nan")}, "shift_factor must be finite, got nan"),
    ],
)
def test_refuses_another_normalization(config, message):
    with pytest.raises(ValueError, match=message):
        encode_latents(tiny_kl(**config), tiny_pixels(1, 8, 8))


def test_rqvae_refuses_a_scale_of_0():
    with pytest.raises(ValueError, match="scaling_factor must be greater than 0, got 0"):
        tiny_vae(scaling_factor=0)


@each_kind
def test_refuses_tensors_of_other_shapes(kind):
    vae = MAKERS[kind]()
    with pytest.raises(ValueError, match="height and width must be divisible by 2 and 2, .*got 5×6"):
        encode_moments(vae, tiny_pixels(1, 5, 6))
    with pytest.raises(ValueError, match=r"pixels must have the shape \(B, 3, height, width\)"):
        encode_moments(vae, tiny_pixels(1, 4, 4, channels=1))
    with pytest.raises(ValueError, match=r"moments must have the shape \(B, \d+, H, W\)"):
        sample_latents(vae, torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"latents must have the shape \(B, \d+, H, W\)"):
        decode_latents(vae, torch.zeros(1, 3, 4, 4))


def test_default_autoencoder_kl_of_diffusers_is_accepted():
    assert latent_shape(AutoencoderKL(norm_num_groups=32)) == (4, 32, 32)
