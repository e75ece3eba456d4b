import math

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_embedding, tiny_vectors

from rq_hf import RQEmbeddingModel, SemanticIds
from rq_hf.metrics import codebook_usage, count_codes
from rq_hf.training import RQEmbeddingLoss, evaluate_semantic_ids, initialize_embedding_model


def loss_and_gradients(model, vectors, **options):
    output = RQEmbeddingLoss(model, **options)(model, {"vectors": vectors})
    output.loss.backward()
    return output, {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


class TestRQEmbeddingLoss:
    def test_is_the_error_and_the_commitment_relative_to_variances(self):
        model, vectors = tiny_embedding(), tiny_vectors(30)
        loss, _ = loss_and_gradients(model, vectors, commitment_weight=0.5)
        output = model(vectors)
        reconstruction = (output.sample - vectors).square().mean() / model.scale**2
        variance = (output.latents - output.latents.mean(dim=0)).square().mean()
        commitment = output.commitment_loss / (variance + output.commitment_loss)
        torch.testing.assert_close(loss.metrics["loss_reconstruction"], reconstruction)
        torch.testing.assert_close(loss.metrics["loss_commitment"], commitment)
        torch.testing.assert_close(loss.loss, reconstruction + 0.5 * commitment)

    @pytest.mark.parametrize("factor", [2**-12, 2**10])
    def test_does_not_know_the_scale_of_the_vectors(self, factor):
        outcomes = []
        for scale in (1, factor):
            torch.manual_seed(0)
            vectors = scale * tiny_vectors(64)
            model = tiny_embedding().fit(vectors)
            outcomes.append(loss_and_gradients(model, vectors))
        (expected, gradients), (loss, scaled) = outcomes
        torch.testing.assert_close(loss.loss, expected.loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(scaled[name], gradient)

    @pytest.mark.parametrize("factor", [2**-12, 2**10])
    def test_does_not_know_the_scale_of_the_latents(self, factor):
        model, vectors = tiny_embedding(), tiny_vectors(30)
        expected, gradients = loss_and_gradients(model, vectors)
        expected, gradients = expected.loss.item(), {name: grad.clone() for name, grad in gradients.items()}
        model.zero_grad()
        with torch.no_grad():
            for weight in (model.encoder[-1].weight, model.encoder[-1].bias, model.quantizer.codebook):
                weight *= factor
            model.decoder[0].weight /= factor
        loss, scaled = loss_and_gradients(model, vectors)
        assert loss.loss.item() == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(scaled["encoder.0.weight"], gradients["encoder.0.weight"])

    @pytest.mark.parametrize(
        "vectors", [tiny_vectors(1), tiny_vectors(1).expand(2, -1)], ids=["one", "twice the same"]
    )
    def test_vectors_without_variance_have_a_loss_and_gradients(self, vectors):
        model = tiny_embedding()
        loss, gradients = loss_and_gradients(model, vectors)
        assert loss.metrics["loss_commitment"].item() == pytest.approx(1)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        with torch.no_grad():
            model.quantizer.codebook[0, 0] = model(vectors).latents[0]
            model.quantizer.codebook[1:, 0] = 0
        loss, gradients = loss_and_gradients(model, vectors)
        assert 0 <= loss.metrics["loss_commitment"] <= 1
        assert all(gradient.isfinite().all() for gradient in gradients.values())

    def test_logs_the_usage_of_levels_of_different_sizes(self):
        model, vectors = tiny_embedding(), tiny_vectors(30)
        loss, codes = loss_and_gradients(model, vectors)[0], model(vectors).codes
        for d, size in enumerate(model.codebook_sizes):
            expected = codebook_usage(count_codes(codes[:, d : d + 1], size))
            assert loss.metrics[f"batch_usage_depth_{d + 1}"] == expected["usage"]
            assert loss.metrics[f"batch_perplexity_depth_{d + 1}"] == expected["perplexity"]

    @pytest.mark.parametrize("weight", [-1, math.nan])
    def test_refuses_another_weight(self, weight):
        with pytest.raises(ValueError, match="commitment_weight must be at least 0"):
            RQEmbeddingLoss(tiny_embedding(), commitment_weight=weight)


def steep_unit_vectors(count, channels):
    """Vectors of norm 1 with a common mean, and variances of their directions that fall like a power."""
    centres = torch.randn(60, channels)[torch.randint(60, (count,))]
    vectors = (centres + 0.5 * torch.randn(count, channels)) / torch.arange(1, channels + 1)
    rotation = torch.linalg.qr(torch.randn(channels, channels)).Q
    return F.normalize(vectors @ rotation + F.normalize(torch.randn(channels), dim=0), dim=1)


@pytest.mark.parametrize("seed", range(3))
def test_trains_all_codes_on_vectors_of_norm_1(seed):
    torch.manual_seed(seed)
    vectors = steep_unit_vectors(2000, 768)
    model = RQEmbeddingModel(768, hidden_dims=(96,), latent_dim=16, codebook_size=32, depth=3)
    initialize_embedding_model(model, vectors, batch_size=128)
    compute_loss = RQEmbeddingLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    model.train()
    for _ in range(600):
        loss = compute_loss(model, {"vectors": vectors[torch.randint(2000, (128,))]}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    report = SemanticIds.encode(model.eval(), list(range(2000)), vectors).report(vectors)
    k_means = RQEmbeddingModel(768, hidden_dims=(), codebook_size=32, depth=3).fit(vectors)
    expected = SemanticIds.encode(k_means, list(range(2000)), vectors).report(vectors)
    assert min(report["usage"]) >= 0.95
    assert report["relative_error"][-1] < 1.35 * expected["relative_error"][-1]


def test_first_codebooks_are_k_means_with_the_weight_of_a_batch():
    model, expected, vectors = tiny_embedding(), tiny_embedding(), tiny_vectors(64)
    expected.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    initialize_embedding_model(model, vectors, batch_size=16)
    torch.manual_seed(0)
    quantizer = expected.fit(vectors).quantizer
    assert torch.equal(model.encode(vectors), expected.encode(vectors))
    torch.testing.assert_close(model.quantizer.cluster_size, quantizer.cluster_size / 4)
    torch.testing.assert_close(model.quantizer.cluster_sum, quantizer.cluster_sum / 4)


def test_held_out_vectors_are_reported_by_depth():
    model, vectors = tiny_embedding(), tiny_vectors(40)
    metrics, report = (
        evaluate_semantic_ids(model, vectors),
        SemanticIds.encode(model, list(range(40)), vectors).report(vectors),
    )
    assert len(metrics) == 12
    for d in range(3):
        for name in ("relative_error", "usage", "perplexity", "collision_rate"):
            assert metrics[f"validation/{name}_depth_{d + 1}"] == report[name][d]
