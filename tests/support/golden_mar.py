"""Recorded runs of the authors' MAR + Diffusion Loss, and their checkpoints through our converter.

They lie in the folder `mar` beside those of the RQ models (see `golden.py`); its README explains every tensor.
"""

import functools
import json
import math
import tempfile
import zlib
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from rq_hf import MARHeadConfig, MARTransformerConfig, MARTransformerModel, convert_mar_checkpoint
from rq_hf.convert.mar_weights import mar_parts
from rq_hf.convert.weights import rqvae_parts

FOLDER = golden.FOLDER / "mar"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text()) if (FOLDER / "manifest.json").is_file() else None


def require(name):
    """Decorator: skips a test, with the reason, where there is no such recorded run."""
    return golden.require(f"mar/{name}")


def all_cases(kind):
    """Names of the recorded cases of a kind: "vae", "mar" or "mar_full_size"."""
    return sorted(path.parent.name for path in FOLDER.glob(f"{kind}/*/config.json"))


def cases(kind, accept=lambda case: True):
    """Decorator: the test runs for every recorded case that is accepted."""
    names = [case for case in all_cases(kind) if accept(case)]
    reason = f"no such {kind} in {FOLDER}; RQ_HF_GOLDEN names a folder of recorded runs"
    return pytest.mark.parametrize("case", names or [pytest.param(None, marks=pytest.mark.skip(reason=reason))])


def config(kind, case):
    return json.loads((FOLDER / kind / case / "config.json").read_text())


@functools.cache
def diffusion():
    return load_file(FOLDER / "diffusion" / "io.safetensors")


@functools.cache
def recorded(case, kind="mar"):
    return load_file(FOLDER / kind / case / "io.safetensors")


def weights(case):
    return FOLDER / "mar" / case / "checkpoint-last.pth"


def converted_transformer(case, ema=True, destination=None):
    """The transformer of a case, in evaluation mode, with the options of its config that no weight says."""
    options = config("mar", case)
    transformer = convert_mar_checkpoint(
        weights(case),
        destination,
        ema=ema,
        heads=(options["encoder_num_heads"], options["decoder_num_heads"]),
        patch_size=options["patch_size"],
        layer_norm_eps=options["norm_eps"],
    )
    transformer.config.mask_ratio_min = options["mask_ratio_min"]
    transformer.config.diffusion_batch_mul = options["diffusion_batch_mul"]
    return transformer


def autoencoder_weights(case, folder):
    """The checkpoint of an autoencoder; one of recipe weights is written to `folder`."""
    path = FOLDER / "vae" / case / "kl.ckpt"
    if path.exists():
        return path
    path = Path(folder, "kl.ckpt")
    torch.save({"model": recipe_weights(MANIFEST["vae"][case]["prefix"], autoencoder_shapes(case))}, path)
    return path


@functools.cache
def converted_vae(case):
    """The autoencoder of a case, in evaluation mode."""
    with tempfile.TemporaryDirectory() as folder:
        return convert_mar_checkpoint(vae=autoencoder_weights(case, folder))


def autoencoder_shapes(case):
    """The shapes of the autoencoder of a case, by the authors' names."""
    options = config("vae", case)
    widths = [options["ch"] * factor for factor in options["ch_mult"]]
    attention = {
        half: [
            options["resolution"] // 2**level in options[f"{half}_attn_resolutions"] for level in range(len(widths))
        ]
        for half in ("encoder", "decoder")
    }
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=widths,
            layers_per_block=options["num_res_blocks"],
            latent_channels=options["embed_dim"],
            down_block_types=[("Attn" if has else "") + "DownEncoderBlock2D" for has in attention["encoder"]],
            up_block_types=[("Attn" if has else "") + "UpDecoderBlock2D" for has in attention["decoder"]][::-1],
        )
    return original_shapes(vae, rqvae_parts)


def original_shapes(model, parts_of):
    """The shapes of the weights of `model` by the authors' names."""
    shapes = {}
    for name, weight in model.state_dict().items():
        shapes |= parts_of(name, weight.shape, model)
    return shapes


def recipe_weight(prefix, name, shape):
    """A weight of the recipe in the README of the recorded runs."""
    numbers = np.random.RandomState((zlib.crc32((prefix + name).encode()) + 991) % 2**32).standard_normal(shape)
    offset, std = 0, 0.05
    if name in ("class_emb.weight", "fake_latent", "mask_token") or name.endswith("pos_embed_learned"):
        std = 0.5
    elif len(shape) == 4:
        std = math.sqrt(2 / math.prod(shape[1:]))
    elif len(shape) == 2:
        std = 1 / math.sqrt(shape[1])
    elif len(shape) == 1 and name.endswith(".weight"):
        offset, std = 1, 0.1
    return torch.from_numpy((offset + std * numbers).astype(np.float32))


def recipe_weights(prefix, shapes):
    """A state dict of the recipe; `shapes` by the authors' names."""
    return {name: recipe_weight(prefix, name, shape) for name, shape in shapes.items()}


def meta_transformer(case):
    """The transformer of a case of full size, on the meta device."""
    options = config("mar_full_size", case)
    preset = MARTransformerConfig.from_preset(options["model"].replace("_", "-"))
    preset.head_config = MARHeadConfig(hidden_size=options["diffloss_w"], num_hidden_layers=options["diffloss_d"])
    with torch.device("meta"):
        return MARTransformerModel(preset)


def by_original_names(model, tensors):
    """Weights, or what belongs to them, by the authors' names and with their shapes."""
    original = {}
    for name, tensor in tensors.items():
        shapes = mar_parts(name, model.get_parameter(name).shape, model)
        parts = tensor.split([shape[0] for shape in shapes.values()]) if len(shapes) > 1 else [tensor]
        original |= {part: rows.reshape(shape) for (part, shape), rows in zip(shapes.items(), parts)}
    return original


def decayed_names(case):
    """The weights to which the recorded optimizer applies weight decay, by the authors' names."""
    groups = json.loads((FOLDER / "mar" / case / "weight_decay.json").read_text())
    return set(groups["decay"])
