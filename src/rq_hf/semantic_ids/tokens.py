"""IDs as tokens of a language model, one per code."""

import string
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from ..argument_checks import check_instance, check_items
from .prefix_tree import PrefixTree


def level_templates(template: str | Sequence[str], levels: int) -> list[str]:
    """One template per level, see [`SemanticIds.tokens`]."""
    if isinstance(template, str):
        if template.count("a") != 1:
            raise ValueError(
                "template must have one letter a, which becomes b, c, ... at the further levels, or be a list of one "
                f"template per level; got {template!r:.80}"
            )
        if levels > len(string.ascii_lowercase):
            raise ValueError(f"template must be a list of {levels}, one per level: there are letters for 26")
        template = [template.replace("a", letter) for letter in string.ascii_lowercase[:levels]]
    check_items("template", template, levels)
    for text in template:
        check_instance("template", text, str)
        if text.count("{}") != 1:
            raise ValueError(f"template must have one {{}}, where the code stands, got {text!r:.80}")
    return list(template)


def level_tokens(template: str | Sequence[str], sizes: Sequence[int]) -> list[list[str]]:
    """The tokens of the codes of each level. Raises `ValueError` where two codes would have the same."""
    templates = level_templates(template, len(sizes))
    levels = [[text.replace("{}", str(code)) for code in range(size)] for text, size in zip(templates, sizes)]
    token, count = Counter(token for level in levels for token in level).most_common(1)[0]
    if count > 1:
        raise ValueError(f"template must give each code of each level a token of its own, got {token!r} {count} times")
    return levels


def token_ids_of(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[int]:
    """Raises `ValueError` unless each is one token of the tokenizer."""
    vocabulary = tokenizer.get_vocab()
    token_ids = tokenizer(tokens, add_special_tokens=False)["input_ids"]
    for token, found in zip(tokens, token_ids):
        if found != [vocabulary.get(token)]:
            raise ValueError(
                f"{token} must be one token of the tokenizer: call tokenizer.add_tokens(ids.tokens(...)), with the "
                "same template, and then model.resize_token_embeddings(len(tokenizer))"
            )
    return [token_id for (token_id,) in token_ids]


def constraint(
    tree: PrefixTree, token_ids: list[list[int]], end: int, start: int
) -> Callable[[int, torch.Tensor], list[int]]:
    """
    The function of [`SemanticIds.prefix_allowed_tokens_fn`].

    Args:
        token_ids: of the codes of each level.
        end: the token after an ID.
        start: the number of tokens before it.
    """
    codes = [{token_id: code for code, token_id in enumerate(level)} for level in token_ids]

    def allowed_tokens(batch_id: int, input_ids: torch.Tensor) -> list[int]:
        generated = input_ids.tolist()[start:][: len(codes)]
        prefix = [level.get(token_id) for level, token_id in zip(codes, generated)]
        if len(input_ids) < start or None in prefix or tree.find(prefix) is None:
            raise ValueError(
                f"after start={start} tokens must come an ID or the beginning of one, got the tokens "
                f"{input_ids.tolist()!s:.200}"
            )
        if len(prefix) == len(codes):
            return [end]
        return [token_ids[len(prefix)][code] for code in tree.next_codes(prefix).tolist()]

    return allowed_tokens
