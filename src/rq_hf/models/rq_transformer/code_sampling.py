"""Sampling codes from logits: temperature, top-k and top-p.

Shapes: `B` images, `D` quantization depth, `K` codebook size, `R` proposals for a code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Below this p most proposals would fall outside the nucleus, so the nucleus is found by sorting instead.
MIN_ACCEPTANCE = 0.5


@dataclass(frozen=True)
class CodeSampler:
    """
    How codes are sampled from logits.

    Args:
        do_sample: `False` takes the most likely code each time.
        temperature, top_k, top_p: one per depth; temperatures are a tensor, so that changing them does not trigger
            recompilation.
    """

    do_sample: bool
    temperature: torch.Tensor
    top_k: Sequence[int]
    top_p: Sequence[float]

    @property
    def num_proposals(self) -> int:
        """R, the number of uniform numbers per code."""
        return max(num_proposals(p) for p in self.top_p)

    def sample(self, logits: torch.Tensor, uniform: torch.Tensor | None, d: int) -> torch.Tensor:
        """Codes `(B,)` of depth index d from float32 logits `(B, K)` and numbers `(B, D, R)` in [0, 1)."""
        if not self.do_sample:
            return logits.argmax(dim=-1)
        return sample_codes(logits / self.temperature[d], self.top_k[d], self.top_p[d], uniform[:, d])


def num_proposals(top_p: float) -> int:
    """Number of proposals after which the chance that none lies in the nucleus is below 2⁻⁵³, the rounding of the
    uniform numbers."""
    if top_p == 1 or top_p < MIN_ACCEPTANCE:
        return 1
    return math.ceil(53 / -math.log2(1 - top_p))


def sample_codes(logits: torch.Tensor, top_k: int, top_p: float, uniform: torch.Tensor) -> torch.Tensor:
    """
    One code per row of logits `(B, K)` float32, distributed as softmax([`filter_logits`]): `(B,)`.

    The cumulative distribution is inverted at the numbers `(B, R)` in [0, 1), R ≥ [`num_proposals`]. Top-p needs no
    sorting: the first of these proposals that lies in the nucleus is accepted.
    """
    count = num_proposals(top_p)
    if count > 1:
        masses = logits.softmax(dim=-1)
        if top_k < logits.shape[-1]:
            masses = masses * (logits >= kth_largest(logits, top_k))
    else:
        masses = filter_logits(logits, top_k, top_p).softmax(dim=-1)
    cumulative = masses.cumsum(dim=-1, dtype=uniform.dtype)
    proposals = invert_cdf(cumulative, uniform[:, :count])
    if count == 1:
        return proposals[:, 0]
    return first_in_nucleus(masses, proposals, top_p * cumulative[:, -1])


def avoid_host_sync(logits: torch.Tensor) -> bool:
    """Whether reading a value on the host would synchronise with the device or break a compiled graph."""
    return logits.device.type != "cpu" or torch.compiler.is_compiling()


def invert_cdf(cumulative: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverts the cumulative masses `(B, K)` at uniform numbers `(B, R)` in [0, 1): codes `(B, R)`."""
    total = cumulative[:, -1:].contiguous()
    codes = torch.searchsorted(cumulative, uniform * total, right=True)
    last_possible = torch.searchsorted(cumulative, total)  # the product may be rounded up to the total; NaN is beyond
    return torch.minimum(codes, last_possible).clamp(max=cumulative.shape[-1] - 1)


def first_in_nucleus(masses: torch.Tensor, proposals: torch.Tensor, nucleus: torch.Tensor) -> torch.Tensor:
    """
    The first of the proposals `(B, R)` that lies in the nucleus, or the first of all if none does: `(B,)`.

    A code lies in the nucleus if its [`preceding_mass`] under masses `(B, K)` is below `nucleus` `(B,)`. On a CPU,
    NumPy checks the rows one by one; usually the first proposal is accepted.
    """
    if avoid_host_sync(masses):
        inside = torch.stack([preceding_mass(masses, codes) < nucleus for codes in proposals.unbind(-1)], dim=-1)
        return proposals.gather(-1, inside.int().argmax(dim=-1, keepdim=True)).squeeze(-1)

    def is_inside(row, code, limit):
        own = row[code]
        return row[row > own].sum() + (row[:code] == own).sum() * own < limit

    rows = zip(masses.numpy(), proposals.tolist(), nucleus.tolist())
    chosen = [next((code for code in codes if is_inside(row, code, limit)), codes[0]) for row, codes, limit in rows]
    return torch.tensor(chosen)


def preceding_mass(masses: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Total mass under masses `(B, K)` of the codes ranked before `codes` `(B,)`: more likely, or equally likely with
    a lower index. `(B,)`"""
    codes = codes[:, None]
    own = masses.gather(-1, codes)
    lower = torch.arange(masses.shape[-1], device=codes.device) < codes
    before = (masses > own) | ((masses == own) & lower)
    return (masses * before).sum(dim=-1)


def kth_largest(logits: torch.Tensor, k: int) -> torch.Tensor:
    """`(B, K)` -> `(B, 1)`. On a CPU by NumPy, whose selection is five times as fast as torch's."""
    if not avoid_host_sync(logits):
        rank = logits.shape[-1] - k
        return torch.from_numpy(np.partition(logits.numpy(), rank, axis=-1)[:, rank : rank + 1])
    return logits.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)


def filter_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Sets all but the top-k, and of these all but the top-p nucleus, to −inf. Logits `(B, K)` float32 -> `(B, K)`.

    Codes equal to the k-th largest logit are all kept. A code is kept while the mass *before* it, under the softmax
    over the codes that top-k kept, is below p; the most likely one always is. Equally likely codes rank by index.
    """
    if top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < kth_largest(logits, top_k), -math.inf)
    if top_p < 1:
        probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        mass = probabilities.cumsum(dim=-1) - probabilities
        outside = (mass >= top_p) & (mass > 0)
        outside = torch.zeros_like(outside).scatter_(-1, order, outside)
        logits = logits.masked_fill(outside, -math.inf)
    return logits
