"""Residual quantization of embedding vectors: the objective, and what is measured meanwhile.

Vectors are `(N, input_dim)`, of any scale.
"""

import torch
import torch.nn.functional as F

from ..argument_checks import check_number, check_size
from ..metrics import count_codes
from ..models import RQEmbeddingModel
from ..semantic_ids import SemanticIds
from .loop import LossOutput
from .rq_vae import usage_metrics


class RQEmbeddingLoss:
    """
    (model, batch with `vectors`) -> [`LossOutput`]

        L = ‖X − X̂‖² / σ² + β · L_commit / (Var Z + sg[L_commit]),    L_commit = 1/D · Σ_d ‖Z − sg[Ẑ⁽ᵈ⁾]‖²

    with means instead of sums, where σ is the model's `scale` and Var Z the variance of the batch's latents, which has
    no gradient. Both terms are about 1 or less for vectors and latents of any scale, so that neither swamps the other;
    the variance of vectors of norm 1 with 768 channels is at most 1/768. L_commit stands in the denominator for
    batches of one vector, whose variance is 0.

    Args:
        model: after [`initialize_embedding_model`]; not prepared.
        commitment_weight (`float`): β.
    """

    def __init__(self, model: RQEmbeddingModel, *, commitment_weight: float = 0.1):
        check_number("commitment_weight", commitment_weight, "be at least 0")
        self.model = model
        self.commitment_weight = commitment_weight

    def __call__(self, model: torch.nn.Module, batch: dict) -> LossOutput:
        vectors = batch["vectors"]
        output = model(vectors)
        reconstruction = F.mse_loss(output.sample.float(), vectors) / self.model.scale.square()
        variance = output.latents.detach().float().var(dim=0, unbiased=False).mean()
        spread = variance + output.commitment_loss.detach()
        commitment = output.commitment_loss / spread.clamp(min=torch.finfo(spread.dtype).tiny)
        metrics = {"loss_reconstruction": reconstruction, "loss_commitment": commitment}
        counts = (
            count_codes(codes[:, None], size)[0] for codes, size in zip(output.codes.T, self.model.codebook_sizes)
        )
        metrics |= usage_metrics(counts, prefix="batch_")
        return LossOutput(reconstruction + self.commitment_weight * commitment, metrics)


@torch.no_grad()
def initialize_embedding_model(model: RQEmbeddingModel, vectors: torch.Tensor, batch_size: int) -> None:
    """
    Fits a new model to vectors `(N, input_dim)`, and gives its codebooks the weight of one batch in their moving
    averages. With the weight of all vectors, they would not follow the encoder for hundreds of steps, and most
    codewords would lose their vectors. Raises like [`RQEmbeddingModel.fit`].

    Args:
        batch_size (`int`): vectors that all processes together quantize at once.
    """
    check_size("batch_size", batch_size)
    model.fit(vectors)
    for average in (model.quantizer.cluster_size, model.quantizer.cluster_sum):
        average *= batch_size / len(vectors)


def evaluate_semantic_ids(model: RQEmbeddingModel, vectors: torch.Tensor) -> dict[str, float]:
    """Figures of [`SemanticIds.report`] about held-out vectors, by level or from the first d codes:
    `validation/relative_error_depth_1`, ..."""
    report = SemanticIds.encode(model, list(range(len(vectors))), vectors).report(vectors)
    return {
        f"validation/{name}_depth_{d}": value
        for name in ("relative_error", "usage", "perplexity", "collision_rate")
        for d, value in enumerate(report[name], start=1)
    }
