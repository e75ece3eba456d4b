"""The authors' weights -> ours: renamed, and in a few cases reshaped.

Weights stay views of the memory-mapped checkpoint. A weight that combines several of theirs (queries, keys and values;
the codebooks of all depths) is kept as its [`Parts`] until it is needed.
"""

import re
from collections.abc import Callable, Container

import torch
from diffusers import AutoencoderKL

from ..models import RQTransformerModel, RQVAEModel
from ..untrusted_files import shown, shown_first

Parts = tuple[torch.Tensor, ...]  # to be concatenated along the first dimension
Shapes = dict[str, tuple[int, ...]]  # of the parts, by the authors' names

RQVAE_NAMES = {
    "mid_block.attentions.0": "mid.attn_1",
    "resnets": "block",
    "attentions": "attn",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CODEBOOK_NAMES = {"codebook": "weight", "cluster_size": "cluster_size_ema", "cluster_sum": "embed_ema"}
RQTRANSFORMER_NAMES = {
    "spatial_stack.layers": "body_transformer.blocks",
    "depth_stack.layers": "head_transformer.blocks",
    "attention_norm": "ln1",
    "mlp_norm": "ln2",
    "self_attn.o_proj": "attn.proj",
    "mlp.up_proj": "mlp.0",
    "mlp.down_proj": "mlp.2",
    "cond_embedding": "cond_emb",
    "cond_position_embedding": "pos_emb_cond",
    "spatial_position_embedding": "pos_emb_hw",
    "depth_position_embedding": "pos_emb_d",
    "code_projection": "input_mlp",
    "depth_projection": "head_mlp",
    "cond_norm": "cond_classifier.layer_norm",
    "cond_classifier": "cond_classifier.linear",
    "classifier.norm": "classifier.layer_norm",
    "classifier": "classifier.linear",
}


def rqvae_weights(original: dict[str, torch.Tensor], model: RQVAEModel) -> dict[str, Parts]:
    """The weights of `model`, which may be on the meta device, from a state dict of the authors' RQ-VAE.

    Raises `ValueError` for weights that [`take_weights`] refuses, negative cluster sizes, or copies of a shared
    codebook that differ.
    """

    def to_ours(name, weight, shape):
        return weight[: shape[-2]] if name == "quantizer.codebook" else weight  # their last row is padding

    duplicates = {}
    for theirs in CODEBOOK_NAMES.values() if model.quantizer.shared_codebook else ():
        for d in range(1, model.quantizer.depth):
            duplicates[f"quantizer.codebooks.{d}.{theirs}"] = f"quantizer.codebooks.0.{theirs}"
    weights = take_weights(original, model, rqvae_parts, to_ours, ignored=duplicates)
    for copy, first in duplicates.items():
        if copy in original and not torch.equal(original[copy], original[first]):
            raise ValueError(f"{copy} differs from {first}, although shared_codebook is true")
    if any(part.min() < 0 for part in weights["quantizer.cluster_size"]):
        raise ValueError("cluster_size_ema must not be negative")
    return weights


def rqvae_parts(name: str, shape: torch.Size, model: RQVAEModel | AutoencoderKL) -> Shapes:
    """The authors' names and shapes of the parts of our weight `name`, which has this `shape`."""
    if name == "quantizer.codebook":
        shape = (shape[0], shape[1] + 1, shape[2])
    if name.startswith("quantizer."):
        theirs = CODEBOOK_NAMES[name.removeprefix("quantizer.")]
        return {f"quantizer.codebooks.{m}.{theirs}": shape[1:] for m in range(shape[0])}
    if ".attentions." in name and len(shape) == 2:
        shape = (*shape, 1, 1)
    coarsest = len(model.config.block_out_channels) - 1
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{coarsest - int(match[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    return {rename(name, RQVAE_NAMES): shape}


def rqtransformer_weights(original: dict[str, torch.Tensor], model: RQTransformerModel) -> dict[str, Parts]:
    """The weights of `model`, which may be on the meta device, except for its codebook.

    Raises `ValueError` for weights that [`take_weights`] refuses.
    """

    def to_ours(name, weight, shape):
        separate = name == "classifier.weight" and not model.config.shared_classifier
        return weight.transpose(1, 2) if separate else weight  # (D, E, K) -> (D, K, E)

    # With one code per position their models have this layer, but do not use it.
    ignored = ("head_mlp.weight", "head_mlp.bias") if model.config.code_shape[-1] == 1 else ()
    return take_weights(original, model, rqtransformer_parts, to_ours, ignored, excluded="codebook")


def rqtransformer_parts(name: str, shape: torch.Size, model: RQTransformerModel) -> Shapes:
    """The authors' names and shapes of the parts of our weight `name`, which has this `shape`."""
    names = [name]
    if "qkv_proj" in name:
        names = [name.replace("self_attn.qkv_proj", f"attn.{part}") for part in ("query", "key", "value")]
        shape = (shape[0] // 3, *shape[1:])
    elif name.endswith("position_embedding"):
        shape = (1, *shape)
    elif name in ("classifier.weight", "classifier.bias") and model.config.shared_classifier:
        shape = shape[1:]
    elif name == "classifier.weight":
        shape = (shape[0], shape[2], shape[1])
    return {rename(name, RQTRANSFORMER_NAMES): shape for name in names}


def rename(name: str, table: dict[str, str]) -> str:
    return re.sub("|".join(map(re.escape, table)), lambda match: table[match[0]], name)


def take_weights(
    original: dict[str, torch.Tensor],
    model: torch.nn.Module,
    parts_of: Callable[[str, torch.Size, torch.nn.Module], Shapes],
    to_ours: Callable[[str, torch.Tensor, torch.Size], torch.Tensor] = lambda name, weight, shape: weight,
    ignored: Container[str] = (),
    excluded: str | None = None,
) -> dict[str, Parts]:
    """All weights of `model` except for `excluded`.

    Raises `ValueError` unless every weight of `original` is a dense tensor of floating-point numbers and used or in
    `ignored`, and those that are used have the right shape, finite values and memory of their own.
    """
    check_kinds(original)
    weights, missing, misshapen, used = {}, [], [], set()
    for name, ours in model.state_dict().items():
        if name == excluded:
            continue
        shapes = parts_of(name, ours.shape, model)
        used.update(shapes)
        absent = [theirs for theirs in shapes if theirs not in original]
        wrong = [t for t, expected in shapes.items() if t not in absent and original[t].shape != tuple(expected)]
        missing += absent
        misshapen += [f"{t}: {tuple(original[t].shape)} instead of {tuple(shapes[t])}" for t in wrong]
        if not absent and not wrong:
            part_shape = (-1, *ours.shape[1:])
            weights[name] = tuple(to_ours(name, original[theirs], ours.shape).reshape(part_shape) for theirs in shapes)

    complaints = {
        "missing": missing,
        "left over": [name for name in original if name not in used and name not in ignored],
        "of another shape": misshapen,
    }
    complaints = [f"{len(names)} {kind} ({shown_first(names, 3)})" for kind, names in complaints.items() if names]
    if complaints:
        raise ValueError(f"the weights do not fit the configuration: {'; '.join(complaints)}")
    check_values({name: original[name] for name in used})
    return weights


def check_kinds(original: dict[str, torch.Tensor]) -> None:
    for name, weight in original.items():
        if not isinstance(weight, torch.Tensor):
            raise ValueError(f"{shown(name)} must be a tensor, got {type(weight).__name__}")
        if weight.layout != torch.strided or weight.is_nested or weight.is_meta or weight.dtype not in DTYPES:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            kind = f"{str(weight.dtype).removeprefix('torch.')}{' without values' if weight.is_meta else ''}"
            raise ValueError(f"{shown(name)} must be a dense tensor of {accepted}, got {kind}")


def check_values(weights: dict[str, torch.Tensor]) -> None:
    # A few bytes of a file can be the memory of any number of weights, and of weights of any size.
    storages = [weight.untyped_storage() for weight in weights.values()]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    needed = sum(weight.nbytes for weight in weights.values())
    if needed > held:
        raise ValueError(f"weights share memory: they would need {needed:,} bytes and have {held:,}")
    for name, weight in weights.items():
        lowest, highest = weight.detach().aminmax()  # NaN if there is one
        if not (lowest.float().isfinite() and highest.float().isfinite()):
            raise ValueError(f"{name} has values that are NaN or infinite in float32")


def concatenate(parts: Parts) -> torch.Tensor:
    """The complete weight, in float32."""
    return (torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()).float()
