"""The authors' tokenizer files -> a tokenizer of transformers."""

from pathlib import Path

from tokenizers.implementations import CharBPETokenizer
from transformers import PreTrainedTokenizerFast

from ..untrusted_files import check_contents_are_there, one_line

# `dataset.txt_tok_name` -> prefix of the file names
FILE_PREFIXES = {"bpe16k_huggingface": "bpe-16k-", "bpe30k_huggingface": "bpe-30k-"}


def convert_tokenizer(folder: str | Path, length: int, name: str | None = None) -> PreTrainedTokenizerFast:
    """
    Character-level BPE on lower-cased text that keeps accents, padded with `[PAD]` and truncated on the right.

    Args:
        folder: contains one `…vocab.json` and one `…merges.txt`, or all of the authors' tokenizers.
        length: L; the tokenizer's `model_max_length`.
        name: `dataset.txt_tok_name`, which selects one of the authors' tokenizers.

    Raises `FileNotFoundError` for a missing folder, `ValueError` unless it holds exactly one pair of files that form a
    tokenizer.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    prefix = FILE_PREFIXES.get(name, "")
    vocabularies, merges = sorted(folder.glob("*vocab.json")), sorted(folder.glob("*merges.txt"))
    if len(vocabularies) > 1 or len(merges) > 1:
        vocabularies, merges = (
            [file for file in files if prefix and file.name.startswith(prefix)] for files in (vocabularies, merges)
        )
    if len(vocabularies) != 1 or len(merges) != 1:
        raise ValueError(
            f"{folder} must hold one vocab.json and one merges.txt{f' named {prefix}…' if prefix else ''}, "
            f"got {sorted(file.name for file in folder.glob('*'))}"
        )
    for file in (vocabularies[0], merges[0]):
        check_contents_are_there(file, str(file))
    try:
        tokenizer = CharBPETokenizer.from_file(str(vocabularies[0]), str(merges[0]), unk_token="[UNK]", lowercase=True)
    except Exception as error:  # tokenizers raises bare exceptions
        raise ValueError(
            f"{vocabularies[0]} and {merges[0]} do not form a valid tokenizer: {one_line(error)}"
        ) from error
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        model_max_length=length,
        padding_side="right",
        truncation_side="right",
    )
