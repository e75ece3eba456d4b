"""Residual quantization (Lee et al., "Autoregressive Image Generation using Residual Quantization", CVPR 2022).

Section 3.1 of the paper in plain PyTorch. Shapes: `N` vectors (any leading shape), `C` channels of a vector =
dimension of a codeword, `K` codebook size, `D` quantization depth, `M` codebooks (1 when all depths share it, else D).
Codebooks of different sizes are padded to the largest, K.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from torch import nn

from ...argument_checks import (
    LARGEST_SIZE,
    as_plain,
    check_bool,
    check_choice,
    check_finite,
    check_floating,
    check_instance,
    check_int64,
    check_integer,
    check_number,
    check_range,
    check_size,
    check_temperature,
)
from ..codes import embed_codes
from ..offloading import check_not_offloaded, onload_weights
from .nearest_codes import balanced_nearest, beam_search, in_chunks, k_means, nearest, sample_codes, soft_targets


@dataclass
class QuantizerOutput(BaseOutput):
    """
    Args:
        quantized (`torch.Tensor` of shape `(..., C)`): sum of the D codewords, with the straight-through gradient.
        codes (`torch.Tensor` of shape `(..., D)`, int64): the chosen codes, coarse to fine.
        commitment_loss (`torch.Tensor`, scalar): mean over all partial sums and channels of (z − sg[ẑ⁽ᵈ⁾])² (eq. 7).
        codebook_loss (`torch.Tensor`, scalar, or `None`): the same with the gradient on the codewords; only when the
            codebook is trained by gradient (VQ-VAE, van den Oord et al. 2017, eq. 3).
    """

    # Defaults let accelerate rebuild the output field by field under mixed precision.
    quantized: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    codebook_loss: torch.Tensor | None = None


class QuantizerEncoding(NamedTuple):
    """
    Args:
        codes (`torch.Tensor` of shape `(..., D)`, int64): the codes, coarse to fine.
        residuals (`torch.Tensor` of shape `(..., D, C)`, float32, or float64 like the vectors): residual d is what
            code d approximates.
    """

    codes: torch.Tensor
    residuals: torch.Tensor


class ResidualQuantizer(nn.Module):
    """
    Approximates vectors z by sums of D codewords: r⁽⁰⁾ = z, and for d = 1..D (eqs. 3 to 5)

        k_d = argmin_k ‖r⁽ᵈ⁻¹⁾ − e(k)‖²,    r⁽ᵈ⁾ = r⁽ᵈ⁻¹⁾ − e(k_d),    ẑ⁽ᵈ⁾ = Σ_{i≤d} e(k_i)

    In training mode `codebook_update="ema"` moves every codeword to the running mean of the residuals assigned to it,
    depth after depth, so that a shared codebook is updated D times a step and depth d+1 already sees the update of
    depth d. Codewords that attract fewer than one residual per update are restarted at residuals of the batch.
    `codebook_update="gradient"` trains the codebook with the codebook loss instead; with depth 1 this is the VQ-VAE.

    All arithmetic is float32, also under autocast, or float64 in [`encode`] of float64 vectors. Memory is
    O(N·C + K·C); in a process group all ranks count the residuals of all ranks, and their codebooks stay
    bit-identical.

    Args:
        codebook_size (`int`, or one per codebook): K.
        codebook_dim (`int`): C.
        depth (`int`): D.
        shared_codebook (`bool`): one codebook for all depths (as in the paper) or one per depth.
        codebook_update (`str`): `"ema"` or `"gradient"`.
        ema_decay (`float`, or one per codebook): decay of the running counts and sums, in [0, 1).
        restart_unused_codes (`bool`): whether dead codewords are restarted (`"ema"` only).
        quantizer_dropout (`float`): share of the images of a training batch, in [0, 1], quantized to a random
            number of depths, so that a prefix of the codes is decodable; codes, losses and codebook updates are those
            of all depths.
        epsilon (`float`): Laplace smoothing of the running counts, greater than 0.

    Raises:
        `ValueError` or `TypeError` for arguments out of these ranges or of another type.
    """

    no_weight_decay = ("codebook",)  # parameters that weight decay would pull away from their vectors
    # Moving averages already; and an average over the restarts of a codeword is near none of its vectors.
    no_averaging = ("codebook", "cluster_size", "cluster_sum")

    def __init__(
        self,
        codebook_size: int | Sequence[int],
        codebook_dim: int,
        depth: int,
        shared_codebook: bool = True,
        codebook_update: str = "ema",
        ema_decay: float | Sequence[float] = 0.99,
        restart_unused_codes: bool = True,
        quantizer_dropout: float = 0.0,
        epsilon: float = 1e-5,
    ):
        super().__init__()
        check_size("codebook_dim", codebook_dim)
        check_size("depth", depth)
        check_bool("shared_codebook", shared_codebook)
        check_bool("restart_unused_codes", restart_unused_codes)
        check_choice("codebook_update", codebook_update, ("ema", "gradient"))
        num_codebooks = 1 if shared_codebook else depth
        codebook_size, ema_decay = as_plain(codebook_size), as_plain(ema_decay)
        sizes = per_codebook("codebook_size", codebook_size, num_codebooks)
        for size in sizes:
            check_size("codebook_size", size)
        for decay in per_codebook("ema_decay", ema_decay, num_codebooks):
            check_number("ema_decay", decay, "lie in [0, 1)")
        check_number("quantizer_dropout", quantizer_dropout, "lie in [0, 1]")
        check_number("epsilon", epsilon, "be greater than 0")
        self.codebook_size = codebook_size
        self.codebook_sizes = tuple(sizes) * (depth if shared_codebook else 1)  # of every depth
        self.codebook_dim = codebook_dim
        self.depth = depth
        self.shared_codebook = shared_codebook
        self.codebook_update = codebook_update
        self.ema_decay = ema_decay
        self.restart_unused_codes = restart_unused_codes
        self.quantizer_dropout = quantizer_dropout
        self.epsilon = epsilon

        codebook = torch.randn(num_codebooks, max(sizes), codebook_dim)  # (M, K, C)
        for m, size in enumerate(sizes):
            codebook[m, size:] = 0
        self.codebook = nn.Parameter(codebook, requires_grad=codebook_update == "gradient")
        if codebook_update == "ema":
            self.register_buffer("cluster_size", torch.zeros(codebook.shape[:2]))  # (M, K) running counts
            self.register_buffer("cluster_sum", codebook.clone())  # (M, K, C) running sums

    def codebook_at(self, d: int) -> torch.Tensor:
        """The codebook of depth index d (0-based), `(K, C)` float32."""
        return self.codebook[0 if self.shared_codebook else d, : self.codebook_sizes[d]].float()

    def forward(self, z: torch.Tensor) -> QuantizerOutput:
        """Quantizes `z` of shape `(..., C)`; in training mode also updates the codebook (see the class).

        Raises `ValueError` when the last dimension is not C, and for vectors that are NaN or infinite, which have no
        codes and from which a codebook would not recover; `TypeError` for integers.
        """
        self._check_vectors(z)
        with torch.autocast(z.device.type, enabled=False):
            inputs = z.float().reshape(-1, self.codebook_dim)  # (N, C)
            check_finite("vectors", inputs)
            residual = inputs.detach()
            partial_sum = quantized = torch.zeros_like(residual)
            last_depth = self._sample_last_depths(z)  # (N, 1), or None where all depths are summed
            codes, commitment, codebook_loss = [], [], []
            for d in range(self.depth):
                code = nearest(residual, self.codebook_at(d))  # (N,)
                codeword = F.embedding(code, self.codebook_at(d))  # (N, C)
                if self.training and self.codebook_update == "ema":
                    self._update_codebook(residual, code, d)
                residual = residual - codeword.detach()
                partial_sum = partial_sum + codeword
                quantized = partial_sum if last_depth is None else torch.where(d > last_depth, quantized, partial_sum)
                codes.append(code)
                commitment.append(F.mse_loss(inputs, partial_sum.detach()))
                codebook_loss.append(F.mse_loss(partial_sum, inputs.detach()))

            straight_through = inputs + (quantized - inputs).detach()
        return QuantizerOutput(
            quantized=straight_through.reshape(z.shape).to(z.dtype),
            codes=torch.stack(codes, dim=-1).reshape(*z.shape[:-1], self.depth),
            commitment_loss=torch.stack(commitment).mean(),
            codebook_loss=torch.stack(codebook_loss).mean() if self.codebook_update == "gradient" else None,
        )

    @onload_weights
    @torch.no_grad()
    def encode(
        self,
        z: torch.Tensor,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
        beam_size: int = 1,
    ) -> QuantizerEncoding:
        """
        Codes of `z` `(..., C)` and the residuals that they quantize; never updates the codebook.

        Args:
            temperature: τ > 0 samples the codes from softmax(−‖r − e(k)‖²/τ), the stochastic codes of section 3.2.3;
                `None` takes the nearest ones.
            beam_size: how many partial sums are kept at every depth. 1 chooses code after code, as the paper does;
                more find sums nearer to z, whose first codes need not be the nearest, see [`beam_search`].

        Raises `ValueError` for another number of channels, NaN or infinite vectors, τ ≤ 0, and for τ together with
        more than one beam; `TypeError` for arguments of other types.
        """
        self._check_vectors(z)
        if temperature is not None:
            check_temperature("temperature", temperature)
            temperature = float(temperature)
        if generator is not None:
            check_instance("generator", generator, torch.Generator)
        check_size("beam_size", beam_size)
        beam_size = int(beam_size)
        if temperature is not None and beam_size > 1:
            raise ValueError(f"codes are either sampled or searched: got temperature={temperature} and {beam_size=}")
        with torch.autocast(z.device.type, enabled=False):
            residual = (z if z.dtype == torch.float64 else z.float()).reshape(-1, self.codebook_dim)
            check_finite("vectors", residual)
            codebooks = [self.codebook_at(d).to(residual.dtype) for d in range(self.depth)]
            found = beam_search(residual, codebooks, beam_size) if beam_size > 1 else None  # (N, D)
            codes, residuals = [], []
            for d, codebook in enumerate(codebooks):
                if found is not None:
                    code = found[:, d]
                elif temperature is None:
                    code = nearest(residual, codebook)
                else:
                    code = sample_codes(residual, codebook, temperature, generator)
                codes.append(code)
                residuals.append(residual)
                residual = residual - F.embedding(code, codebook)
        return QuantizerEncoding(
            torch.stack(codes, dim=-1).reshape(*z.shape[:-1], self.depth),
            torch.stack(residuals, dim=-2).reshape(*z.shape[:-1], self.depth, self.codebook_dim),
        )

    @onload_weights
    @torch.no_grad()
    def balanced_codes(self, residuals: torch.Tensor) -> torch.Tensor:
        """Codes `(N,)` of the last depth for its residuals `(N, C)`, of which none serves more than ⌈N/K⌉, see
        [`balanced_nearest`]. Raises like [`encode`]."""
        self._check_vectors(residuals)
        check_finite("vectors", residuals)
        return balanced_nearest(residuals, self.codebook_at(self.depth - 1).to(residuals.dtype))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Sums of the codewords of `codes` `(..., d)`, d ≤ D: `(..., C)`. With d < D, the first partial sums ẑ⁽ᵈ⁾."""
        return self.embed(codes).sum(dim=-2)

    @onload_weights
    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """Codewords of `codes` `(..., d)`, d ≤ D, not summed: `(..., d, C)`."""
        check_int64("codes", codes, "...", "d")
        if codes.shape[-1] > self.depth:
            raise ValueError(f"codes must have at most {self.depth} depths, got {codes.shape[-1]}")
        if len(set(self.codebook_sizes)) == 1:
            check_range("codes", codes, self.codebook_sizes[0])
        else:
            for d, size in enumerate(self.codebook_sizes[: codes.shape[-1]]):
                check_range(f"codes of depth {d + 1}", codes[..., d], size)
        return embed_codes(codes, self.codebook)

    @onload_weights
    @torch.no_grad()
    def get_soft_codes(
        self,
        z: torch.Tensor,
        temperature: float = 1.0,
        stochastic: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Soft targets softmax(−‖r − e(k)‖²/τ) of every depth (section 3.2.3) and the codes they are conditioned on.

        Args:
            temperature: τ > 0, in units of squared distance.
            stochastic: sample the codes from the soft targets instead of taking the nearest.

        Returns:
            targets `(..., D, K)` float32 and codes `(..., D)` int64.

        Raises `ValueError` and `TypeError` like [`encode`].
        """
        check_temperature("temperature", temperature)
        check_bool("stochastic", stochastic)
        temperature = float(temperature)
        codes, residuals = self.encode(z, temperature if stochastic else None, generator)
        targets = [soft_targets(residuals[..., d, :], self.codebook_at(d), temperature) for d in range(self.depth)]
        return torch.stack(targets, dim=-2), codes

    @torch.no_grad()
    def initialize(self, vectors: torch.Tensor, iterations: int = 10) -> None:
        """
        Sets the codebook by k-means on vectors `(..., C)`. A codebook per depth: each on the residuals that the
        codebooks before it leave. One shared codebook: first on the vectors, then on the residuals of all depths.

        Raises `ValueError` for fewer vectors than codewords, for vectors that are NaN or infinite, and while the
        codebook is offloaded.
        """
        check_not_offloaded(self, "codebook")
        self._check_vectors(vectors)
        check_integer("iterations", iterations, 0, LARGEST_SIZE)
        vectors = vectors.float().reshape(-1, self.codebook_dim)
        check_finite("vectors", vectors)
        if self.shared_codebook:
            self._set_codebook(0, *k_means(vectors, self.codebook_sizes[0], iterations))
            if self.depth > 1:
                residuals = self.encode(vectors).residuals.flatten(0, 1)  # (N·D, C)
                self._set_codebook(0, *k_means(residuals, self.codebook_sizes[0], iterations))
            return
        residual = vectors.clone()
        for d in range(self.depth):
            self._set_codebook(d, *k_means(residual, self.codebook_sizes[d], iterations))
            for chunk in in_chunks(residual, self.codebook_at(d)):
                chunk -= F.embedding(nearest(chunk, self.codebook_at(d)), self.codebook_at(d))

    def _set_codebook(self, m: int, codewords: torch.Tensor, counts: torch.Tensor) -> None:
        self.codebook[m, : len(codewords)] = codewords
        if self.codebook_update == "ema":
            self.cluster_size[m, : len(codewords)] = counts
            self.cluster_sum[m, : len(codewords)] = codewords * counts[:, None]

    def _check_vectors(self, z: torch.Tensor) -> None:
        check_floating("vectors", z, "...", self.codebook_dim)

    def _sample_last_depths(self, z: torch.Tensor) -> torch.Tensor | None:
        """The depth index at which the sum of each vector of `z` `(B, ..., C)` ends, one per image: `(N, 1)`."""
        if not (self.training and self.quantizer_dropout):
            return None
        batch_size, device = len(z), z.device
        last_depth = torch.randint(self.depth, (batch_size,), device=device)
        kept_whole = torch.rand(batch_size, device=device) >= self.quantizer_dropout
        last_depth = last_depth.masked_fill(kept_whole, self.depth - 1)
        return last_depth.repeat_interleave(z.numel() // (batch_size * self.codebook_dim))[:, None]

    @torch.no_grad()
    def _update_codebook(self, residual: torch.Tensor, code: torch.Tensor, d: int) -> None:
        """Moves the codewords of depth d towards the means of their residuals `(N, C)`, in the authors' order."""
        m, size = 0 if self.shared_codebook else d, self.codebook_sizes[d]
        count = torch.bincount(code, minlength=size).to(residual.dtype)  # (K,)
        total = residual.new_zeros(size, self.codebook_dim).index_add_(0, code, residual)  # (K, C)
        fresh = self._restart_candidates(residual, size) if self.restart_unused_codes else None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            dist.all_reduce(total)
            if fresh is not None:
                dist.broadcast(fresh, src=0)

        decay = self.ema_decay[m] if isinstance(self.ema_decay, Sequence) else self.ema_decay
        cluster_size, cluster_sum = self.cluster_size[m, :size], self.cluster_sum[m, :size]
        cluster_size.mul_(decay).add_(count, alpha=1 - decay)
        cluster_sum.mul_(decay).add_(total, alpha=1 - decay)
        if fresh is not None:
            dead = cluster_size < 1
            cluster_sum.copy_(torch.where(dead[:, None], fresh, cluster_sum))
            cluster_size.masked_fill_(dead, 1)

        # Laplace smoothing keeps empty clusters away from a division by zero.
        n = cluster_size.sum()
        smoothed = n * (cluster_size + self.epsilon) / (n + size * self.epsilon)
        self.codebook[m, :size] = cluster_sum / smoothed[:, None]

    def _restart_candidates(self, residual: torch.Tensor, size: int) -> torch.Tensor:
        """K residuals of the batch in random order, repeated with a little noise where N < K. (N, C) -> (K, C)"""
        repeats = -(-size // len(residual))
        if repeats > 1:
            noise = torch.rand(repeats, *residual.shape, device=residual.device).mul_(0.01 / self.codebook_dim**0.5)
            residual = noise.add_(residual).flatten(0, 1)
        return residual[torch.randperm(len(residual), device=residual.device)[:size]]

    def extra_repr(self) -> str:
        return (
            f"codebook_size={self.codebook_size}, codebook_dim={self.codebook_dim}, depth={self.depth}, "
            f"shared_codebook={self.shared_codebook}, codebook_update={self.codebook_update!r}"
        )


def per_codebook(name: str, value, count: int) -> list:
    """A value for each of `count` codebooks, from one for all or a list. Raises `ValueError` for a list of another
    length."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must be a number or one per codebook ({count}), got {value}")
    return list(value)
