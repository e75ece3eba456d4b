"""Captions as token ids, by one rule for training, sampling and previews."""

from collections.abc import Iterator, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


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


def train_tokenizer(texts: Iterator[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Trains a lower-casing byte-level BPE tokenizer with `[PAD]` as id 0; its vocabulary can write any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["[PAD]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=max_length, padding_side="right"
    )
