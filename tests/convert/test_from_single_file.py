import diffusers
import pytest
import torch
from original_checkpoints import RQVAE_CONFIG, config_with, original_rqvae, random_rqvae, write_rqvae
from tiny import same_state

from rq_hf import RQVAEModel, convert_original_checkpoint


def test_single_file_is_the_converted_rqvae(tmp_path):
    expected = random_rqvae(depth=2, shared_codebook=False)
    options = {"arch.hparams.shared_codebook": False, "arch.hparams.code_shape": [4, 4, 2]}
    rqvae = write_rqvae(tmp_path, expected, options)
    config = str(rqvae.with_name("config.yaml"))
    converted = convert_original_checkpoint(rqvae=rqvae, destination=tmp_path / "vae")
    for vae in (
        RQVAEModel.from_single_file(str(rqvae), original_config=config),
        RQVAEModel.from_single_file(original_rqvae(expected), original_config=config),
        RQVAEModel.from_single_file(original_rqvae(expected), original_config=config_with(RQVAE_CONFIG, options)),
        RQVAEModel.from_single_file(str(rqvae), config=str(tmp_path / "vae")),
    ):
        assert type(vae) is RQVAEModel
        assert not vae.training
        assert same_state(vae, expected)
        assert vae.config.block_out_channels == converted.config.block_out_channels
        pixels = torch.rand(1, 3, 8, 8)
        assert torch.equal(vae.get_codes(pixels), converted.get_codes(pixels))


@pytest.mark.parametrize(
    "weights, options, match",
    [
        ({"extra": torch.zeros(3)}, {}, r"1 left over \(extra\)"),
        ({"quant_conv.bias": torch.zeros(3)}, {}, r"1 of another shape \(quant_conv.bias"),
        ({}, {"arch.ddconfig.num_res_blocks": 2}, "missing"),
        ({}, {"arch.ddconfig.ch_mult": [2, 2]}, "arch.ddconfig.ch_mult"),
    ],
)
def test_single_file_that_does_not_fit(tmp_path, weights, options, match):
    rqvae = write_rqvae(tmp_path, options=options, weights=weights)
    with pytest.raises(ValueError, match=match):
        RQVAEModel.from_single_file(str(rqvae), original_config=str(rqvae.with_name("config.yaml")))


def test_single_file_with_something_else_for_a_configuration():
    with pytest.raises(ValueError, match="original_config must hold named options, got list"):
        RQVAEModel.from_single_file(original_rqvae(random_rqvae()), original_config=["arch"])


def test_single_file_without_configuration(tmp_path):
    with pytest.raises(ValueError, match="original_config"):
        RQVAEModel.from_single_file(str(write_rqvae(tmp_path)))


def test_single_files_of_diffusers_still_load(tmp_path):
    assert diffusers.RQVAEModel is RQVAEModel  # diffusers looks all names of its table up
    expected = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
    expected.save_pretrained(tmp_path)
    vae = diffusers.AutoencoderKL.from_single_file(expected.state_dict(), config=str(tmp_path))
    assert type(vae) is diffusers.AutoencoderKL
    assert same_state(vae, expected)
