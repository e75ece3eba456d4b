"""Tokenizers, and captions as token ids: one rule for training, sampling and previews."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .argument_checks import check_instance, check_items, check_number, check_size, check_source

SMALLEST_VOCABULARY = 257


def encode_captions(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], length: int
) -> tuple[torch.Tensor, list[int]]:
    """
    Captions -> token ids `(B, L)`, L = `length`, truncated and padded on the right whatever the tokenizer's own sides
    are, and the number of tokens of each caption before that. Callers decide whether a longer caption is an error.

    Raises `ValueError` for a tokenizer without a padding token.
    """
    check_instance("tokenizer", tokenizer, PreTrainedTokenizerBase)
    check_items("captions", captions)
    for caption in captions:
        check_instance("captions", caption, str)
    check_size("length", length)
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer needs a padding token, got one whose pad_token is None")
    token_ids = tokenizer(list(captions))["input_ids"]
    padded = [row[:length] + [tokenizer.pad_token_id] * (length - len(row)) for row in token_ids]
    return torch.tensor(padded), [len(row) for row in token_ids]


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """
    Trains a lower-casing byte-level BPE tokenizer with `[PAD]` as id 0; its vocabulary can write any text.

    Raises `ValueError` for a vocabulary of less than 257, the 256 bytes and `[PAD]`; `TypeError` for texts that are
    not strings.
    """
    check_size("vocab_size", vocab_size)
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size must be at least {SMALLEST_VOCABULARY}, for the 256 bytes and [PAD], got {vocab_size}"
        )
    check_size("max_length", max_length)
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
    tokenizer.train_from_iterator(checked_texts(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=max_length, padding_side="right"
    )


def checked_texts(texts: Iterable[str]) -> Iterator[str]:
    """The texts, one by one; raises `TypeError` for anything but strings."""
    if isinstance(texts, str) or not hasattr(texts, "__iter__"):
        raise TypeError(f"texts must be several strings, got {texts!r:.80}")
    for text in texts:
        check_instance("texts", text, str)
        yield text


def load_tokenizer(name: str | Path, length: int) -> PreTrainedTokenizerBase:
    """
    A tokenizer for captions of `length` tokens, from a folder or a Hub id.

    Raises `ValueError` for a tokenizer without a padding token, which stands for "no text", and `FileNotFoundError`
    for a name that is neither a folder nor possible on the Hub.
    """
    check_source("tokenizer", name)
    check_size("length", length)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer {name} has no padding token, which stands for 'no text'")
    tokenizer.model_max_length = length
    return tokenizer


def with_bpe_dropout(tokenizer: PreTrainedTokenizerBase, dropout: float) -> PreTrainedTokenizerBase:
    """
    A copy that leaves out a share of the merges at random (Provilkov et al., 2020), for training only; the tokenizer
    itself where `dropout` is 0.

    Raises `ValueError` for a tokenizer that is not a BPE tokenizer of the tokenizers library.
    """
    check_instance("tokenizer", tokenizer, PreTrainedTokenizerBase)
    check_number("dropout", dropout, "lie in [0, 1)")
    if not dropout:
        return tokenizer
    found = tokenizer.backend_tokenizer.model if tokenizer.is_fast else tokenizer
    if not isinstance(found, models.BPE):
        raise ValueError(f"bpe_dropout needs a BPE tokenizer of the tokenizers library, got {type(found).__name__}")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.model.dropout = dropout
    return tokenizer
