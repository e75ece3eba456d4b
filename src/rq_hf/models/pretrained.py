"""What must hold for saved models. The libraries fill in for a file that lacks something, at most with a warning."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..argument_checks import check_source


@contextmanager
def reading(kind: str, source: str | os.PathLike) -> Iterator[None]:
    """
    For the block that loads a folder or Hub model.

    Raises `FileNotFoundError` for a `source` that is neither a folder nor possible on the Hub; `ValueError`, which
    names the folder or file, for JSON files that hold no JSON object, and for weights that are not safetensors or
    have other shapes than `config.json` says.
    """
    check_source(kind, source)
    for name in ("model_index.json", "config.json", "*.index.json", "tokenizer*.json"):
        for file in (*Path(source).glob(name), *Path(source).glob(f"*/{name}")):
            read_json(file)
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"the weights in {source} are truncated or invalid: {error}") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ValueError(f"the weights in {source} do not fit its config.json: {error}") from error


def read_json(file: Path) -> dict:
    """The JSON object in a file. Raises `ValueError` unless there is one, in which every `model_type`, also that of a
    part, is a name."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a JSON object, got {content!r:.80}")
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        if not isinstance(part.get("model_type", ""), str):
            raise ValueError(f"{file}: model_type must be a name, got {part['model_type']!r:.80}")
    return content


def check_loading_info(source: str | os.PathLike, loading_info: dict) -> None:
    """Raises `ValueError` unless the weights of a folder or Hub model were those of its configuration."""
    for problem, names in (("lacks", loading_info["missing_keys"]), ("has unknown", loading_info["unexpected_keys"])):
        if names:
            names = sorted(names)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{source} {problem} weights, or its config.json is of another model: {names[0]}{more}")


class CheckedLoadingMixin:
    """For a [`~diffusers.ModelMixin`]; `kind` is what messages call it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, output_loading_info=False, **kwargs):
        """As in diffusers, except that missing and unknown weights are a `ValueError`, unless
        `ignore_mismatched_sizes=True`."""
        with reading(cls.kind, pretrained_model_name_or_path):
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        if not kwargs.get("ignore_mismatched_sizes"):
            check_loading_info(pretrained_model_name_or_path, info)
        return (model, info) if output_loading_info else model


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of weights as float32, in the order of their names."""
    digest = hashlib.sha256()
    for _, weight in sorted(weights.items()):
        digest.update(weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()
