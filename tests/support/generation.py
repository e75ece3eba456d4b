"""Variants of the RQ-Transformer, and references for what it samples."""

import pytest
import torch
from tiny import STACK, D, H, W

GREEDY = {"do_sample": False}
variants = pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"shared_classifier": False, "shared_codebook": False},
        {"cumulative_depth_inputs": False},
        {"code_shape": (H, W, 1), "depth_config": STACK | {"num_hidden_layers": 0}},
        {"code_shape": (1, 1, D)},
    ],
    ids=["shared", "per depth", "last codeword", "no depth stack", "one position"],
)


def greedy_by_forward(model, cond_ids, batch_size=2, prefix_codes=None, start=0, scale=None):
    """Greedy codes from whole teacher-forced passes, without any cache."""
    shape = model.config.code_shape
    codes = torch.zeros(batch_size, *shape, dtype=torch.long) if prefix_codes is None else prefix_codes.clone()
    codes = codes.flatten(1, 2)
    codes[:, start:] = 0
    for position in range(start, codes.shape[1]):
        for d in range(shape[-1]):
            logits = model(codes.view(batch_size, *shape), cond_ids).logits
            if scale is not None:
                null = model(codes.view(batch_size, *shape), torch.full_like(cond_ids, model.config.null_cond_id))
                logits = null.logits + scale * (logits - null.logits)
            codes[:, position, d] = logits.flatten(1, 2)[:, position, d].argmax(dim=-1)
    return codes.view(batch_size, *shape)


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return (((counts - expected) ** 2)[expected > 0] / expected[expected > 0]).sum().item()
