"""Recorded runs of the authors' implementation, and their checkpoints through our converter.

They lie beside the project's root, or where the environment variable RQ_HF_GOLDEN says; any folder of that layout will
do. What its config.yaml asks for and we refuse is in `REFUSED`.
"""

import functools
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rq_hf import convert_original_checkpoint

FOLDER = Path(os.environ.get("RQ_HF_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))
MANIFEST = json.loads((FOLDER / "manifest.json").read_text()) if (FOLDER / "manifest.json").is_file() else None


def require(name):
    """Decorator: skips a test, with the reason, where there is no such recorded run."""
    return pytest.mark.skipif(
        not (FOLDER / name).exists(), reason=f"no {name} in {FOLDER}; RQ_HF_GOLDEN names a folder of recorded runs"
    )


def config(stage, case):
    return yaml.safe_load((FOLDER / stage / case / "config.yaml").read_text())


def stage1_of(case):
    return MANIFEST["stage2"][case]["stage1_case"]


def reason_to_refuse(stage, case):
    """The option for which the converter refuses a case, or `None`."""
    arch = config(stage, case)["arch"]
    if stage == "stage1":
        sizes = arch["hparams"]["n_embed"]
        if isinstance(sizes, list) and len(set(sizes)) > 1:
            return "arch.hparams.n_embed"
        return "arch.ddconfig.ch_mult" if arch["ddconfig"]["ch_mult"][0] != 1 else None
    for option in ("input_emb_vqvae", "head_emb_vqvae"):
        if not arch.get(option, False):
            return f"arch.{option}"
    return reason_to_refuse("stage1", stage1_of(case))


def all_cases(stage):
    return sorted(path.parent.name for path in FOLDER.glob(f"{stage}/*/config.yaml"))


def cases(stage, accepted=True):
    """Decorator: the test runs for every recorded case that the converter takes (or refuses)."""
    names = [case for case in all_cases(stage) if (reason_to_refuse(stage, case) is None) == accepted]
    reason = f"no such {stage} in {FOLDER}; RQ_HF_GOLDEN names a folder of recorded runs"
    return pytest.mark.parametrize("case", names or [pytest.param(None, marks=pytest.mark.skip(reason))])


def weights(stage, case):
    return FOLDER / stage / case / "model.pt"


@functools.cache
def recorded(stage, case):
    return load_file(FOLDER / stage / case / "io.safetensors")


def converted_vae(case, ema=False):
    return convert_original_checkpoint(rqvae=weights("stage1", case), ema=ema)


def converted_pipeline(case, ema=False):
    return convert_original_checkpoint(
        rqvae=weights("stage1", stage1_of(case)), rqtransformer=weights("stage2", case), ema=ema
    )


def state_dict(stage, case):
    """The weights as the authors name them, as leaves of a graph: they collect gradients through the converter."""
    original = torch.load(weights(stage, case), weights_only=True)["state_dict"]
    return {name: w.clone().requires_grad_(w.is_floating_point()) for name, w in original.items()}
