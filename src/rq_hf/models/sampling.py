"""Drawing codes from logits: temperature, top-k, top-p, and where the random numbers come from.

Shapes: `B` images, `T` positions that are drawn, `D` quantization depth, `K` codebook size.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

# Below this p rejection would try too often: codes are drawn from the nucleus alone, found by sorting.
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


class CodeSampler:
    """
    Draws all codes of one call of `generate`.

    For every code an image has one uniform number, taken at the start from the image's own generator; a code that is
    drawn again takes further ones. With a generator per image its codes therefore do not depend on the others.

    Args:
        generator: one for the batch, or one per image, as generators or seeds; `None` is the default generator.
        shape: `(B, T, D)`.
        do_sample: `False` takes the most likely code each time.
        temperature, top_k, top_p: one per depth.
    """

    def __init__(
        self,
        generator: Generators,
        shape: tuple[int, int, int],
        do_sample: bool,
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        device: torch.device,
    ):
        self.do_sample = do_sample
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.device = device
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.generator = generator
        if isinstance(generator, Sequence):
            self.generator = [torch.Generator().manual_seed(g) if isinstance(g, int) else g for g in generator]
        self.largest_logits = torch.zeros(shape[0], device=device)  # summed up
        if do_sample:
            self.uniform = self._uniform(torch.arange(shape[0]), shape[1:])  # (B, T, D)

    def draw(self, logits: torch.Tensor, position: int, depth: int) -> torch.Tensor:
        """Codes `(B,)` from float32 logits `(B, K)` of the position and depth with these indices."""
        self.largest_logits += logits.amax(dim=-1)
        if not self.do_sample:
            return logits.argmax(dim=-1)
        return draw_codes(
            logits / self.temperature[depth],
            self.top_k[depth],
            self.top_p[depth],
            self.uniform[:, position, depth],
            self._uniform,
        )

    def check(self) -> None:
        """Raises `ValueError` if any logits so far were NaN or +inf. Asked once, for a device would be waited for."""
        if not self.largest_logits.isfinite().all():
            raise ValueError("the model gave logits that are NaN or infinite; in float16, try bfloat16 or float32")

    def _uniform(self, images: torch.Tensor, shape: Sequence[int] = ()) -> torch.Tensor:
        """Numbers in [0, 1) for some images of the batch, `(len(images), *shape)`."""
        if isinstance(self.generator, list):
            rows = [self.generator[i] for i in images.tolist()]
            numbers = [torch.rand(shape, generator=g, device=g.device, dtype=self.dtype).to(self.device) for g in rows]
            return torch.stack(numbers)
        device = self.device if self.generator is None else self.generator.device
        numbers = torch.rand(len(images), *shape, generator=self.generator, device=device, dtype=self.dtype)
        return numbers.to(self.device)


def draw_codes(logits: torch.Tensor, top_k: int, top_p: float, uniform: torch.Tensor, draw_uniform) -> torch.Tensor:
    """
    One code per row of logits `(B, K)` float32, distributed as softmax([`filter_logits`]): `(B,)`.

    `uniform` `(B,)` in [0, 1) is looked up in the cumulative distribution. On a CPU nothing is sorted for top-p: a
    code outside the nucleus is drawn again with new numbers from `draw_uniform`(rows), on average 1/p − 1 times.
    """
    rejects = logits.device.type == "cpu" and MIN_ACCEPTANCE <= top_p < 1
    if rejects:
        masses = logits.softmax(dim=-1)
        if top_k < logits.shape[-1]:
            masses = masses * (logits >= kth_largest(logits, top_k))
    else:
        masses = filter_logits(logits, top_k, top_p).softmax(dim=-1)
    cumulative = masses.cumsum(dim=-1, dtype=uniform.dtype)
    codes = look_up(cumulative, uniform)
    if rejects:
        nucleus = top_p * cumulative[:, -1]
        rows = (mass_before(masses, codes) >= nucleus).nonzero().squeeze(-1)
        while len(rows):
            codes[rows] = look_up(cumulative[rows], draw_uniform(rows))
            rows = rows[mass_before(masses[rows], codes[rows]) >= nucleus[rows]]
    return codes


def look_up(cumulative: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The code into whose share of the cumulative distribution `(B, K)` a number `(B,)` in [0, 1) falls: `(B,)`."""
    total = cumulative[:, -1:].contiguous()
    codes = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    last_possible = torch.searchsorted(cumulative, total)  # the product may be rounded up to the total; NaN is beyond
    return torch.minimum(codes, last_possible).clamp(max=cumulative.shape[-1] - 1).squeeze(-1)


def mass_before(masses: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The mass, of masses `(B, K)`, that codes likelier than `codes` `(B,)` have, or as likely and lower: `(B,)`."""
    codes = codes[:, None]
    own = masses.gather(-1, codes)
    lower = torch.arange(masses.shape[-1], device=codes.device) < codes
    before = (masses > own) | ((masses == own) & lower)
    return (masses * before).sum(dim=-1)


def kth_largest(logits: torch.Tensor, k: int) -> torch.Tensor:
    """`(B, K)` -> `(B, 1)`. On a CPU by numpy, whose selection is five times as fast as torch's."""
    if logits.device.type == "cpu":
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
