"""Which tokens are hidden: random masks for training, and the plan of a sampling (Li et al., 2024, section 3.4).

Shapes: `B` images, `T` tokens in raster order. Masks are boolean, true where a token is hidden.
"""

import math

import torch

RATE_STD = 0.25


def mask_rate(uniform: torch.Tensor, lowest: float) -> torch.Tensor:
    """Shares of hidden tokens at quantiles in [0, 1], float64: of a normal distribution with mean 1 and standard
    deviation 0.25, truncated to [lowest, 1]."""
    below = torch.special.ndtr(torch.tensor((lowest - 1) / RATE_STD, dtype=torch.float64))
    return 1 + RATE_STD * torch.special.ndtri(below + uniform.double() * (0.5 - below))


def random_mask(batch_size: int, num_tokens: int, lowest_rate: float) -> torch.Tensor:
    """A mask `(B, T)` on the CPU, as in training: one rate for the batch, other tokens in every image."""
    num_hidden = math.ceil(num_tokens * mask_rate(torch.rand(()), lowest_rate).item())
    return torch.rand(batch_size, num_tokens).argsort(dim=-1).argsort(dim=-1) < num_hidden


def sampling_masks(orders: torch.Tensor, mask: torch.Tensor, num_iterations: int) -> list[torch.Tensor]:
    """
    Masks `(B, T)` before each iteration, and after the last: nothing hidden.

    A cosine schedule reveals few tokens at first and more later, at least one in each iteration.

    Args:
        orders: `(B, T)`; the tokens of an image are revealed in this order, last one first.
        mask: `(B, T)`, what is hidden at first.
    """
    ranks = orders.argsort(dim=-1)  # of each token in the order
    ranks = ranks.masked_fill(~mask, orders.shape[-1]).argsort(dim=-1).argsort(dim=-1)  # among the hidden ones
    hidden = total = mask.sum(dim=-1, keepdim=True)  # (B, 1)
    masks = [mask]
    for iteration in range(1, num_iterations):
        share = math.cos(math.pi / 2 * iteration / num_iterations)
        hidden = (total.double() * share).floor().long().minimum(hidden - 1).clamp(min=1)
        masks.append(ranks < hidden)
    return [*masks, torch.zeros_like(mask)]


def positions_of(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Where a mask `(B, T)` is true, in raster order.

    Returns:
        positions `(B, n)`, n the largest number of them in an image; other positions fill up the rows of images with
        fewer. And which are no such fillings `(B, n)`, or `None` where all images have n.
    """
    counts = mask.sum(dim=-1)
    largest = int(counts.max())
    positions = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)[:, :largest]
    return positions, None if bool((counts == largest).all()) else mask.gather(1, positions)


def rows_at(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows `(..., T, E)` at the positions `(..., n)`: `(..., n, E)`."""
    return rows.take_along_dim(positions[..., None], dim=-2)
