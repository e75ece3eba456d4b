"""Drawing codes from logits: temperature, top-k, top-p, and where the random numbers come from.

Shapes: `B` images, `D` quantization depth, `K` codebook size, `R` candidates for a code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Below this p most codes that are drawn would be outside the nucleus: it is found by sorting instead.
MIN_ACCEPTANCE = 0.5

Generators = torch.Generator | Sequence[torch.Generator | int] | None


def check_generator(generator: Generators, batch_size: int) -> None:
    """Raises `TypeError`/`ValueError` unless this is one generator, or a generator or seed for every image."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, list | tuple) or not all(isinstance(g, torch.Generator | int) for g in generator):
        raise TypeError(f"generator must be a torch.Generator, or a list of them or of seeds, got {generator!r}")
    if len(generator) != batch_size:
        raise ValueError(f"one generator per image needed, got {len(generator)} for {batch_size} images")
    objects = [g for g in generator if isinstance(g, torch.Generator)]
    if len({id(g) for g in objects}) < len(objects):
        raise ValueError("every image needs a generator of its own, got one of them twice")


def draw_uniform(generator: Generators, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Float64 numbers in [0, 1) of shape `(B, ...)`; with a generator per image, every image has those of its own."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if isinstance(generator, Sequence):
        generators = [torch.Generator().manual_seed(g) if isinstance(g, int) else g for g in generator]
        rows = [torch.rand(shape[1:], generator=g, device=g.device, dtype=dtype).to(device) for g in generators]
        return torch.stack(rows)
    where = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=where, dtype=dtype).to(device)


@dataclass(frozen=True)
class CodeSampler:
    """
    How codes are drawn from logits.

    Args:
        do_sample: `False` takes the most likely code each time.
        temperature, top_k, top_p: one per depth; temperatures are a tensor, for they vary and compiled steps need not.
    """

    do_sample: bool
    temperature: torch.Tensor
    top_k: Sequence[int]
    top_p: Sequence[float]

    @property
    def num_candidates(self) -> int:
        """R, the uniform numbers that every code needs."""
        return max(num_candidates(p) for p in self.top_p)

    def draw(self, logits: torch.Tensor, uniform: torch.Tensor | None, depth: int) -> torch.Tensor:
        """Codes `(B,)` of the depth with this index from float32 logits `(B, K)` and `(B, D, R)` numbers in [0, 1)."""
        if not self.do_sample:
            return logits.argmax(dim=-1)
        logits = logits / self.temperature[depth]
        return draw_codes(logits, self.top_k[depth], self.top_p[depth], uniform[:, depth])


def num_candidates(top_p: float) -> int:
    """So many codes are drawn until one is inside the nucleus: that none is, is less likely than the rounding (2⁻⁵³)
    of the uniform numbers that they are drawn by."""
    if top_p == 1 or top_p < MIN_ACCEPTANCE:
        return 1
    return math.ceil(53 / -math.log2(1 - top_p))


def draw_codes(logits: torch.Tensor, top_k: int, top_p: float, uniform: torch.Tensor) -> torch.Tensor:
    """
    One code per row of logits `(B, K)` float32, distributed as softmax([`filter_logits`]): `(B,)`.

    The numbers `(B, R)` in [0, 1), R ≥ [`num_candidates`], are looked up in the cumulative distribution. For top-p
    nothing is sorted: of these candidates the first one inside the nucleus is taken.
    """
    count = num_candidates(top_p)
    if count > 1:
        masses = logits.softmax(dim=-1)
        if top_k < logits.shape[-1]:
            masses = masses * (logits >= kth_largest(logits, top_k))
    else:
        masses = filter_logits(logits, top_k, top_p).softmax(dim=-1)
    cumulative = masses.cumsum(dim=-1, dtype=uniform.dtype)
    candidates = look_up(cumulative, uniform[:, :count])
    if count == 1:
        return candidates[:, 0]
    return first_inside(masses, candidates, top_p * cumulative[:, -1])


def must_not_wait(logits: torch.Tensor) -> bool:
    """Whether looking at a result would hold up a device, or end a graph that is being compiled."""
    return logits.device.type != "cpu" or torch.compiler.is_compiling()


def look_up(cumulative: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The codes into whose shares of the cumulative masses `(B, K)` numbers `(B, R)` in [0, 1) fall: `(B, R)`."""
    total = cumulative[:, -1:].contiguous()
    codes = torch.searchsorted(cumulative, uniform * total, right=True)
    last_possible = torch.searchsorted(cumulative, total)  # the product may be rounded up to the total; NaN is beyond
    return torch.minimum(codes, last_possible).clamp(max=cumulative.shape[-1] - 1)


def first_inside(masses: torch.Tensor, candidates: torch.Tensor, nucleus: torch.Tensor) -> torch.Tensor:
    """
    The first of the candidates `(B, R)` that is inside the nucleus, and the first of all if none is: `(B,)`.

    A code is inside while its [`mass_before`], of masses `(B, K)`, is below `nucleus` `(B,)`. On a CPU that is looked
    at by numpy, row after row: most often one candidate is enough.
    """
    if must_not_wait(masses):
        inside = torch.stack([mass_before(masses, codes) < nucleus for codes in candidates.unbind(-1)], dim=-1)
        return candidates.gather(-1, inside.int().argmax(dim=-1, keepdim=True)).squeeze(-1)

    def is_inside(row, code, limit):
        own = row[code]
        return row[row > own].sum() + (row[:code] == own).sum() * own < limit

    rows = zip(masses.numpy(), candidates.tolist(), nucleus.tolist())
    chosen = [next((code for code in codes if is_inside(row, code, limit)), codes[0]) for row, codes, limit in rows]
    return torch.tensor(chosen)


def mass_before(masses: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The mass, of masses `(B, K)`, that codes likelier than `codes` `(B,)` have, or as likely and lower: `(B,)`."""
    codes = codes[:, None]
    own = masses.gather(-1, codes)
    lower = torch.arange(masses.shape[-1], device=codes.device) < codes
    before = (masses > own) | ((masses == own) & lower)
    return (masses * before).sum(dim=-1)


def kth_largest(logits: torch.Tensor, k: int) -> torch.Tensor:
    """`(B, K)` -> `(B, 1)`. On a CPU by numpy, whose selection is five times as fast as torch's."""
    if not must_not_wait(logits):
        rank = logits.shape[-1] - k
        return torch.from_numpy(np.partition(logits.numpy(), rank, axis=-1)[:, rank : rank + 1])
    return logits.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)


def filter_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Sets all but the top-k, and of these all but the top-p nucleus, to −inf. Logits `(B, K)` float32 -> `(B, K)`.

    Codes equal to the k-th largest logit are all kept. A code is kept while the mass *before* it, under the softmax of
    what top-k kept, is below p; the most likely one always is. Of equally likely codes lower ones come first.
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
