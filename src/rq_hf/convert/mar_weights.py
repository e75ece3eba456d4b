"""The authors' MAR weights -> ours: what configuration they are of, and how they are renamed."""

import math
import re
from collections.abc import Sequence

import torch

from ..argument_checks import is_integer, is_number
from ..models import MARTransformerConfig, MARTransformerModel
from ..untrusted_files import shown
from .configs import MAX_REPEATS, MAX_SIZE
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
TRAINING_OPTIONS = {  # of the authors' training script, which the weights do not say
    "patch_size": int,
    "diffusion_batch_mul": int,
    "attn_dropout": float,
    "proj_dropout": float,
    "mask_ratio_min": float,
}


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
    options: dict,
    *,
    heads: Sequence[int] | None,
    patch_size: int | None,
    grid_size: Sequence[int] | None,
    layer_norm_eps: float,
    latent_channels: int | None,
) -> MARTransformerConfig:
    """
    The configuration that the authors' weights have, by their names and shapes.

    Args:
        options: of the training script.
        heads, patch_size, grid_size, layer_norm_eps: see [`convert_mar_checkpoint`].
        latent_channels: of the autoencoder, if it is known.

    Raises `ValueError` for what the weights do not say and the arguments leave open or contradict.
    """
    options = training_options(options)
    num_tokens = size(weights, "diffusion_pos_embed_learned", 1)
    num_slots = size(weights, "encoder_pos_embed_learned", 1) - num_tokens
    if num_slots < 1:
        raise ValueError(
            f"encoder_pos_embed_learned must have more than {num_tokens} rows, those of the tokens, because the class "
            f"goes before them; got {num_slots + num_tokens}"
        )
    stacks = {name: stack_sizes(weights, name) for name in ("encoder", "decoder")}
    released = [RELEASED_HEADS.get((sizes["hidden_size"], sizes["num_hidden_layers"])) for sizes in stacks.values()]
    for (name, sizes), number in zip(stacks.items(), heads or released):
        if number is None:
            raise ValueError(
                f"the weights do not say how many attention heads the {name} has, which is {sizes['hidden_size']} "
                f"wide and {sizes['num_hidden_layers']} blocks deep; give heads"
            )
        sizes["num_attention_heads"] = number
        sizes["layer_norm_eps"] = layer_norm_eps
        sizes["attention_dropout"] = options.get("attn_dropout", 0.1)
        sizes["hidden_dropout"] = options.get("proj_dropout", 0.1)

    token_dim = size(weights, "z_proj.weight", 1)
    patch_size = patch_size or options.get("patch_size")
    if patch_size is None and latent_channels is None and None not in released and token_dim == RELEASED_TOKEN_DIM:
        patch_size = 1
    channels, patch_size = patch_shape(token_dim, patch_size, latent_channels)
    height, width = grid_shape(num_tokens, grid_size)
    num_classes = size(weights, "class_emb.weight", 0)
    return MARTransformerConfig(
        latent_shape=(channels, height * patch_size, width * patch_size),
        patch_size=patch_size,
        cond_vocab_size=num_classes + 1,
        cond_repeats=num_slots,
        null_cond_id=num_classes,
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


def patch_shape(token_dim: int, patch_size: int | None, channels: int | None) -> tuple[int, int]:
    """The channels and the patch size p of tokens of `token_dim` = channels · p² numbers, one of which is known."""
    if patch_size is None and channels is None:
        raise ValueError(
            f"the weights do not say of how many latents a token of {token_dim} numbers is made; give patch_size, or "
            "the checkpoint of the autoencoder as vae"
        )
    known = f"of {channels} channels, as the autoencoder has" if channels else ""
    patch_size = patch_size or max(1, math.isqrt(token_dim // channels))
    channels = channels or token_dim // patch_size**2
    if channels * patch_size**2 != token_dim:
        raise ValueError(f"a token of {token_dim} numbers is no patch of {patch_size}×{patch_size} latents {known}")
    return channels, patch_size


def grid_shape(num_tokens: int, grid_size: Sequence[int] | None) -> tuple[int, int]:
    """Rows and columns of the tokens: `grid_size`, or a square."""
    if grid_size is None:
        grid_size = (math.isqrt(num_tokens),) * 2
        if math.prod(grid_size) != num_tokens:
            raise ValueError(f"{num_tokens} tokens form no square; give grid_size, the rows and columns of tokens")
    elif math.prod(grid_size) != num_tokens:
        raise ValueError(f"grid_size must be that of {num_tokens} tokens, got {tuple(grid_size)}")
    return tuple(grid_size)


def stack_sizes(weights: Weights, stack: str) -> dict[str, int]:
    return {
        "hidden_size": size(weights, f"{stack}_norm.weight", 0),
        "num_hidden_layers": count(weights, f"{stack}_blocks"),
        "intermediate_size": size(weights, f"{stack}_blocks.0.mlp.fc1.weight", 0),
    }


def size(weights: Weights, name: str, dimension: int) -> int:
    """The size of a weight along a dimension. Raises `ValueError` for a missing weight, or one that has no such size
    or none that a model can have."""
    if name not in weights:
        raise ValueError(f"the weights lack {name}")
    shape = tuple(weights[name].shape)
    if len(shape) <= dimension or not 1 <= shape[dimension] <= MAX_SIZE:
        raise ValueError(f"{name} must have from 1 to {MAX_SIZE:,} values along dimension {dimension}, got {shape}")
    return shape[dimension]


def count(weights: Weights, prefix: str) -> int:
    """The number of blocks whose names start by the regular expression `prefix`. Raises `ValueError` for more than a
    model can have."""
    number = len({match[1] for match in map(re.compile(rf"{prefix}\.(\d+)\.").match, weights) if match})
    if number > MAX_REPEATS:
        raise ValueError(f"{number} blocks {prefix} are not supported, at most {MAX_REPEATS}")
    return number


def training_options(options: dict) -> dict[str, int | float]:
    """The options of the training script that weights do not say, as far as they are there."""
    found = {}
    for name, kind in TRAINING_OPTIONS.items():
        if name in options:
            value = options[name]
            is_size = is_integer(value) and 1 <= value <= MAX_SIZE
            if not (is_size if kind is int else is_number(value) and 0 <= value <= 1):
                accepted = f"an integer from 1 to {MAX_SIZE:,}" if kind is int else "a number from 0 to 1"
                raise ValueError(f"args.{name} must be {accepted}, got {shown(value)}")
            found[name] = kind(value)
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
