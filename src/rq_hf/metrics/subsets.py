"""Random subsets of features."""

import torch


def check_generator(name: str, generator: torch.Generator | None) -> None:
    """Raises `TypeError` for anything but `None` and a generator, `ValueError` for one that is not on the CPU."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"{name} must be a torch.Generator or None, got {generator!r:.80}")
    if generator.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, got one on {generator.device}")


def random_rows(features: torch.Tensor, size: int, generator: torch.Generator | None) -> torch.Tensor:
    """So many different rows of features `(N, F)`, in random order: `(size, F)`."""
    return features[torch.randperm(len(features), generator=generator)[:size].to(features.device)]
