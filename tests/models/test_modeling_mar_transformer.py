import math

import pytest
import torch
from tiny import CONDITIONS, C, H, T, W, kinds, tiny_condition, tiny_mar, tiny_mar_config

from rq_hf import MARTransformerConfig, MARTransformerModel
from rq_hf.models.mar_transformer.diffusion import TRAINING_PROCESS, diffusion_loss
from rq_hf.models.mar_transformer.masking import mask_rate, positions_of, random_mask, sampling_masks


def inputs(kind="class", batch_size=3, **overrides):
    """Arguments of a training pass with all random numbers given."""
    torch.manual_seed(0)
    arguments = {
        "latents": torch.randn(batch_size, C, H, W),
        "cond_ids": tiny_condition(kind, batch_size),
        "mask": random_mask(batch_size, T, 0.5),
        "noise": torch.randn(2, batch_size, T, C),
        "timesteps": torch.randint(1000, (2, batch_size, T)),
    }
    return arguments | overrides


class TestForward:
    @kinds
    def test_loss_is_that_of_the_hidden_tokens(self, kind):
        model, arguments = tiny_mar(kind), inputs(kind)
        output = model(**arguments)
        torch.testing.assert_close(output.loss, output.mse + output.vlb)
        assert torch.equal(output.mask, arguments["mask"])
        visible = ~arguments["mask"]
        other = arguments["noise"].clone()
        other[:, visible] = 7.0
        torch.testing.assert_close(model(**arguments | {"noise": other}).loss, output.loss)

    def test_hidden_tokens_are_seen_as_targets_only(self):
        model, arguments = tiny_mar("class"), inputs()
        tokens = model.patchify(arguments["latents"])
        other = tokens.masked_fill(arguments["mask"][..., None], 9.0)
        conditions = [model.predict_conditions(t, arguments["cond_ids"], arguments["mask"]) for t in (tokens, other)]
        assert torch.equal(*conditions)
        revealed = arguments["mask"].clone()
        revealed[0, revealed[0].nonzero()[0]] = False
        assert not torch.allclose(
            model.predict_conditions(tokens, arguments["cond_ids"], revealed)[0], conditions[0][0]
        )

    def test_images_that_hide_different_numbers_of_tokens_do_not_change_each_other(self):
        model, arguments = tiny_mar("text"), inputs("text")
        mask = torch.ones(3, T, dtype=torch.bool)
        mask[0, :1], mask[1, 2:] = False, False
        tokens = model.patchify(arguments["latents"])
        together = model.predict_conditions(tokens, arguments["cond_ids"], mask)
        for i in range(3):
            alone = model.predict_conditions(tokens[i : i + 1], arguments["cond_ids"][i : i + 1], mask[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone)

    def test_positions_alone_have_the_conditions_of_all(self):
        model, arguments = tiny_mar("class"), inputs()
        tokens, mask = model.patchify(arguments["latents"]), arguments["mask"]
        positions = torch.tensor([[4, 0], [1, 2], [5, 5]])
        some = model.predict_conditions(tokens, arguments["cond_ids"], mask, positions)
        every = model.predict_conditions(tokens, arguments["cond_ids"], mask)
        torch.testing.assert_close(some, every.take_along_dim(positions[..., None], dim=1))

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_attention_implementations_agree(self, implementation):
        arguments = inputs("text")
        arguments["mask"][0] = True  # another number than in the other images
        model = tiny_mar("text")
        expected = model(**arguments).loss
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(model(**arguments).loss, expected)

    def test_bfloat16_gives_the_loss_within_one_percent(self):
        model = tiny_mar("class")
        arguments = inputs(batch_size=64)
        expected = model(**arguments)
        with torch.autocast("cpu", torch.bfloat16):
            actual = model(**arguments)
        assert actual.loss.dtype == torch.float32
        torch.testing.assert_close(actual.loss, expected.loss, rtol=0.01, atol=0)
        arguments["latents"] = arguments["latents"].bfloat16()
        torch.testing.assert_close(model.bfloat16()(**arguments).loss, expected.loss, rtol=0.01, atol=0)

    def test_float16_is_refused(self):
        with pytest.raises(ValueError, match="NaN in float16"):
            tiny_mar("class").half()(**inputs())
        with pytest.raises(ValueError, match="NaN in float16"):
            tiny_mar("class").half().generate(torch.tensor([0]))

    def test_masks_noise_and_timesteps_are_drawn_anew(self):
        model, latents = tiny_mar(mask_ratio_min=0.2), torch.randn(8, C, H, W)
        outputs = [model(latents) for _ in range(6)]
        assert len({output.loss.item() for output in outputs}) == 6
        hidden = [output.mask.sum(dim=1) for output in outputs]
        assert all((count == count[0]).all() for count in hidden)
        assert len({int(count[0]) for count in hidden}) > 1
        assert any((output.mask != output.mask[0]).any() for output in outputs)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"latents": torch.zeros(3, C + 1, H, W)},
                r"latents must have the shape \(B, 6, 2, 3\), got \(3, 7, 2, 3\)",
            ),
            ({"mask": torch.ones(3, T)}, "mask must be bool, true where a token is hidden, got torch.float32"),
            ({"mask": torch.ones(2, T, dtype=torch.bool)}, r"mask must have the shape \(3, 6\), got \(2, 6\)"),
            ({"mask": torch.zeros(3, T, dtype=torch.bool)}, "mask must hide at least one token of every image"),
            ({"noise": torch.zeros(2, 3, T, C - 1)}, r"noise must have the shape \(R, 3, 6, 6\), got \(2, 3, 6, 5\)"),
            ({"timesteps": torch.full((2, 3, T), 1000)}, r"timesteps must lie in \[0, 1000\)"),
            ({"timesteps": torch.zeros(1, 3, T, dtype=torch.long)}, r"timesteps must have the shape \(2, 3, 6\)"),
            ({"cond_ids": None}, "this model is conditional"),
            ({"cond_ids": torch.tensor([0, 1, 5])}, r"cond_ids must lie in \[0, 5\)"),
        ],
    )
    def test_wrong_arguments_are_refused(self, arguments, message):
        with pytest.raises((ValueError, TypeError), match=message):
            tiny_mar("class")(**inputs() | arguments)


class TestInitialization:
    def test_is_the_authors(self):
        sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes = {"encoder_config": sizes, "decoder_config": sizes, "head_config": {"hidden_size": 64}}
        config = tiny_mar_config("class", **sizes, initializer_range=0.02)
        torch.manual_seed(0)
        model = MARTransformerModel(config)
        qkv = model.encoder.layers[0].self_attn.qkv_proj
        bound = math.sqrt(6 / (64 + 3 * 64))  # queries, keys and values as one matrix
        assert 0.95 * bound < qkv.weight.abs().max() <= bound
        assert all(
            not p.any() for name, p in model.named_parameters() if name.endswith(("proj.bias", "projection.bias"))
        )
        embeddings = [
            model.encoder_position_embedding,
            model.decoder_position_embedding,
            model.head_position_embedding,
        ]
        for weight in (*embeddings, model.cond_embedding.weight, model.head.time_embedding.linear_2.weight):
            assert weight.std().item() == pytest.approx(0.02, rel=0.15)

    def test_new_head_predicts_zero(self):
        model = MARTransformerModel(tiny_mar_config())
        prediction = model.head(torch.randn(4, C), torch.arange(4), torch.randn(4, model.mask_token.shape[-1]))
        assert not prediction.any()


class TestPatches:
    @pytest.mark.parametrize("patch_size", [1, 2])
    def test_unpatchify_inverts_patchify(self, patch_size):
        model = tiny_mar(latent_shape=(3, 4, 6), patch_size=patch_size)
        latents = torch.randn(2, 3, 4, 6)
        tokens = model.patchify(latents)
        assert tokens.shape == (2, 24 // patch_size**2, 3 * patch_size**2)
        assert torch.equal(tokens[0, 0].view(3, patch_size, patch_size), latents[0, :, :patch_size, :patch_size])
        assert torch.equal(model.unpatchify(tokens), latents)


class TestConfig:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"patch_size": 2}, r"patch_size must divide height and width of latent_shape, got 2 and \(6, 2, 3\)"),
            ({"latent_shape": (6, 2)}, "latent_shape must have 3 items"),
            ({"null_cond_id": 7}, r"null_cond_id must lie in \[0, 5\), got 7"),
            ({"mask_ratio_min": 0.0}, r"mask_ratio_min must lie in \(0, 1\], got 0.0"),
            ({"diffusion_batch_mul": 0}, "diffusion_batch_mul must be at least 1, got 0"),
            ({"head_config": {"frequency_embedding_size": 3}}, "frequency_embedding_size must be even, got 3"),
            ({"encoder_config": {"hidden_size": 10, "num_attention_heads": 3}}, "hidden_size must be divisible"),
            ({"decoder_config": {"num_hidden_layers": 0}}, "num_hidden_layers must be at least 1, got 0"),
        ],
    )
    def test_wrong_sizes_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            MARTransformerConfig(**{"latent_shape": (C, H, W)} | CONDITIONS["class"] | arguments)


class TestDiffusion:
    def test_the_bound_trains_only_the_variances(self):
        tokens, noise = torch.randn(2, 50, C)
        prediction = torch.randn(50, 2 * C, requires_grad=True)
        _, bounds = diffusion_loss(tokens, noise, torch.arange(0, 1000, 20), prediction)
        bounds.sum().backward()
        assert not prediction.grad[:, :C].any()
        assert prediction.grad[:, C:].all()

    def test_the_bound_is_zero_for_the_posterior_itself(self):
        tokens, noise = torch.randn(2, 50, C)
        timesteps = torch.arange(10, 1000, 20)[:50]
        smallest = torch.full_like(noise, -1.0)
        squared_errors, bounds = diffusion_loss(tokens, noise, timesteps, torch.cat([noise, smallest], dim=-1))
        assert not squared_errors.any()
        torch.testing.assert_close(bounds, torch.zeros(50), rtol=0, atol=1e-6)

    def test_float32_whatever_autocast_says(self):
        arguments = (*torch.randn(2, 8, C), torch.arange(8), torch.randn(8, 2 * C))
        expected = diffusion_loss(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            actual = diffusion_loss(*arguments)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected))

    def test_the_process_ends_in_noise(self):
        assert TRAINING_PROCESS.alphas_cumprod[0] > 0.9999
        assert TRAINING_PROCESS.alphas_cumprod[-1] < 1e-8


class TestMasks:
    def test_rates_follow_the_truncated_normal_distribution(self):
        uniform = torch.linspace(0, 1, 1001)
        rates = mask_rate(uniform, 0.7)
        assert rates[0].item() == pytest.approx(0.7) and rates[-1].item() == pytest.approx(1)
        assert rates.mean().item() == pytest.approx(0.867, abs=2e-3)  # the mean of the authors' distribution
        assert (rates.diff() > 0).all()

    def test_sampling_reveals_all_tokens_on_a_cosine_schedule(self):
        orders = torch.rand(2, 64).argsort(dim=-1)
        masks = sampling_masks(orders, torch.ones(2, 64, dtype=torch.bool), 8)
        counts = [mask.sum(dim=-1) for mask in masks]
        expected = [64, *(math.floor(64 * math.cos(math.pi / 2 * k / 8)) for k in range(1, 8)), 0]
        assert [count.tolist() for count in counts] == [[n, n] for n in expected]
        for before, after in zip(masks, masks[1:]):
            assert not (after & ~before).any()

    @pytest.mark.parametrize("iterations", [1, 2, 5])
    def test_sampling_reveals_given_tokens_only_and_some_in_every_iteration(self, iterations):
        mask = torch.zeros(3, 20, dtype=torch.bool)
        mask[0, :5], mask[1, 3:], mask[2] = True, True, True
        masks = sampling_masks(torch.rand(3, 20).argsort(dim=-1), mask, iterations)
        assert torch.equal(masks[0], mask) and not masks[-1].any()
        for before, after in zip(masks, masks[1:]):
            assert ((before & ~after).sum(dim=-1) >= 1).all()

    def test_positions_are_in_raster_order(self):
        mask = torch.tensor([[False, True, True, False], [True, False, True, False]])
        positions, are_all = positions_of(mask)
        assert positions.tolist() == [[1, 2], [0, 2]] and are_all is None
        mask[0, 3] = True
        positions, are_real = positions_of(mask)
        assert positions[0].tolist() == [1, 2, 3]
        assert are_real.tolist() == [[True, True, True], [True, True, False]]
