"""Codes as tensors: their codewords, and what a map of codes must be."""

import torch
import torch.nn.functional as F

from ..argument_checks import check_int64, check_range


def embed_codes(codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Codewords of `codes` `(..., d)` in `codebook` `(M, K, C)`: `(..., d, C)`.

    With one codebook (M = 1) it serves every depth; otherwise codebook i serves depth i and d ≤ M.
    """
    num_codebooks, codebook_size, codebook_dim = codebook.shape
    if num_codebooks > 1:
        codes = codes + codebook_size * torch.arange(codes.shape[-1], device=codes.device)
    return F.embedding(codes, codebook.reshape(-1, codebook_dim))


def check_codes(codes: torch.Tensor, depth: int, codebook_size: int) -> None:
    """Raises `ValueError`/`TypeError` unless `codes` is an int64 `(B, H, W, D)` map of codes in [0, K)."""
    check_int64("codes", codes, "B", "H", "W", depth)
    check_range("codes", codes, codebook_size)
