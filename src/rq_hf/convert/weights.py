"""The authors' weights -> ours: other names, and here and there another shape.

Weights stay views of the memory-mapped checkpoint. Where one of ours is made of several of theirs (queries, keys and
values; the codebooks of all depths), the parts are kept apart until they are needed: [`Parts`].
"""

import re
from collections.abc import Iterable

import torch

from ..models import RQTransformerConfig, RQTransformerModel, RQVAEModel

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
    quantizer = model.quantizer
    depths = range(quantizer.depth)
    duplicates = {}
    for theirs in CODEBOOK_NAMES.values() if quantizer.shared_codebook else ():
        names = [f"quantizer.codebooks.{d}.{theirs}" for d in depths]
        duplicates.update((name, names[0]) for name in names[1:])
    differing = [
        name
        for name, first in duplicates.items()
        if name in original and first in original and not torch.equal(original[name], original[first])
    ]
    if differing:
        raise ValueError(f"{differing[0]} differs from that of depth 0, although shared_codebook is true")

    def original_names(name):
        stack, _, rest = name.partition(".")
        if stack == "quantizer":
            codebooks = depths[:1] if quantizer.shared_codebook else depths
            return [f"quantizer.codebooks.{d}.{CODEBOOK_NAMES[rest]}" for d in codebooks]
        levels = len(model.config.block_out_channels)
        name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
        return [rename(name, RQVAE_NAMES)]

    def prepare(name, weight):
        if name == "quantizer.codebook":
            weight = weight[:-1]  # the last row is their padding
        return weight[None] if name.startswith("quantizer.") else weight

    return take_weights(original, model, original_names, prepare, ignored=duplicates)


def rqtransformer_weights(original: dict[str, torch.Tensor], model: RQTransformerModel) -> dict[str, Parts]:
    """The weights of `model`, which may be on the meta device, except for its codebook.

    Raises `ValueError` where names or shapes do not fit.
    """
    config: RQTransformerConfig = model.config

    def original_names(name):
        if "qkv_proj" in name:
            names = [name.replace("self_attn.qkv_proj", f"attn.{part}") for part in ("query", "key", "value")]
        else:
            names = [name]
        return [rename(name, RQTRANSFORMER_NAMES) for name in names]

    def prepare(name, weight):
        separate = name == "classifier.weight" and not config.shared_classifier
        return weight.transpose(1, 2) if separate else weight  # (D, E, K) -> (D, K, E)

    # With one code per position there is nothing to project, though their models have the layer.
    ignored = ("head_mlp.weight", "head_mlp.bias") if config.code_shape[-1] == 1 else ()
    return take_weights(original, model, original_names, prepare, ignored, exclude=("codebook",))


def take_weights(original, model, original_names, prepare, ignored: Iterable[str] = (), exclude=()) -> dict[str, Parts]:
    """All weights of `model` but the excluded ones, by name; every weight of `original` is either used or ignored."""
    weights, missing, misshapen, used = {}, [], [], set(ignored)
    for name, ours in model.state_dict().items():
        if name in exclude:
            continue
        names = original_names(name)
        used.update(names)
        absent = [part for part in names if part not in original]
        if absent:
            missing += absent
            continue
        parts = tuple(prepare(name, original[part]) for part in names)
        rows = sum(part.shape[0] for part in parts)
        shape = (rows, *parts[0].shape[1:]) if len(parts) > 1 else parts[0].shape
        if squeezed(shape) != squeezed(ours.shape):
            misshapen.append(f"{names[0]}: {tuple(shape)} instead of {tuple(ours.shape)}")
            continue
        if len(parts) == 1:
            parts = (parts[0].reshape(ours.shape),)
        weights[name] = parts

    left_over = [name for name in original if name not in used]
    complaints = {"missing": missing, "left over": left_over, "of another shape": misshapen}
    if any(complaints.values()):
        raise ValueError(
            "the weights do not fit the config.yaml: "
            + "; ".join(
                f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
                for kind, names in complaints.items()
                if names
            )
        )
    return weights


def rename(name: str, table: dict[str, str]) -> str:
    return re.sub("|".join(map(re.escape, table)), lambda match: table[match[0]], name)


def squeezed(shape) -> list[int]:
    return [size for size in shape if size != 1]


def joined(parts: Parts) -> torch.Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
