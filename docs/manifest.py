"""What the figures were made from, so that `tests/examples/test_figures.py` notices stale ones."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from rq_hf.files import checksum

PYTHON_BLOCK = re.compile(rb"^```python\n.*?^```$", re.MULTILINE | re.DOTALL)


def sha256(path: Path) -> str:
    """Of a script, or of the Python in a page."""
    if path.suffix == ".md":
        return hashlib.sha256(b"\n".join(PYTHON_BLOCK.findall(path.read_bytes()))).hexdigest()
    return checksum(path)


def model_files(model: Path) -> list[Path]:
    """Configurations, tokenizer and weights of a saved pipeline."""
    return sorted(path for path in model.rglob("*") if path.suffix in (".json", ".safetensors"))


def manifest(scripts: Iterable[Path], models: Iterable[Path], figures: Iterable[Path]) -> dict[str, dict[str, str]]:
    """SHA-256 of the scripts, of the files of the models and of the figures, by name."""
    return {
        "scripts": {path.name: sha256(path) for path in scripts},
        "models": {
            f"{m.name}/{path.relative_to(m).as_posix()}": checksum(path) for m in models for path in model_files(m)
        },
        "figures": {path.name: checksum(path) for path in figures},
    }


def write_manifest(path: Path, scripts: Iterable[Path], models: Iterable[Path], figures: Iterable[Path]) -> None:
    path.write_text(json.dumps(manifest(scripts, models, figures), indent=2) + "\n", encoding="utf-8")
