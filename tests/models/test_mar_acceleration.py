import pytest
import torch
from tiny import MAR_CALL, MAR_SCALE, STACK, T, kinds, same_state, tiny_condition, tiny_latents, tiny_mar

from rq_hf import MARTransformerModel
from rq_hf.models.mar_transformer import acceleration


def results(model, kind):
    """Samples, also with guidance and with other numbers of hidden tokens in every image, and a loss."""
    ids, latents, seeds = tiny_condition(kind, 3), tiny_latents(3), [1, 2, 3]
    mask = torch.arange(T) < torch.tensor([[3], [T], [T - 1]])
    guidance = {} if kind == "none" else {"guidance_scale": 2.0}
    noise, timesteps = torch.randn(1, 3, T, model.config.token_dim), torch.arange(3 * T).view(1, 3, T)
    return [
        model.generate(ids, num_images=3, generator=seeds, **MAR_CALL, **guidance) / MAR_SCALE,
        model.generate(ids, known_latents=latents, mask=mask, generator=seeds, **MAR_CALL) / MAR_SCALE,
        model(latents, ids, mask, noise, timesteps).mse,
    ]


class TestPackedWeights:
    @kinds
    @pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
    @pytest.mark.parametrize("least_head_width", [1, 512])
    def test_leave_latents_and_losses_as_they_are(self, monkeypatch, kind, activation, least_head_width):
        monkeypatch.setattr(acceleration, "LEAST_HEAD_WIDTH", least_head_width)
        stack = STACK | {"hidden_act": activation}
        model = tiny_mar(kind, encoder_config=stack, decoder_config=stack)
        torch.manual_seed(1)
        expected = results(model, kind)
        model.pack_weights()
        torch.manual_seed(1)
        for result, plain in zip(results(model, kind), expected, strict=True):
            torch.testing.assert_close(result, plain, rtol=1e-4, atol=1e-5)

    @kinds
    def test_are_no_less_exact_in_bfloat16(self, kind):
        model, tokens = tiny_mar(kind), torch.randn(16, T, tiny_mar().config.token_dim)
        ids = model.prepare_cond_ids(tiny_condition(kind, 16), 16)
        mask = torch.rand(16, T).argsort(dim=-1) < 2
        exact = model.predict_conditions(tokens, ids, mask)
        plain = model.bfloat16().predict_conditions(tokens, ids, mask).float()
        model.pack_weights()
        packed = model.predict_conditions(tokens, ids, mask).float()
        assert (packed - exact).norm() < 1.1 * (plain - exact).norm()

    def test_are_saved_as_they_were(self, tmp_path):
        model = tiny_mar("text")
        model.save_pretrained(tmp_path / "plain")
        model.pack_weights()
        model.pack_weights()
        model.save_pretrained(tmp_path / "packed")
        plain, packed = (MARTransformerModel.from_pretrained(tmp_path / name) for name in ("plain", "packed"))
        assert same_state(packed, plain)

    def test_cannot_be_moved_or_cast(self):
        model = tiny_mar()
        model.pack_weights()
        with pytest.raises(ValueError, match="packed weights stay on the CPU in torch.float32"):
            model.bfloat16()

    def test_give_latents_that_autograd_takes(self):
        model = tiny_mar()
        model.pack_weights()
        latents = model.generate(num_images=2, **MAR_CALL)
        weight = torch.ones((), requires_grad=True)
        (latents * weight).sum().backward()
        torch.testing.assert_close(weight.grad, latents.sum())
