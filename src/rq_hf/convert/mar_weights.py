"""The authors' MAR weights -> ours: what configuration they are of, and how they are renamed."""

import math
import re
from collections.abc import Sequence

import torch

from ..argument_checks import is_number
from ..models import MARTransformerConfig, MARTransformerModel
from ..untrusted_files import shown
from .weights import Shapes, rename

Weights = dict[str, torch.Tensor]

MAR_NAMES = {  # an earlier name goes before those that it contains
    "cond_embedding": "class_emb",
    "latent_projection": "z_proj",
    "input_norm": "z_proj_ln",
    "encoder_position_embedding": "encoder_pos_embed_learned",
    "encoder.layers": "encoder_blocks",
    "encoder.norm": "encoder_norm",
    "decoder_projection": "decoder_embed",
    "decoder_position_embedding": "decoder_pos_embed_learned",
    "decoder.layers": "decoder_blocks",
    "decoder.norm": "decoder_norm",
    "attention_norm": "norm1",
    "self_attn.qkv_proj": "attn.qkv",
    "self_attn.o_proj": "attn.proj",
    "mlp_norm": "norm2",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
    "head_position_embedding": "diffusion_pos_embed_learned",
    "head.input_projection": "diffloss.net.input_proj",
    "head.time_embedding.linear_1": "diffloss.net.time_embed.mlp.0",
    "head.time_embedding.linear_2": "diffloss.net.time_embed.mlp.2",
    "head.cond_projection": "diffloss.net.cond_embed",
    "head.layers": "diffloss.net.res_blocks",
    "head.output_modulation": "diffloss.net.final_layer.adaLN_modulation.1",
    "head.output_projection": "diffloss.net.final_layer.linear",
    ".norm.": ".in_ln.",
    "linear_1": "mlp.0",
    "linear_2": "mlp.2",
    "modulation": "adaLN_modulation.1",
}
RELEASED_HEADS = {(768, 12): 12, (1024, 16): 16, (1280, 20): 16}  # (width, blocks) of MAR-B, MAR-L and MAR-H
RELEASED_TOKEN_DIM = 16
# Options of the training script that the weights do not say -> ours
TRAINING_OPTIONS = ("patch_size", "attn_dropout", "proj_dropout", "mask_ratio_min", "diffusion_batch_mul")


def mar_parts(name: str, shape: torch.Size, model: MARTransformerModel) -> Shapes:
    """The authors' names and shapes of the parts of our weight `name`, which has this `shape`."""
    if name == "cond_embedding.weight":
        classes, width = shape
        return {"class_emb.weight": (classes - 1, width), "fake_latent": (1, width)}
    if name == "mask_token" or name.endswith("position_embedding"):
        shape = (1, *shape)
    return {rename(name, MAR_NAMES): shape}


def mar_config(
    weights: Weights,
    heads: int | Sequence[int] | None = None,
    patch_size: int | None = None,
    grid_size: Sequence[int] | None = None,
    layer_norm_eps: float = 1e-6,
    latent_channels: int | None = None,
    options: dict | None = None,
) -> MARTransformerConfig:
    """
    The configuration that the authors' weights have, by their names and shapes.

    Args:
        heads, patch_size, grid_size, layer_norm_eps: see [`convert_mar_checkpoint`].
        latent_channels: of the autoencoder.
        options: of the training script.

    Raises `ValueError` for what the weights do not say and the arguments leave open or contradict.
    """
    options = training_options(options or {})
    num_tokens = size(weights, "diffusion_pos_embed_learned", 1)
    num_slots = size(weights, "encoder_pos_embed_learned", 1) - num_tokens
    if num_slots < 1:
        raise ValueError(
            f"encoder_pos_embed_learned must have more rows than the {num_tokens} tokens, for the class, got "
            f"{num_slots + num_tokens}"
        )
    if grid_size is None:
        side = math.isqrt(num_tokens)
        if side * side != num_tokens:
            raise ValueError(f"{num_tokens} tokens form no square; give grid_size, the rows and columns of tokens")
        grid_size = (side, side)
    elif math.prod(grid_size) != num_tokens:
        raise ValueError(f"grid_size must be that of {num_tokens} tokens, got {tuple(grid_size)}")

    stacks = {stack: stack_sizes(weights, stack) for stack in ("encoder", "decoder")}
    found = [RELEASED_HEADS.get((sizes["hidden_size"], sizes["num_hidden_layers"])) for sizes in stacks.values()]
    heads = found if heads is None else [heads] * 2 if isinstance(heads, int) else heads
    for (stack, sizes), number in zip(stacks.items(), heads):
        if number is None:
            raise ValueError(
                f"the weights do not say how many attention heads the {stack} has, which is {sizes['hidden_size']} "
                f"wide and {sizes['num_hidden_layers']} blocks deep; give heads"
            )
        sizes |= {
            "num_attention_heads": number,
            "layer_norm_eps": layer_norm_eps,
            "attention_dropout": options.get("attn_dropout", 0.1),
            "hidden_dropout": options.get("proj_dropout", 0.1),
        }

    token_dim = size(weights, "z_proj.weight", 1)
    patch_size = patch_size or options.get("patch_size")
    if patch_size is None and latent_channels is not None:
        patch_size = math.isqrt(token_dim // latent_channels)
    elif patch_size is None and None not in found and token_dim == RELEASED_TOKEN_DIM:
        patch_size = 1
    elif patch_size is None:
        raise ValueError(
            f"the weights do not say of how many latents a token of {token_dim} numbers is made; give patch_size, "
            "or the checkpoint of the autoencoder as vae"
        )
    channels = token_dim // patch_size**2 if latent_channels is None else latent_channels
    if channels * patch_size**2 != token_dim:
        raise ValueError(
            f"a token has {token_dim} numbers, which are not {patch_size or 1}×{patch_size or 1} latents of "
            f"{channels or 1} channels"
        )
    return MARTransformerConfig(
        latent_shape=(channels, *(length * patch_size for length in grid_size)),
        patch_size=patch_size,
        cond_vocab_size=size(weights, "class_emb.weight", 0) + 1,
        cond_repeats=num_slots,
        null_cond_id=size(weights, "class_emb.weight", 0),
        encoder_config=stacks["encoder"],
        decoder_config=stacks["decoder"],
        head_config={
            "hidden_size": size(weights, "diffloss.net.input_proj.weight", 0),
            "num_hidden_layers": count(weights, r"diffloss\.net\.res_blocks"),
            "frequency_embedding_size": size(weights, "diffloss.net.time_embed.mlp.0.weight", 1),
        },
        mask_ratio_min=options.get("mask_ratio_min", 0.7),
        diffusion_batch_mul=options.get("diffusion_batch_mul", 4),
    )


def stack_sizes(weights: Weights, stack: str) -> dict[str, int]:
    return {
        "hidden_size": size(weights, f"{stack}_norm.weight", 0),
        "num_hidden_layers": count(weights, f"{stack}_blocks"),
        "intermediate_size": size(weights, f"{stack}_blocks.0.mlp.fc1.weight", 0),
    }


def size(weights: Weights, name: str, dimension: int) -> int:
    """The size of a weight along a dimension. Raises `ValueError` for a missing weight."""
    if name not in weights:
        raise ValueError(f"the weights lack {name}")
    shape = weights[name].shape
    if len(shape) <= dimension:
        raise ValueError(f"{name} must have more than {dimension} dimensions, got the shape {tuple(shape)}")
    return shape[dimension]


def count(weights: Weights, prefix: str) -> int:
    """The number of blocks whose names start by the regular expression `prefix`."""
    return len({match[1] for match in map(re.compile(rf"{prefix}\.(\d+)\.").match, weights) if match})


def training_options(options: dict) -> dict:
    """Those of [`TRAINING_OPTIONS`] that are there."""
    found = {name: options[name] for name in TRAINING_OPTIONS if name in options}
    for name, value in found.items():
        if not is_number(value):
            raise ValueError(f"args.{name} must be a number, got {shown(value)}")
    return found


def autoencoder_config(weights: Weights, scaling_factor: float) -> dict:
    """The configuration of the [`~diffusers.AutoencoderKL`] that the authors' weights have."""
    levels = count(weights, r"encoder\.down")
    widths = [size(weights, f"encoder.down.{level}.block.0.conv1.weight", 0) for level in range(levels)]
    start = size(weights, "encoder.conv_in.weight", 0)
    if not widths or start != widths[0]:
        raise ValueError(f"ch_mult must start with 1, but the first convolution has {start} channels, then {widths}")

    def kinds(half, attention, plain):
        return [attention if count(weights, rf"{half}\.{level}\.attn") else plain for level in range(levels)]

    return {
        "in_channels": size(weights, "encoder.conv_in.weight", 1),
        "out_channels": size(weights, "decoder.conv_out.weight", 0),
        "block_out_channels": widths,
        "layers_per_block": count(weights, r"encoder\.down\.0\.block"),
        "latent_channels": size(weights, "post_quant_conv.weight", 0),
        "down_block_types": kinds(r"encoder\.down", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": kinds(r"decoder\.up", "AttnUpDecoderBlock2D", "UpDecoderBlock2D")[::-1],
        "sample_size": 256,
        "scaling_factor": scaling_factor,
    }
