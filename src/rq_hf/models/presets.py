"""The published models by name: `presets/<name>.json` has a section for the configuration of each stage."""

import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "presets"
PRESETS = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
"""The names of the published models."""


def load_preset(name: str, section: str) -> dict:
    """
    The configuration of a stage.

    Args:
        section: `"vae"` or `"transformer"` of an RQ model; `"autoencoder_kl"`, the arguments of diffusers'
            `AutoencoderKL`, or `"mar_transformer"` of a MAR model.

    Raises `ValueError` for a name that is not one of [`PRESETS`], or whose model has no such stage.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    if section not in read(name):
        others = ", ".join(preset for preset in PRESETS if section in read(preset)) or "no preset"
        raise ValueError(f"the preset {name!r} has {' and '.join(read(name))}, but no {section}; {others} have one")
    return read(name)[section]


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())
