"""Files of weights that the user names."""

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from ..argument_checks import check_instance


def find_weights(source: str) -> Path:
    """A local file, or `user/repository/file` on the Hub, which is downloaded. Raises `ValueError` for neither."""
    check_instance("the file of weights", source, str)
    path = Path(source)
    if path.is_file():
        return path
    parts = source.split("/", 2)
    if len(parts) < 3 or path.is_absolute():
        raise ValueError(f"{source} is neither a file nor user/repository/file on the Hub")
    return Path(hf_hub_download("/".join(parts[:2]), parts[2]))


def read_weights(path: Path, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """
    The weights of these names from a file of safetensors (`.safetensors`) or `torch.save`.

    Raises `ValueError` if some are missing or have other shapes.
    """
    if path.suffix == ".safetensors":
        weights = load_file(path)
    else:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]} and {len(missing) - 1} more of {len(shapes)} weights")
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise ValueError(f"{name} in {path} must have the shape {tuple(shape)}, got {tuple(weights[name].shape)}")
    return {name: weights[name] for name in shapes}
