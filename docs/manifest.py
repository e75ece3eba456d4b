"""What the figures were made from, so that `tests/examples/test_figures.py` notices stale ones."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

PYTHON_BLOCK = re.compile(rb"^```python\n.*?^```$", re.MULTILINE | re.DOTALL)


def sha256(path: Path) -> str:
    """Of a file; of a page, only its Python counts."""
    content = path.read_bytes()
    if path.suffix == ".md":
        content = b"\n".join(PYTHON_BLOCK.findall(content))
    return hashlib.sha256(content).hexdigest()


def model_files(model: Path) -> list[Path]:
    """Configurations, tokenizer and weights of a saved pipeline."""
    return sorted(path for path in model.rglob("*") if path.suffix in (".json", ".safetensors"))


def manifest(scripts: Iterable[Path], models: Iterable[Path], figures: Iterable[Path]) -> dict[str, dict[str, str]]:
    """SHA-256 of the scripts, of the files of the models and of the figures, by name."""
    files = {f"{model.name}/{path.relative_to(model)}": path for model in models for path in model_files(model)}
    return {
        "scripts": {path.name: sha256(path) for path in scripts},
        "models": {name: sha256(path) for name, path in files.items()},
        "figures": {path.name: sha256(path) for path in figures},
    }


def write_manifest(path: Path, scripts: Iterable[Path], models: Iterable[Path], figures: Iterable[Path]) -> None:
    path.write_text(json.dumps(manifest(scripts, models, figures), indent=2) + "\n", encoding="utf-8")
