import pytest
import torch
from huggingface_hub import ModelCard
from tiny import CONDITIONS, C, D, K, same_state, tiny_pixels, tiny_transformer, tiny_vae

from rq_hf.training import RQTransformerLoss, create_transformer, load_transformer
from rq_hf.training.rq_transformer import pipeline_card

GRID = 4


@pytest.fixture
def vae():
    return tiny_vae(sample_size=6)  # a grid of 3×3


class TestCreateTransformer:
    def test_has_the_codes_and_the_codebook_of_the_vae(self, vae):
        model = create_transformer(vae, hidden_size=16, spatial_layers=2, depth_layers=1, num_attention_heads=2)
        assert model.config.code_shape == (3, 3, D)
        assert (model.config.codebook_size, model.config.codebook_dim) == (K, C)
        assert torch.equal(model.codebook, vae.quantizer.codebook)
        assert model.config.spatial_config.hidden_size == 16
        assert (model.config.spatial_config.num_hidden_layers, model.config.depth_config.num_hidden_layers) == (2, 1)


class TestLoadTransformer:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_continues_from_a_trained_one_in_single_precision(self, vae, tmp_path, dtype):
        vae.quantizer.codebook.data = vae.quantizer.codebook.data.half().float()
        trained = tiny_transformer("class", code_shape=(3, 3, D))
        trained.set_codebook(vae.quantizer.codebook)
        trained.to(dtype).save_pretrained(tmp_path)
        model = load_transformer(str(tmp_path), vae, **CONDITIONS["class"])
        assert same_state(model, trained.float())

    @pytest.mark.parametrize(
        "kind, code_shape, message",
        [
            ("class", (3, 3, D), "another codebook than the RQ-VAE"),
            ("text", (3, 3, D), r"\(\(3, 3, 4\), 5, 1, 4\), this data needs \(\(3, 3, 4\), 270, 5, 0\)"),
            ("class", (2, 3, D), r"\(\(2, 3, 4\), 5, 1, 4\), this data needs \(\(3, 3, 4\), 5, 1, 4\)"),
        ],
    )
    def test_refuses_one_that_does_not_fit(self, vae, tmp_path, kind, code_shape, message):
        tiny_transformer("class", code_shape=code_shape).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            load_transformer(str(tmp_path), vae, **CONDITIONS[kind])


class Recorder:
    """A transformer that keeps the arguments it was called with."""

    def __init__(self, transformer):
        self.transformer = transformer

    def __call__(self, codes, cond_ids, **arguments):
        self.codes, self.cond_ids, self.arguments = codes, cond_ids, arguments
        return self.transformer(codes, cond_ids, **arguments)


class TestRQTransformerLoss:
    @pytest.fixture
    def vae(self):
        return tiny_vae(sample_size=2 * GRID)

    @pytest.fixture
    def pixels(self):
        return tiny_pixels(8, 2 * GRID, 2 * GRID)

    @pytest.fixture
    def latents(self, vae, pixels):
        with torch.no_grad():
            return vae.encode_to_vectors(pixels).bfloat16()

    @pytest.fixture
    def model(self, vae):
        transformer = tiny_transformer(code_shape=(GRID, GRID, D))
        transformer.set_codebook(vae.quantizer.codebook)
        return Recorder(transformer)

    @pytest.mark.parametrize("temperature", [None, 0.5], ids=["hard", "soft"])
    def test_codes_and_loss_of_latents_are_those_of_the_images(self, vae, model, pixels, latents, temperature):
        compute_loss = RQTransformerLoss(vae, soft_label_temperature=temperature)
        torch.manual_seed(0)
        actual, codes = compute_loss(model, {"latents": latents}).loss, model.codes
        torch.manual_seed(0)
        expected = compute_loss(model, {"pixels": pixels}).loss
        assert torch.equal(codes, model.codes)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)

    def test_stochastic_codes_are_other_ones_every_time(self, vae, model, latents):
        compute_loss = RQTransformerLoss(vae)
        sampled = []
        for _ in range(2):
            compute_loss(model, {"latents": latents})
            assert torch.equal(model.arguments["residuals"][..., 0, :], latents.float())
            sampled.append(model.codes)
        assert all(not torch.equal(first, second) for first, second in zip(*sampled))

    def test_soft_labels_without_stochastic_codes_follow_the_nearest_codes(self, vae, model, latents):
        codes, residuals = vae.quantizer.encode(latents)
        output = RQTransformerLoss(vae, soft_label_temperature=0.3, stochastic_codes=False)(
            model, {"latents": latents}
        )
        assert torch.equal(model.codes, codes)
        expected = model.transformer(codes, residuals=residuals, target_temperature=0.3)
        torch.testing.assert_close(output.loss, expected.loss)
        assert not torch.isclose(output.loss, model.transformer(codes, labels=codes).loss)

    def test_hard_labels_are_the_nearest_codes(self, vae, model, latents):
        codes, _ = vae.quantizer.encode(latents)
        output = RQTransformerLoss(vae, soft_label_temperature=None)(model, {"latents": latents})
        assert torch.equal(model.codes, codes)
        expected = model.transformer(codes, labels=codes)
        torch.testing.assert_close(output.loss, expected.loss)
        depth_losses = [output.metrics[f"loss_depth_{d}"] for d in range(1, D + 1)]
        torch.testing.assert_close(torch.stack(depth_losses), expected.depth_losses)

    def test_drops_about_the_given_share_of_conditions(self, vae):
        cond_ids = torch.arange(2000)[:, None].expand(-1, 3) % 4
        dropped = RQTransformerLoss(vae, null_cond_id=4, cond_dropout=0.25).drop_conditions(cond_ids)
        rows = (dropped == 4).all(dim=1)
        assert torch.equal(dropped[~rows], cond_ids[~rows])
        assert 400 < rows.sum() < 600

    def test_without_a_null_condition_drops_none(self, vae):
        cond_ids = torch.zeros(100, 1, dtype=torch.long)
        assert torch.equal(RQTransformerLoss(vae, cond_dropout=0.9).drop_conditions(cond_ids), cond_ids)


@pytest.mark.parametrize("kind, tag", [("text", "text-to-image"), ("class", "unconditional-image-generation")])
def test_card_says_what_the_model_is_and_how_to_use_it(kind, tag):
    card = ModelCard(pipeline_card(tiny_transformer(kind), call='pipe("a prompt")'))
    assert (card.data.library_name, card.data.pipeline_tag, card.data.tags) == ("rq_hf", tag, ["rq-transformer"])
    assert 'pipe("a prompt").images' in card.text
