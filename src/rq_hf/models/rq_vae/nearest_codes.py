"""Nearest codewords and soft targets, both by one matrix product, and k-means on top of them."""

import torch
import torch.nn.functional as F

# Maximum number of (vector, codeword) distances per chunk: 16 MiB of float32, which caches hold.
MAX_DISTANCES = 2**22


@torch.no_grad()
def nearest(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """argmin over k of ‖v − e(k)‖², which is that of ‖e(k)‖² − 2 v·e(k). (N, C), (K, C) -> (N,)"""
    weight, bias = -2 * codebook, codebook.square().sum(dim=-1)
    return torch.cat([linear(chunk, weight, bias).argmin(dim=-1) for chunk in in_chunks(vectors, codebook)])


def in_chunks(vectors: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Vectors `(N, C)` split so that the distances of a chunk fit into caches. An exported graph takes any N, so that
    it has one chunk."""
    if torch.compiler.is_exporting():
        return (vectors,)
    return vectors.split(max(1, MAX_DISTANCES // len(codebook)))


def sample_codes(
    residual: torch.Tensor, codebook: torch.Tensor, temperature: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """One code per residual, sampled from its [`soft_targets`]. (N, C), (K, C) -> (N,)"""
    targets = (soft_targets(chunk, codebook, temperature) for chunk in in_chunks(residual, codebook))
    return torch.cat([t.multinomial(1, generator=generator).squeeze(-1) for t in targets])


def linear(vectors: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`F.linear` of vectors `(N, C)`, weight `(K, C)` and bias `(K,)` in float32, also under autocast: `(N, K)`.

    On a CPU it is a 1×1 convolution, because torch leaves those to oneDNN: up to twice as fast as its matrix product.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        if vectors.device.type != "cpu":
            return F.linear(vectors, weight, bias)
        pixels = vectors[None, :, None].permute(0, 3, 1, 2)  # (1, C, N, 1), channels last
        return F.conv2d(pixels, weight[:, :, None, None], bias).permute(0, 2, 3, 1)[0, :, 0]


def k_means(vectors: torch.Tensor, num_clusters: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Lloyd's algorithm, initialised at random vectors; empty clusters are re-initialised.

    Returns the centres `(K, C)` of vectors `(N, C)`, and how many are nearest to each, `(K,)`. Raises `ValueError`
    where N < K.
    """
    if len(vectors) < num_clusters:
        raise ValueError(f"k-means needs at least as many vectors as clusters ({num_clusters}), got {len(vectors)}")

    def random_vectors(count):
        return vectors[torch.randperm(len(vectors), device=vectors.device)[:count]]

    centres = random_vectors(num_clusters)
    for _ in range(iterations):
        cluster = nearest(vectors, centres)
        counts = torch.bincount(cluster, minlength=num_clusters).to(vectors.dtype)
        sums = torch.zeros_like(centres).index_add_(0, cluster, vectors)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None], random_vectors(num_clusters))
    return centres, torch.bincount(nearest(vectors, centres), minlength=num_clusters).to(vectors.dtype)


def soft_targets(residual: torch.Tensor, codebook: torch.Tensor, temperature: float) -> torch.Tensor:
    """softmax(−‖r − e(k)‖²/τ) over the codebook `(K, C)`: `(..., C)` -> `(..., K)` (section 3.2.3). ‖r‖² cancels."""
    vectors = residual.reshape(-1, residual.shape[-1]) * (2 / temperature)
    logits = linear(vectors, codebook, codebook.square().sum(dim=-1) / -temperature)
    return F.softmax(logits, dim=-1).reshape(*residual.shape[:-1], len(codebook))
