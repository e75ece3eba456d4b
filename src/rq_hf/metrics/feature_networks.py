"""
Feature networks: what images look like to a metric, and every step from 8-bit images to features.

`load_feature_network("pytorch-fid", weights=file)(images).features`
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    CLIPVisionModelWithProjection,
    Dinov2Model,
    Dinov2WithRegistersModel,
    ImageProcessingMixin,
)

from ..argument_checks import (
    check_choice,
    check_dense,
    check_instance,
    check_items,
    check_number,
    check_shape,
    check_size,
    check_source,
    check_unit_interval,
)
from ..files import checksum
from .inception import SIDE, FIDInception
from .weights import find_weights

INCEPTION = "inception-2015-12-05"
# Of pt_inception-2015-12-05-6726825d.pth of pytorch-fid, which torch-fidelity has as weights-inception-….
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)


class NetworkOutput(NamedTuple):
    """Features `(B, F)` and, for classifiers, logits `(B, classes)`; both float32."""

    features: torch.Tensor
    logits: torch.Tensor | None = None
