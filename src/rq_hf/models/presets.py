"""The published models by name: `presets/<name>.json` holds the configurations of both stages."""

import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "presets"
PRESETS = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def load_preset(name: str, stage: str) -> dict:
    """The configuration of a stage, `"vae"` or `"transformer"`; `ValueError` for an unknown name."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return json.loads((FOLDER / f"{name}.json").read_text())[stage]
