"""The authors' weights -> ours: other names, and here and there another shape.

Weights stay views of the memory-mapped checkpoint. Where one of ours is made of several of theirs (queries, keys and
values; the codebooks of all depths), the parts are kept apart until they are needed: [`Parts`].
"""

import re
from collections.abc import Callable, Iterable

import torch

from ..models import RQTransformerModel, RQVAEModel

Parts = tuple[torch.Tensor, ...]  # to be concatenated along the first dimension

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

    Raises `ValueError` where names or shapes do not fit, and when the copies of a shared codebook differ.
    """
    duplicates = {}
    if model.quantizer.shared_codebook:
        for theirs in CODEBOOK_NAMES.values():
            first = f"quantizer.codebooks.0.{theirs}"
            copies = [f"quantizer.codebooks.{d}.{theirs}" for d in range(1, model.quantizer.depth)]
            for copy in copies:
                if first in original and copy in original and not torch.equal(original[first], original[copy]):
                    raise ValueError(f"{copy} differs from {first}, although shared_codebook is true")
            duplicates.update(dict.fromkeys(copies))

    def prepare(name, weight):
        if name == "quantizer.codebook":
            weight = weight[:-1]  # the last row is their padding
        return weight[None] if name.startswith("quantizer.") else weight  # (K, C) -> (1, K, C)

    return take_weights(original, model, rqvae_names, prepare, ignored=duplicates)


def rqvae_names(name: str, model: RQVAEModel) -> list[str]:
    """The authors' names of what makes up our weight `name`."""
    if name.startswith("quantizer."):
        theirs = CODEBOOK_NAMES[name.removeprefix("quantizer.")]
        num_codebooks = len(model.quantizer.codebook)
        return [f"quantizer.codebooks.{m}.{theirs}" for m in range(num_codebooks)]
    coarsest = len(model.config.block_out_channels) - 1
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{coarsest - int(match[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    return [rename(name, RQVAE_NAMES)]


def rqtransformer_weights(original: dict[str, torch.Tensor], model: RQTransformerModel) -> dict[str, Parts]:
    """The weights of `model`, which may be on the meta device, except for its codebook.

    Raises `ValueError` where names or shapes do not fit.
    """

    def prepare(name, weight):
        separate = name == "classifier.weight" and not model.config.shared_classifier
        return weight.transpose(1, 2) if separate else weight  # (D, E, K) -> (D, K, E)

    # With one code per position there is nothing to project, though their models have the layer.
    ignored = ("head_mlp.weight", "head_mlp.bias") if model.config.code_shape[-1] == 1 else ()
    return take_weights(original, model, rqtransformer_names, prepare, ignored, excluded="codebook")


def rqtransformer_names(name: str, model: RQTransformerModel) -> list[str]:
    """The authors' names of what makes up our weight `name`."""
    if "qkv_proj" in name:
        names = [name.replace("self_attn.qkv_proj", f"attn.{part}") for part in ("query", "key", "value")]
    else:
        names = [name]
    return [rename(name, RQTRANSFORMER_NAMES) for name in names]


def rename(name: str, table: dict[str, str]) -> str:
    return re.sub("|".join(map(re.escape, table)), lambda match: table[match[0]], name)


def take_weights(
    original: dict[str, torch.Tensor],
    model: torch.nn.Module,
    names_of: Callable[[str, torch.nn.Module], list[str]],
    prepare: Callable[[str, torch.Tensor], torch.Tensor],
    ignored: Iterable[str] = (),
    excluded: str | None = None,
) -> dict[str, Parts]:
    """All weights of `model` but the excluded one; every weight of `original` is either used or ignored."""
    weights, missing, misshapen, used = {}, [], [], set(ignored)
    for name, ours in model.state_dict().items():
        if name == excluded:
            continue
        names = names_of(name, model)
        used.update(names)
        absent = [theirs for theirs in names if theirs not in original]
        missing += absent
        if absent:
            continue
        parts = tuple(prepare(name, original[theirs]) for theirs in names)
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:]) if len(parts) > 1 else parts[0].shape
        if squeezed(shape) != squeezed(ours.shape):
            misshapen.append(f"{names[0]}: {tuple(shape)} instead of {tuple(ours.shape)}")
            continue
        weights[name] = parts if len(parts) > 1 else (parts[0].reshape(ours.shape),)

    left_over = [name for name in original if name not in used]
    complaints = {"missing": missing, "left over": left_over, "of another shape": misshapen}
    complaints = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in complaints.items()
        if names
    ]
    if complaints:
        raise ValueError(f"the weights do not fit the config.yaml: {'; '.join(complaints)}")
    return weights


def squeezed(shape) -> list[int]:
    return [size for size in shape if size != 1]


def joined(parts: Parts) -> torch.Tensor:
    """The whole weight, in single precision."""
    return (torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()).float()
