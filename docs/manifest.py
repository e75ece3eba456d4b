"""What the figures were made from, so that `tests/examples/test_figures.py` notices stale ones."""

import json
from collections.abc import Iterable
from pathlib import Path

from rq_hf.files import checksum


def model_files(model: Path) -> list[Path]:
    """Configurations, tokenizer and weights of a saved pipeline."""
    return sorted(path for path in model.rglob("*") if path.suffix in (".json", ".safetensors"))


def manifest(scripts: Iterable[Path], model: Path, figures: Iterable[Path]) -> dict[str, dict[str, str]]:
    """SHA-256 of the scripts, of the files of the model and of the figures, by name."""
    return {
        "scripts": {path.name: checksum(path) for path in scripts},
        "model": {path.relative_to(model).as_posix(): checksum(path) for path in model_files(model)},
        "figures": {path.name: checksum(path) for path in figures},
    }


def write_manifest(path: Path, scripts: Iterable[Path], model: Path, figures: Iterable[Path]) -> None:
    path.write_text(json.dumps(manifest(scripts, model, figures), indent=2) + "\n", encoding="utf-8")
