"""Nearest codewords and soft targets, both by one matrix product, and k-means on top of them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

# Maximum number of (vector, codeword) distances per chunk: 16 MiB of float32, which caches hold.
MAX_DISTANCES = 2**22


@torch.no_grad()
def nearest(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """argmin over k of ‖v − e(k)‖², which is that of ‖e(k)‖² − 2 v·e(k). (N, C), (K, C) -> (N,)"""
    weight, bias = -2 * codebook, codebook.square().sum(dim=-1)
    return torch.cat([linear(chunk, weight, bias).argmin(dim=-1) for chunk in in_chunks(vectors, codebook)])


def beam_search(vectors: torch.Tensor, codebooks: Sequence[torch.Tensor], beam_size: int) -> torch.Tensor:
    """
    Codes of vectors `(N, C)` in D codebooks `(K, C)`, chosen together: `(N, D)`.

    After every depth the `beam_size` partial sums nearest to each vector are kept, of all that continue those kept
    before (Babenko and Lempitsky, "Additive Quantization", CVPR 2014, section 3.2). Where depths share a codebook, two
    orders of the same codewords are two of them.
    """
    rows = max(1, MAX_DISTANCES // (beam_size * max(map(len, codebooks))))
    return torch.cat([_beam_search(chunk, codebooks, beam_size) for chunk in vectors.split(rows)])


def _beam_search(vectors: torch.Tensor, codebooks: Sequence[torch.Tensor], beam_size: int) -> torch.Tensor:
    num_vectors, dim = vectors.shape
    codes = torch.empty(num_vectors, 1, 0, dtype=torch.long, device=vectors.device)  # (N, beams, d)
    residuals = vectors[:, None]  # (N, beams, C)
    for codebook in codebooks:
        products = linear(residuals.reshape(-1, dim), -2 * codebook, codebook.square().sum(dim=-1))
        distances = products.view(num_vectors, -1, len(codebook)) + residuals.square().sum(dim=-1, keepdim=True)
        distances = distances.flatten(1)  # (N, beams·K)
        best = distances.topk(min(beam_size, distances.shape[1]), largest=False).indices
        beam, code = best // len(codebook), best % len(codebook)
        codes = torch.cat([codes.take_along_dim(beam[..., None], dim=1), code[..., None]], dim=-1)
        residuals = residuals.take_along_dim(beam[..., None], dim=1) - codebook[code]
    return codes[:, 0]


def balanced_nearest(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """
    A near codeword for every vector, so that none serves more than ⌈N/K⌉ of them. (N, C), (K, C) -> (N,)

    Vectors ask for codewords in the order of their distance, and a codeword keeps the nearest of those that ask
    (deferred acceptance, Gale and Shapley 1962): no vector and codeword would both rather have each other.
    """
    capacity = -(-len(vectors) // len(codebook))
    code = torch.empty(len(vectors), dtype=torch.long, device=vectors.device)
    distance = vectors.new_empty(len(vectors))
    limit = vectors.new_full((len(codebook),), torch.inf)  # a full codeword takes only what is nearer
    weight, bias = -2 * codebook, codebook.square().sum(dim=-1)
    asking = torch.arange(len(vectors), device=vectors.device)
    while len(asking):
        for rows in in_chunks(asking, codebook):
            distances = linear(vectors[rows], weight, bias) + vectors[rows].square().sum(dim=-1, keepdim=True)
            distance[rows], code[rows] = distances.masked_fill(distances >= limit, torch.inf).min(dim=-1)
        order = distance.argsort(stable=True)
        order = order[code[order].argsort(stable=True)]  # by codeword, then by distance
        counts = torch.bincount(code, minlength=len(codebook))
        ends = counts.cumsum(dim=0)
        rank = torch.arange(len(order), device=order.device) - (ends - counts)[code[order]]
        last = order[(ends - counts + capacity - 1).clamp(max=len(order) - 1)]
        limit = torch.where(counts >= capacity, distance[last], limit)
        asking = order[rank >= capacity]
    return code


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
    """`F.linear` of vectors `(N, C)`, weight `(K, C)` and bias `(K,)` of one type, also under autocast: `(N, K)`.

    In float32 on a CPU it is a 1×1 convolution, because torch leaves those to oneDNN: up to twice as fast as its
    matrix product.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        if vectors.device.type != "cpu" or vectors.dtype != torch.float32:
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
