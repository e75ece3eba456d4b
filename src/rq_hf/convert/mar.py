"""Checkpoints of LTH14/mar, the code of "Autoregressive Image Generation without Vector Quantization" (Li et al.,
NeurIPS 2024) -> a saved pipeline."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from ..argument_checks import check_bool, check_items, check_number, check_size, is_integer
from ..models import MARTransformerModel
from ..models.continuous_latents import pixels_per_latent
from ..models.mar_transformer.denoising import default_scheduler
from ..pipelines import MARPipeline
from ..untrusted_files import read_torch_file, shown
from .conversion import error_context, with_weights, working_folder
from .files import named_state_dict
from .mar_card import mar_card
from .mar_weights import Weights, autoencoder_config, mar_config, mar_parts
from .weights import Parts, check_kinds, concatenate, rqvae_parts, take_weights

LAYER_NORM_EPS = 1e-6
SCALING_FACTOR = 0.2325  # 1 / standard deviation of the latents of KL-16 on ImageNet


def convert_mar_checkpoint(
    checkpoint: str | Path | None = None,
    destination: str | Path | None = None,
    *,
    vae: str | Path | None = None,
    ema: bool = True,
    heads: int | Sequence[int] | None = None,
    patch_size: int | None = None,
    grid_size: Sequence[int] | None = None,
    layer_norm_eps: float = LAYER_NORM_EPS,
    scaling_factor: float = SCALING_FACTOR,
) -> MARPipeline | MARTransformerModel | AutoencoderKL:
    r"""
    Converts checkpoints of the authors' code (LTH14/mar).

    Weights are memory-mapped and written shard by shard: memory stays below the size of the checkpoints plus 2 GB.
    No code in checkpoint files is executed.

    Args:
        checkpoint (`str` or `Path`, *optional*): their `checkpoint-last.pth` of the transformer, as released or as
            written in training.
        destination (`str` or `Path`, *optional*): new or empty folder to write to, for `from_pretrained`, with a model
            card. A new folder appears only when it is complete; an empty one may be a mount point.
        vae (`str` or `Path`, *optional*): their `kl16.ckpt`, or another autoencoder of the same layout.
        ema (`bool`): use `model_ema`, as the authors sample, instead of `model`.
        heads (`int` or two of them, *optional*): attention heads of encoder and decoder. Weights do not say them;
            those of MAR-B, MAR-L and MAR-H are known by their widths and depths.
        patch_size (`int`, *optional*): p; a token is a patch of p × p latents (default: as the arguments in a training
            checkpoint or the channels of `vae` say; 1 for the sizes of MAR-B, MAR-L and MAR-H).
        grid_size (two `int`s, *optional*): H and W, rows and columns of tokens (default: a square).
        layer_norm_eps (`float`): epsilon of the layer norms of encoder and decoder.
        scaling_factor (`float`): what latents of `vae` are multiplied by.

    Returns:
        The [`MARPipeline`], or the [`MARTransformerModel`] or [`~diffusers.AutoencoderKL`] alone if there is only one
        of the files.

    Raises:
        `FileNotFoundError` for a missing path; `FileExistsError` for a destination that is a file, not empty, or that
        another conversion works on, even a killed one; `OSError` for a full disk; `TypeError` for arguments of another
        type; `ValueError` for broken files, weights that are not finite floating-point numbers or not those of one
        model, sizes that the weights do not say, and files that do not fit each other.
    """
    model, _, _ = convert_mar_checkpoints(
        checkpoint, destination, vae, ema, heads, patch_size, grid_size, layer_norm_eps, scaling_factor
    )
    return model


def convert_mar_checkpoints(
    checkpoint, destination, vae, ema, heads, patch_size, grid_size, layer_norm_eps, scaling_factor
) -> tuple[MARPipeline | MARTransformerModel | AutoencoderKL, dict[str, list[str]], Path | None]:
    """[`convert_mar_checkpoint`], which also returns what it ignored of each file, and the real destination."""
    check_bool("ema", ema)
    if is_integer(heads):
        heads = (heads, heads)
    for name, sizes in {"heads": heads, "grid_size": grid_size}.items():
        if sizes is not None:
            check_items(name, sizes, 2)
            for size in sizes:
                check_size(name, size)
    if patch_size is not None:
        check_size("patch_size", patch_size)
    check_number("layer_norm_eps", layer_norm_eps, "be greater than 0")
    check_number("scaling_factor", scaling_factor, "be greater than 0")
    if checkpoint is None and vae is None:
        raise ValueError("nothing to convert: give checkpoint or vae")

    place = str(destination)
    destination = None if destination is None else Path(os.path.realpath(destination))
    autoencoder = weights = None
    ignored = {}
    with working_folder(destination) as scratch:
        if vae is not None:
            autoencoder, ignored[str(vae)] = convert_autoencoder(vae, scaling_factor)
        if checkpoint is not None:
            transformer, weights, ignored[str(checkpoint)] = convert_transformer(
                checkpoint,
                ema,
                heads=heads,
                patch_size=patch_size,
                grid_size=grid_size,
                layer_norm_eps=layer_norm_eps,
                latent_channels=None if vae is None else autoencoder.config.latent_channels,
            )
        if checkpoint is None:
            model = autoencoder
        elif vae is None:
            model = transformer
        else:
            sides = zip(transformer.config.latent_shape[1:], pixels_per_latent(autoencoder))
            autoencoder.register_to_config(sample_size=min(side * pixels for side, pixels in sides))
            model = MARPipeline(autoencoder, transformer, default_scheduler())
        model = with_weights(model, weights, mar_card(model, place), scratch / "finished", destination)
    return model, ignored, destination


def convert_autoencoder(path: str | Path, scaling_factor: float) -> tuple[AutoencoderKL, list[str]]:
    """The autoencoder in a checkpoint, in evaluation mode, and the names of what else is in the file."""
    weights, contents = read(path, "model")
    with error_context(str(path)):
        check_kinds(weights)
        with torch.device("meta"):
            vae = AutoencoderKL(**autoencoder_config(weights, scaling_factor))
        parts = take_weights(weights, vae, rqvae_parts)
    vae.load_state_dict({name: concatenate(parts[name]) for name in parts}, assign=True)
    return vae.eval(), [shown(name) for name in contents if name != "model"]


def convert_transformer(
    path: str | Path, ema: bool, **arguments
) -> tuple[MARTransformerModel, dict[str, Parts], list[str]]:
    """The transformer of a checkpoint on the meta device, in evaluation mode, its weights, and the names of what else
    is in the file. Further arguments are those of [`mar_config`]."""
    key = "model_ema" if ema else "model"
    weights, contents = read(path, key)
    options = contents.get("args", argparse.Namespace())
    if not isinstance(options, argparse.Namespace):
        raise ValueError(f"{path}: args must be an argparse.Namespace, got {type(options).__name__}")
    with error_context(str(path)):
        check_kinds(weights)
        config = mar_config(weights, vars(options), **arguments)
        with torch.device("meta"):
            transformer = MARTransformerModel(config)
        parts = take_weights(weights, transformer, mar_parts)
    return transformer.eval(), parts, [shown(name) for name in contents if name not in (key, "args")]


def read(path: str | Path, key: str) -> tuple[Weights, dict]:
    """The memory-mapped state dict of this name in a file, and all contents of the file.

    Raises `FileNotFoundError` for a missing file, `ValueError` for one without such a state dict.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    contents = read_torch_file(path, str(path), classes=[argparse.Namespace])
    return named_state_dict(contents, key, str(path)), contents
