"""Codes as tensors: their codewords, and what a map of codes must be."""

import torch
import torch.nn.functional as F


def embed_codes(codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Codewords of `codes` `(..., d)` in `codebook` `(M, K, C)`: `(..., d, C)`.

    With one codebook (M = 1) it serves every depth; otherwise codebook i serves depth i and d ≤ M.
    """
    num_codebooks, codebook_size, codebook_dim = codebook.shape
    if num_codebooks > 1:
        codes = codes + codebook_size * torch.arange(codes.shape[-1], device=codes.device)
    return F.embedding(codes, codebook.reshape(-1, codebook_dim))


def check_range(name: str, ids: torch.Tensor, size: int) -> None:
    """Raises `ValueError` unless all `ids` lie in [0, size). Compiled code cannot look at values."""
    if torch.compiler.is_compiling() or not ids.numel():
        return
    lowest, highest = (int(value) for value in ids.aminmax())
    if lowest < 0 or highest >= size:
        raise ValueError(f"{name} must lie in [0, {size}), got values from {lowest} to {highest}")


def check_codes(codes: torch.Tensor, depth: int, codebook_size: int) -> None:
    """Raises `ValueError`/`TypeError` unless `codes` is an int64 `(B, H, W, D)` map of codes in [0, K)."""
    if codes.dtype != torch.long:
        raise TypeError(f"codes must be int64, got {codes.dtype}")
    if codes.ndim != 4 or codes.shape[-1] != depth:
        raise ValueError(f"codes must have the shape (B, H, W, {depth}), got {tuple(codes.shape)}")
    check_range("codes", codes, codebook_size)
