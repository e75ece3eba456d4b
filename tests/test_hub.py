"""Pushed to a Hub and loaded again, by the real client.

A client reads the address of its Hub at import. So the one test here starts a Hub, and a second pytest which talks to
that Hub and collects the `check_*` functions of this file instead.
"""

import os
import subprocess
import sys

import torch
from diffusers import VQModel

from fake_hub import FakeHub


def test_hub(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_TOKEN": "hf_fake", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    options = ["-q", "-p", "no:cacheprovider", "-o", "python_functions=check_*"]
    with FakeHub() as hub:
        child = subprocess.run(
            [sys.executable, "-m", "pytest", *options, __file__],
            env=env | {"HF_ENDPOINT": hub.endpoint},
            capture_output=True,
            text=True,
        )
    assert child.returncode == 0, child.stdout + child.stderr


def check_vqmodel():
    model = VQModel(block_out_channels=(32,), norm_num_groups=8)
    model.push_to_hub("tester/vq")
    loaded = VQModel.from_pretrained("tester/vq")
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(a, b), name
