"""Random numbers of a batch: from one generator, or from one generator or seed per image, whose numbers then do not
depend on the rest of the batch."""

from collections.abc import Sequence

import torch

from ..argument_checks import is_integer

Generators = torch.Generator | Sequence[torch.Generator | int] | None


def check_generator(generator: Generators, batch_size: int) -> None:
    """Raises `TypeError`/`ValueError` unless this is one generator, or one generator or seed per image."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, list | tuple) or not all(
        isinstance(g, torch.Generator) or is_integer(g) for g in generator
    ):
        raise TypeError(f"generator must be a torch.Generator, or a list of them or of seeds, got {generator!r}")
    if not all(0 <= g < 2**32 for g in generator if is_integer(g)):  # torch drops the higher bits on a CPU
        raise ValueError(f"seeds in generator must lie in [0, 2**32), got {generator}")
    if len(generator) != batch_size:
        raise ValueError(f"expected one generator per image ({batch_size}), got {len(generator)}")
    objects = [g for g in generator if isinstance(g, torch.Generator)]
    if len({id(g) for g in objects}) < len(objects):
        raise ValueError("each image needs its own generator, but one was passed twice")


def seeded_generators(generator: Generators) -> torch.Generator | list[torch.Generator] | None:
    """The same, with generators instead of seeds."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    return [torch.Generator().manual_seed(int(g)) if is_integer(g) else g for g in generator]


def uniform_numbers(generator: Generators, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Float64 numbers in [0, 1) of shape `(B, ...)`; with one generator per image, each image uses its own."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    generator = seeded_generators(generator)
    if isinstance(generator, list):
        return torch.stack(
            [torch.rand(shape[1:], generator=g, device=g.device, dtype=dtype).to(device) for g in generator]
        )
    where = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=where, dtype=dtype).to(device)


def normal_numbers(
    generator: Generators, shape: tuple[int, int, int], images: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Standard normal numbers of shape `(S, N, C)` for N tokens, of which token i belongs to image `images[i]`; the
    `images` `(N,)` ascend. With one generator per image, each image uses its own."""
    generator = seeded_generators(generator)
    if isinstance(generator, list):
        counts = images.bincount(minlength=len(generator)).tolist()
        numbers = [
            torch.randn(shape[0], count, shape[2], generator=g, device=g.device).to(device)
            for g, count in zip(generator, counts)
        ]
        return torch.cat(numbers, dim=1)
    where = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=where).to(device)
