"""The weights of published models of semantic IDs -> those of an RQEmbeddingModel.

Shapes: `K` codebook size, `C` dimension of a codeword. Batch normalisation, projections of a codebook and codewords
of unit length are computed into the weights of a linear layer or a codebook, in float64.
"""

from collections.abc import Callable
from itertools import count
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..argument_checks import check_finite, check_shape
from ..models import RQEmbeddingModel
from ..untrusted_files import shown, shown_first
from .weights import check_kinds, check_values

Weights = dict[str, torch.Tensor]

BATCH_NORM_EPS = 1e-5  # of PyTorch, which none of them changes
# Of every codeword; their weights do not say it. A codeword below 1 would be restarted, so one that further training
# does not use lives for 460 updates at a decay of 0.99.
CLUSTER_SIZE = 100.0


class Linear(NamedTuple):
    weight: torch.Tensor  # (out, in)
    bias: torch.Tensor | None  # (out,)


class Layers(NamedTuple):
    """The parts of a model; without linear layers its codebooks quantize the vectors themselves."""

    codebooks: list[torch.Tensor]  # (K, C) each
    encoder: list[Linear] = []
    decoder: list[Linear] = []


class Family(NamedTuple):
    """Models whose weights have the same names."""

    mark: str  # a name that only these have
    projects: dict[str, str]  # their repositories on GitHub, by name
    layers: Callable[..., Layers]  # takes what it uses out of a dictionary of weights


def res_k_means_layers(weights: Weights) -> Layers:
    return Layers(take_codebooks(weights, "centroids.{}"))


def lc_rec_layers(weights: Weights) -> Layers:
    """Dropout, linear layer, maybe batch normalisation, ReLU, and so on. LETTER normalises the last layer too."""

    def take_mlp(part: str) -> list[Linear]:
        layers, position, width = [], 1, "in"
        while not layers or f"{part}.mlp_layers.{position}.weight" in weights:
            layer = take_linear(weights, f"{part}.mlp_layers.{position}", width)
            width = len(layer.weight)
            normalized = f"{part}.mlp_layers.{position + 1}.running_var" in weights
            if normalized:
                layer = with_batch_norm(layer, weights, f"{part}.mlp_layers.{position + 1}")
            layers.append(layer)
            position += 4 if normalized else 3
        return layers

    if "encoder.mlp.mlp_layers.1.weight" in weights:
        raise ValueError("encoders that add their input to their output (RQ-KMeans+ of MiniOneRec) are not supported")
    encoder = take_mlp("encoder")
    codebooks = take_codebooks(weights, "rq.vq_layers.{}.embedding.weight", len(encoder[-1].weight))
    return Layers(codebooks, encoder, take_mlp("decoder"))


def rq_vae_recommender_layers(weights: Weights, codebook_normalize: bool) -> Layers:
    """Linear layers, without biases since December 2024, and activations in turn. SimVQ projects the codebooks;
    `codebook_normalize` gives the codewords of the first level unit length."""

    def take_mlp(part: str) -> list[Linear]:
        layers, width = [], "in"
        while not layers or f"{part}.mlp.{2 * len(layers)}.weight" in weights:
            name = f"{part}.mlp.{2 * len(layers)}"
            layers.append(take_linear(weights, name, width, has_bias=f"{name}.bias" in weights))
            width = len(layers[-1].weight)
        return layers

    encoder = take_mlp("encoder")
    width = len(encoder[-1].weight)
    codebooks = take_codebooks(weights, "layers.{}.embedding.weight", width)
    for level, codebook in enumerate(codebooks):
        projection = f"layers.{level}.out_proj.0.weight"
        if projection in weights:
            codebook = codebook.double() @ take(weights, projection, width, width).double().T
        codebooks[level] = F.normalize(codebook.double(), dim=-1) if codebook_normalize and level == 0 else codebook
    return Layers(codebooks, encoder, take_mlp("decoder"))


RES_K_MEANS = Family(
    "centroids.0", {"OpenOneRec": "https://github.com/Kuaishou-OneRec/OpenOneRec"}, res_k_means_layers
)
LC_REC = Family(
    "rq.vq_layers.0.embedding.weight",
    {
        "LC-Rec": "https://github.com/zhengbw0324/LC-Rec",
        "LETTER": "https://github.com/HonghuiBao2000/LETTER",
        "MiniOneRec": "https://github.com/AkaliKong/MiniOneRec",
    },
    lc_rec_layers,
)
RQ_VAE_RECOMMENDER = Family(
    "layers.0.embedding.weight",
    {"RQ-VAE-Recommender": "https://github.com/EdoardoBotta/RQ-VAE-Recommender"},
    rq_vae_recommender_layers,
)
FAMILIES = (RES_K_MEANS, LC_REC, RQ_VAE_RECOMMENDER)


def family_of(names) -> Family | None:
    """The models that have weights of these names."""
    return next((family for family in FAMILIES if family.mark in names), None)


def embedding_model(weights: Weights, family: Family, options: dict, **config) -> RQEmbeddingModel:
    """
    The model that has these weights, in evaluation mode.

    Args:
        options: arguments of the family's function.
        config: arguments of [`RQEmbeddingModel`] that weights do not say.

    Raises `ValueError` for weights that are missing, left over, of another shape or type, not finite, or larger than
    the memory that holds them, and for networks that are no [`RQEmbeddingModel`].
    """
    weights = {name: weight for name, weight in weights.items() if not name.endswith(".num_batches_tracked")}
    check_kinds(weights)
    weights = {name: weight.detach() for name, weight in weights.items()}
    check_values({name: weight for name, weight in weights.items() if weight.numel()})
    codebooks, encoder, decoder = family.layers(weights, **options)
    if weights:
        raise ValueError(f"{len(weights)} weights are left over ({shown_first(weights, 3)})")
    if len(encoder) == 1:
        raise ValueError("an encoder of one linear layer is not supported, only none or at least two")

    latent_dim = codebooks[0].shape[1]
    widths = [layer.weight.shape[1] for layer in encoder] + [latent_dim]
    decoder_widths = [layer.weight.shape[1] for layer in decoder] + [len(layer.weight) for layer in decoder[-1:]]
    if encoder and decoder_widths != widths[::-1]:
        raise ValueError(
            f"the decoder must mirror the encoder, which has the widths {widths}; it has {decoder_widths}"
        )
    sizes = [len(codebook) for codebook in codebooks]
    model = RQEmbeddingModel(
        input_dim=widths[0],
        hidden_dims=tuple(widths[1:-1]),
        latent_dim=latent_dim,
        codebook_size=sizes[0] if len(set(sizes)) == 1 else tuple(sizes),
        depth=len(sizes),
        **config,
    )
    ours = model.state_dict()
    for part, layers in (("encoder", encoder), ("decoder", decoder)):
        for i, layer in enumerate(layers):
            ours[f"{part}.{2 * i}.weight"].copy_(layer.weight)
            ours[f"{part}.{2 * i}.bias"].copy_(torch.zeros(()) if layer.bias is None else layer.bias)
    for level, codebook in enumerate(codebooks):
        ours["quantizer.codebook"][level, : len(codebook)] = codebook
        ours["quantizer.cluster_size"][level, : len(codebook)] = CLUSTER_SIZE
    ours["quantizer.cluster_sum"].copy_(ours["quantizer.codebook"] * CLUSTER_SIZE)
    for name, weight in ours.items():
        check_finite(name, weight)
    return model.eval()


def take(weights: Weights, name: str, *shape: int | str) -> torch.Tensor:
    """The weight of this name, removed from `weights`. Raises `ValueError` if it is missing or of another shape."""
    if name not in weights:
        raise ValueError(f"the weights lack {shown(name)}")
    check_shape(name, weights[name], *shape)
    return weights.pop(name)


def take_linear(weights: Weights, name: str, width: int | str, has_bias: bool = True) -> Linear:
    weight = take(weights, f"{name}.weight", "out", width)
    return Linear(weight, take(weights, f"{name}.bias", len(weight)) if has_bias else None)


def take_codebooks(weights: Weights, name: str, width: int | str = "C") -> list[torch.Tensor]:
    """The codebooks of all levels; `name` has `{}` in the place of the level."""
    codebooks = []
    for level in count():
        if level and name.format(level) not in weights:
            return codebooks
        codebooks.append(take(weights, name.format(level), "K", width))
        width = codebooks[0].shape[1]


def with_batch_norm(layer: Linear, weights: Weights, name: str) -> Linear:
    """A linear layer and the batch normalisation that follows it, as one layer."""
    names = ("weight", "bias", "running_mean", "running_var")
    gain, shift, mean, variance = (take(weights, f"{name}.{part}", len(layer.weight)).double() for part in names)
    factor = gain / (variance + BATCH_NORM_EPS).sqrt()
    return Linear(layer.weight.double() * factor[:, None], (layer.bias.double() - mean) * factor + shift)
