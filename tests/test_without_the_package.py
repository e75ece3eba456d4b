"""What those see who load a saved folder with diffusers and transformers alone: what to install."""

import subprocess
import sys

import pytest
from tiny import tiny_pipeline

ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "rq_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from diffusers import AutoModel, DiffusionPipeline
from transformers import AutoModel as TransformersModel

folder = sys.argv[1]
for load in (
    lambda: DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True),
    lambda: TransformersModel.from_pretrained(f"{folder}/transformer", trust_remote_code=True),
    lambda: AutoModel.from_pretrained(folder, subfolder="vae"),
):
    try:
        load()
    except Exception as error:
        print(type(error).__name__, " ".join(str(error).split()))
"""


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline().save_pretrained(folder)
    child = subprocess.run([sys.executable, "-c", ALONE, folder], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()


def test_pipeline(messages):
    assert messages[0] == "ImportError this pipeline needs the package rq_hf: pip install rq_hf"


def test_transformer(messages):
    assert "not found in your environment: rq_hf. Run `pip install rq_hf`" in messages[1]


def test_autoencoder(messages):
    assert "import rq_hf before calling `from_pretrained`" in messages[2]
