import pytest
import torch
from diffusers.models.attention_processor import Attention
from tiny import C, D, F, H, K, W, tiny_codes, tiny_pixels, tiny_vae
from torch.utils.flop_counter import FlopCounterMode

from rq_hf import RQVAEModel


@pytest.fixture
def vae():
    return tiny_vae()


@pytest.fixture
def pixels():
    return tiny_pixels(4)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("height, width", [(H, W), (3, 3), (5, 1)])
@pytest.mark.parametrize("channels", [3, 1])
def test_shapes(height, width, channels):
    vae = tiny_vae(in_channels=channels, out_channels=channels)
    pixels = tiny_pixels(2, height * F, width * F, channels)
    latents = vae.encode(pixels).latents
    out = vae.quantize(latents)
    assert latents.shape == out.quantized.shape == (2, C, height, width)
    assert out.codes.shape == vae.get_codes(pixels).shape == (2, height, width, D)
    assert out.codes.dtype == torch.long
    assert out.commitment_loss.shape == ()
    assert vae.decode(out.quantized).sample.shape == pixels.shape
    assert vae.embed_codes(out.codes).shape == (2, height, width, D, C)
    assert vae.decode_codes(out.codes).sample.shape == vae(pixels).sample.shape == pixels.shape
    assert vae.get_soft_codes(pixels)[0].shape == (2, height, width, D, K)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_each_level_but_the_last_halves_the_image(levels):
    vae = tiny_vae(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
    )
    assert vae.pixels_per_code == (2 ** (levels - 1),) * 2
    assert vae.get_codes(tiny_pixels(1, 8, 16)).shape == (1, 8 // 2 ** (levels - 1), 16 // 2 ** (levels - 1), D)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_forward_is_encode_quantize_decode(update, pixels):
    vae = tiny_vae(codebook_update=update)
    out = vae(pixels)
    quantization = vae.quantize(vae.encode(pixels).latents)
    assert torch.equal(out.sample, vae.decode(quantization.quantized).sample)
    assert torch.equal(out.codes, quantization.codes)
    assert torch.equal(out.commitment_loss, quantization.commitment_loss)
    assert (out.codebook_loss is None) == (update == "ema")
    if update == "gradient":
        assert torch.equal(out.codebook_loss, quantization.codebook_loss)


def test_codes_are_those_of_forward(vae, pixels):
    codes = vae.get_codes(pixels)
    assert torch.equal(codes, vae(pixels).codes)
    assert len(codes.flatten(0, 2).unique(dim=0)) > 2


def test_codewords_are_rows_of_the_codebook(vae):
    codes = tiny_codes()
    assert torch.equal(vae.embed_codes(codes), vae.quantizer.codebook[0][codes])


@pytest.mark.parametrize("shared", [True, False])
def test_decoding_all_codes_is_the_reconstruction(shared, pixels):
    vae = tiny_vae(shared_codebook=shared)
    out = vae(pixels)
    assert_close(vae.decode_codes(out.codes).sample, out.sample)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("depth", range(1, D + 1))
def test_truncated_decoding_takes_the_first_codewords(shared, depth):
    vae, codes = tiny_vae(shared_codebook=shared), tiny_codes()
    total = sum(vae.quantizer.codebook[0 if shared else d][codes[..., d]] for d in range(depth))
    sample = vae.decode_codes(codes, depth=depth).sample
    assert_close(sample, vae.decode(total.permute(0, 3, 1, 2)).sample)
    assert torch.allclose(sample, vae.decode_codes(codes).sample) == (depth == D)


@pytest.mark.parametrize("depth", [0, -1, D + 1])
def test_truncation_outside_the_depth_is_an_error(vae, depth):
    with pytest.raises(ValueError, match=rf"depth must lie in \[1, {D}\], got {depth}"):
        vae.decode_codes(tiny_codes(), depth=depth)


def test_soft_codes_are_those_of_the_latents(vae, pixels):
    targets, codes = vae.get_soft_codes(pixels, temperature=0.5)
    vectors = vae.encode(pixels).latents.permute(0, 2, 3, 1)
    expected, _ = vae.quantizer.get_soft_codes(vectors, 0.5)
    assert_close(targets, expected)
    assert torch.equal(codes, vae.get_codes(pixels))
    assert torch.equal(targets.argmax(dim=-1), codes)


def test_stochastic_codes_follow_the_generator(vae, pixels):
    first, again, other = (
        vae.get_soft_codes(pixels, stochastic=True, generator=torch.Generator().manual_seed(seed))[1]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_slicing_changes_nothing(vae, pixels):
    whole = vae(pixels)
    vae.enable_slicing()
    sliced = vae(pixels)
    assert_close(sliced.sample, whole.sample)
    assert torch.equal(sliced.codes, whole.codes)


def test_tiles_are_refused(vae):
    with pytest.raises(NotImplementedError, match="their codes are not those of the image; .* call enable_slicing"):
        vae.enable_tiling()


class TestFusedBlocks:
    LEVELS = {
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (8, 16, 12),
    }

    @pytest.mark.parametrize("height, width", [(4, 8), (20, 12)])
    def test_leave_codes_and_pictures_as_they_are(self, height, width):
        vae, pixels = tiny_vae(**self.LEVELS), tiny_pixels(3, height, width)
        expected = vae(pixels)
        vae.fuse_blocks()
        vae.fuse_blocks()
        actual = vae(pixels)
        assert torch.equal(actual.codes, expected.codes)
        assert_close(actual.sample, expected.sample)

    def test_take_fewer_products(self):
        vae, vectors = tiny_vae(**self.LEVELS), torch.randn(2, C, H, W)
        counts = []
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                vae.decode(vectors)
            counts.append(counter.get_total_flops())
            vae.fuse_blocks()
        saved = [2 * 2 * channels**2 * (9 - 4) * (scale * H) * (scale * W) for channels, scale in ((12, 2), (16, 4))]
        assert counts[0] - counts[1] == sum(saved)

    def test_load_other_weights(self):
        vae, other, vectors = tiny_vae(**self.LEVELS), tiny_vae(**self.LEVELS), torch.randn(2, C, H, W)
        vae.fuse_blocks()
        vae.load_state_dict(other.state_dict())
        assert_close(vae.decode(vectors).sample, other.decode(vectors).sample)

    def test_are_not_trained(self):
        vae = tiny_vae(**self.LEVELS)
        vae.fuse_blocks()
        vae.requires_grad_(True)
        with pytest.raises(ValueError, match="fused blocks cannot be trained; reload"):
            vae(tiny_pixels(2, 8, 12))

    def test_can_be_saved_moved_and_cast(self, tmp_path):
        vae, pixels = tiny_vae(**self.LEVELS), tiny_pixels(2, 8, 12)
        expected, weights = vae(pixels).sample, {name: weight.clone() for name, weight in vae.state_dict().items()}
        vae.fuse_blocks()
        vae.save_pretrained(tmp_path)
        torch.testing.assert_close(RQVAEModel.from_pretrained(tmp_path).state_dict(), weights, rtol=0, atol=0)
        assert_close(vae.double()(pixels.double()).sample.float(), expected)
        assert {tensor.device.type for tensor in [*vae.to("meta").parameters(), *vae.buffers()]} == {"meta"}


@pytest.mark.parametrize("training", [True, False])
def test_only_training_moves_the_codebook(vae, pixels, training):
    before = vae.quantizer.codebook.clone()
    vae.train(training)(pixels)
    vae.get_codes(pixels)
    assert torch.equal(vae.quantizer.codebook, before) != training


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_acts_in_training_only(part, dropout):
    vae = tiny_vae(dropout=dropout)
    module, features = getattr(vae, part), tiny_pixels(1, channels=3 if part == "encoder" else 10)
    assert torch.equal(module(features), module(features))
    module.train()
    assert torch.equal(module(features), module(features)) == (dropout == 0)


@pytest.mark.parametrize("level", [0, 1])
def test_attention_is_where_the_block_types_put_it(level):
    down, up = ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2
    down[level] = "AttnDownEncoderBlock2D"
    up[level] = "AttnUpDecoderBlock2D"
    vae = tiny_vae(down_block_types=down, up_block_types=up, mid_block_add_attention=False)
    for blocks in (vae.encoder.down_blocks, vae.decoder.up_blocks):
        assert [any(isinstance(m, Attention) for m in block.modules()) for block in blocks] == [level == 0, level == 1]
    assert not any(isinstance(m, Attention) for m in vae.encoder.mid_block.modules())
    assert vae(tiny_pixels()).sample.shape == (2, 3, H * F, W * F)


def test_tuples_hold_the_same_as_the_outputs(pixels):
    vae = tiny_vae(codebook_update="gradient")
    latents = vae.encode(pixels).latents
    quantization = vae.quantize(latents)
    for as_tuple, output in (
        (vae.encode(pixels, return_dict=False), vae.encode(pixels)),
        (vae.quantize(latents, return_dict=False), quantization),
        (vae.decode(latents, return_dict=False), vae.decode(latents)),
        (vae.decode_codes(quantization.codes, return_dict=False), vae.decode_codes(quantization.codes)),
        (vae(pixels, return_dict=False), vae(pixels)),
    ):
        assert isinstance(as_tuple, tuple)
        assert len(as_tuple) == len(output.to_tuple())
        assert all(torch.equal(actual, expected) for actual, expected in zip(as_tuple, output.to_tuple()))


def test_config_survives_saving(tmp_path):
    vae = tiny_vae(dropout=0.25, shared_codebook=False, ema_decay=0.5, restart_unused_codes=False)
    vae.save_config(tmp_path)
    loaded = RQVAEModel.from_config(RQVAEModel.load_config(tmp_path))
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in vae.config.items() if k[0] != "_"
    }
    assert not loaded.quantizer.restart_unused_codes
    assert loaded.quantizer.ema_decay == 0.5
    assert loaded.quantizer.codebook.shape == (D, K, C)


@pytest.mark.parametrize("how", ["from_pretrained", "to"])
def test_half_precision_runs_and_is_close(tmp_path, vae, pixels, how):
    vae.save_pretrained(tmp_path)
    if how == "to":
        half = RQVAEModel.from_pretrained(tmp_path).to(torch.bfloat16)
    else:
        half = RQVAEModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    out = half(pixels.bfloat16())
    decoded = half.decode_codes(out.codes).sample
    assert out.sample.dtype == decoded.dtype == torch.bfloat16
    assert out.commitment_loss.dtype == torch.float32
    torch.testing.assert_close(decoded.float(), vae.decode_codes(out.codes).sample, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("method", ["encode", "__call__", "get_codes", "get_soft_codes"])
@pytest.mark.parametrize(
    "pixels, error, message",
    [
        (torch.zeros(1, 3, 5, 4), ValueError, "divisible by 2.*got 5×4"),
        (torch.zeros(1, 3, 4, 7), ValueError, "divisible by 2.*got 4×7"),
        (torch.zeros(1, 1, 4, 4), ValueError, r"shape \(B, 3, height, width\), got \(1, 1, 4, 4\)"),
        (torch.zeros(3, 4, 4), ValueError, r"shape \(B, 3, height, width\), got \(3, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError, "floating point.*got torch.uint8"),
    ],
    ids=["height", "width", "channels", "batch", "dtype"],
)
def test_bad_pixels_are_errors(vae, method, pixels, error, message):
    with pytest.raises(error, match=message):
        getattr(vae, method)(pixels)


@pytest.mark.parametrize("method", ["embed_codes", "decode_codes"])
@pytest.mark.parametrize(
    "codes, error, message",
    [
        (torch.full((1, H, W, D), K), ValueError, rf"\[0, {K}\), got values from {K} to {K}"),
        (torch.full((1, H, W, D), -1), ValueError, rf"\[0, {K}\), got values from -1 to -1"),
        (
            torch.zeros(1, H, W, D - 1, dtype=torch.long),
            ValueError,
            rf"\(B, H, W, {D}\), got \(1, .*{D - 1}\)",
        ),
        (torch.zeros(H, W, D, dtype=torch.long), ValueError, rf"\(B, H, W, {D}\), got \({H}, {W}, {D}\)"),
        (torch.zeros(1, H, W, D), TypeError, "int64, got torch.float32"),
        (torch.zeros(1, H, W, D, dtype=torch.int32), TypeError, "int64, got torch.int32"),
    ],
    ids=["too large", "negative", "depth", "batch", "float", "int32"],
)
def test_bad_codes_are_errors(vae, method, codes, error, message):
    with pytest.raises(error, match=message):
        getattr(vae, method)(codes)


def test_levels_that_do_not_match_are_an_error():
    with pytest.raises(ValueError, match="one entry per level, got 2, 2 and 3"):
        tiny_vae(block_out_channels=(8, 8, 8))


@pytest.mark.parametrize(
    "overrides, error, message",
    [
        ({"sample_size": "8"}, TypeError, "sample_size must be an integer, got '8'"),
        ({"sample_size": (8, 8)}, TypeError, r"sample_size must be an integer, got \(8, 8\)"),
        ({"sample_size": -1}, ValueError, "sample_size must be at least 1, got -1"),
        ({"latent_channels": 0}, ValueError, "latent_channels must be at least 1, got 0"),
        ({"codebook_dim": "6"}, TypeError, "codebook_dim must be an integer, got '6'"),
        ({"shared_codebook": "False"}, TypeError, "shared_codebook must be True or False, got 'False'"),
        ({"mid_block_add_attention": "no"}, TypeError, "mid_block_add_attention must be True or False, got 'no'"),
    ],
)
def test_bad_options_are_errors(overrides, error, message):
    with pytest.raises(error, match=message):
        tiny_vae(**overrides)
