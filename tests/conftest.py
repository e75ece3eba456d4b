import os
from tempfile import TemporaryDirectory

# A run that brings its own Hub names it in HF_ENDPOINT.
if "HF_ENDPOINT" not in os.environ:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# diffusers, transformers and evaluate keep code of folders here; what other runs left in the user's cache is not ours.
os.environ["HF_MODULES_CACHE"] = (modules := TemporaryDirectory()).name

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def emoji_onnx(tmp_path_factory):
    """The emoji model of the package, exported as ONNX with weights in half precision."""
    from rq_hf import EMOJI_MODEL
    from rq_hf.export_onnx import export_onnx

    folder = tmp_path_factory.mktemp("emoji") / "onnx"
    export_onnx(EMOJI_MODEL, folder, dtype="float16")
    return folder
