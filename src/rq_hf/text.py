"""Captions as token ids, by one rule for training, sampling and previews."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase


def encode_captions(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], length: int
) -> tuple[torch.Tensor, list[int]]:
    """
    Captions -> token ids `(B, L)`, L = `length`, truncated and padded on the right whatever the tokenizer's own sides
    are, and the number of tokens of each caption before that. Callers decide whether a longer caption is an error.

    Raises `ValueError` for a tokenizer without a padding token.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer needs a padding token, got one whose pad_token is None")
    token_ids = tokenizer(list(captions))["input_ids"]
    padded = [row[:length] + [tokenizer.pad_token_id] * (length - len(row)) for row in token_ids]
    return torch.tensor(padded), [len(row) for row in token_ids]
