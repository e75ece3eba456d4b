import pytest
import torch
from PIL import Image
from processes import run
from tiny import CONDITIONS, C, D, K, same_state, tiny_pipeline, tiny_pixels, tiny_transformer, tiny_vae

from rq_hf.images import captioned_grid
from rq_hf.training import RQTransformerLoss, create_transformer, effective_codewords, load_transformer
from rq_hf.training.loop import create_accelerator
from rq_hf.training.pipelines import drop_conditions, log_samples, validation_losses

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

    def test_soft_labels_report_their_effective_codewords(self, vae, model, latents):
        output = RQTransformerLoss(vae, soft_label_temperature=0.3, stochastic_codes=False)(
            model, {"latents": latents}
        )
        expected = effective_codewords(vae.quantizer, vae.quantizer.encode(latents[0]).residuals, 0.3)
        actual = [output.metrics[f"effective_codewords_depth_{d}"] for d in range(1, D + 1)]
        torch.testing.assert_close(torch.stack(actual), expected)

    def test_drops_about_the_given_share_of_conditions(self, vae):
        cond_ids = torch.arange(2000)[:, None].expand(-1, 3) % 4
        dropped = drop_conditions(cond_ids, 4, 0.25)
        rows = (dropped == 4).all(dim=1)
        assert torch.equal(dropped[~rows], cond_ids[~rows])
        assert 400 < rows.sum() < 600

    def test_without_a_null_condition_drops_none(self, vae):
        cond_ids = torch.zeros(100, 1, dtype=torch.long)
        assert torch.equal(drop_conditions(cond_ids, None, 0.9), cond_ids)


@pytest.mark.parametrize("split", [8, 5, 1])
def test_validation_losses_are_those_of_the_nearest_codes_and_all_conditions(split):
    vae = tiny_vae(sample_size=2 * GRID)
    transformer = tiny_transformer("class", code_shape=(GRID, GRID, D)).eval()
    transformer.set_codebook(vae.quantizer.codebook)
    pixels, cond_ids = tiny_pixels(8, 2 * GRID, 2 * GRID), torch.arange(8)[:, None] % 4
    training_loss = RQTransformerLoss(vae, null_cond_id=4, soft_label_temperature=0.5, cond_dropout=0.9)
    batches = [{"pixels": p, "cond_ids": c} for p, c in zip(pixels.split(split), cond_ids.split(split))]
    actual = validation_losses(training_loss, transformer, batches)
    codes = vae.get_codes(pixels)
    expected = transformer(codes, cond_ids, labels=codes)
    assert actual["validation/loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    depth_losses = [actual[f"validation/loss_depth_{d}"] for d in range(1, D + 1)]
    torch.testing.assert_close(torch.tensor(depth_losses), expected.depth_losses)


def log_samples_of(kind, arguments, folder):
    torch.manual_seed(0)
    pipeline = tiny_pipeline(kind)
    if kind == "class":
        pipeline.transformer.config.id2label = {0: "cat", 2: "dog"}
    log_samples(create_accelerator(folder, cpu=True), pipeline, arguments, step=3)


@pytest.mark.parametrize(
    "kind, arguments, captions",
    [
        ("text", {"prompt": ["red apple", "fire engine"]}, ["red apple", "fire engine"]),
        ("class", {"class_labels": [2, 0, 1]}, ["dog", "cat", "LABEL_1"]),
        ("none", {"num_images_per_prompt": 2}, ["", ""]),
    ],
)
def test_samples_are_logged_with_their_conditions(kind, arguments, captions, tmp_path):
    outcome = run(log_samples_of, kind, arguments, tmp_path)
    assert outcome.code == 0, outcome.output
    torch.manual_seed(0)
    images = tiny_pipeline(kind)(**arguments, generator=torch.Generator().manual_seed(0)).images
    logged = Image.open(tmp_path / "images" / "samples-0000003.png")
    assert logged.tobytes() == captioned_grid(images, captions).tobytes()
    if captions[0]:
        assert logged.tobytes() != captioned_grid(images, captions[::-1]).tobytes()
