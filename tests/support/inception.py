"""Weights of the Inception network that need no file (README of the recorded runs, "Weight recipe")."""

import math
import zlib
from pathlib import Path

import numpy as np
import torch

from rq_hf.files import checksum
from rq_hf.metrics.inception import FIDInception


def recipe_weight(name, shape):
    state = np.random.RandomState((zlib.crc32(f"inception.{name}".encode()) + 991) % 2**32)
    numbers = state.standard_normal(tuple(shape))
    if name.endswith("running_var"):
        numbers = 0.5 + np.abs(0.5 * numbers)
    elif name.endswith(("running_mean", "bias")):
        numbers *= 0.05
    elif len(shape) == 4:
        numbers *= math.sqrt(2 / math.prod(shape[1:]))
    elif len(shape) == 2:
        numbers *= 0.02
    else:
        numbers = 1 + 0.1 * numbers
    return torch.from_numpy(np.float32(numbers))


def recipe_weights():
    with torch.device("meta"):
        weights = FIDInception().state_dict()
    return {name: recipe_weight(name, w.shape) for name, w in weights.items() if w.is_floating_point()}


def write_weights(path: Path) -> tuple[str, str]:
    """Writes the state dict; its file, and the SHA-256 of it."""
    torch.save(recipe_weights(), path)
    return str(path), checksum(path)
