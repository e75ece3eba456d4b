"""Residual quantization of embedding vectors: what semantic IDs are made of (Rajput et al., "Recommender Systems with
Generative Retrieval", NeurIPS 2023, section 3.1).

Shapes: `N` vectors of `input_dim` channels, `D` quantization depth, also called levels, `K` codebook size, `C`
dimension of a codeword.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from ...argument_checks import (
    as_plain,
    check_bool,
    check_choice,
    check_finite,
    check_floating,
    check_int64,
    check_integer,
    check_items,
    check_size,
    check_values,
)
from ...model_cards import RQ_CITATION, HubMixin, model_card, quoted, with_card
from ..offloading import check_not_offloaded, onload_weights, unless_on_disk
from ..pretrained import CheckedLoadingMixin
from ..remote_code import with_code
from ..rq_vae.residual_quantizer import ResidualQuantizer

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
LATENT_DIM = 32  # of TIGER
CHUNK = 8192  # vectors that are encoded at once


@dataclass
class RQEmbeddingOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor` of shape `(N, input_dim)`): the reconstructed vectors.
        codes (`torch.Tensor` of shape `(N, D)`, int64): the codes, coarse to fine.
        latents (`torch.Tensor` of shape `(N, C)`): the encoder's output, before quantization.
        commitment_loss (`torch.Tensor`, scalar): see [`QuantizerOutput`].
    """

    # Defaults let accelerate rebuild the output field by field under mixed precision.
    sample: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None


class Linear(nn.Linear):
    """A linear layer that computes in float64 on inputs of float64."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float64:
            return super().forward(x)
        return F.linear(x, self.weight.double(), self.bias.double())


class RQEmbeddingModel(HubMixin, CheckedLoadingMixin, ModelMixin, ConfigMixin):
    r"""
    Vectors as D codes, one from each of D codebooks, with or without an encoder and decoder around them.

    Codes are computed in float64, with weights of any type. So they do not depend on the other vectors of a call, the
    number of threads or the device, unless two codewords are equally near to 12 digits.

    Args:
        input_dim (`int`): channels of a vector.
        hidden_dims (`tuple[int, ...]`): widths of the encoder's hidden layers, and in reverse of the decoder's. `()`
            is no encoder: the vectors themselves are quantized, which is residual k-means.
        latent_dim (`int`, *optional*): C. Default: 32 with an encoder, and `input_dim`, which it must be, without.
        codebook_size (`int`, or one per level): K.
        depth (`int`): D.
        activation (`str`): between the layers: `"relu"` or `"silu"`.
        ema_decay (`float`, or one per level): decay of the moving averages that train the codebooks.
        restart_unused_codes (`bool`): restart dead codewords at latents of the batch.
        normalize_latents (`bool`): scale latents to unit length before they are quantized.
        normalize_output (`bool`): scale reconstructed vectors to unit length.

    Raises:
        `ValueError` or `TypeError` for sizes that are no integers of at least 1, and for other invalid arguments.
    """

    kind = "a model of embeddings"
    _group_offload_block_modules = ["encoder", "quantizer", "decoder"]
    _no_split_modules = ["ResidualQuantizer"]
    _keep_in_fp32_modules = ["quantizer", "mean", "scale"]
    _skip_layerwise_casting_patterns = ["quantizer"]

    @register_to_config
    def __init__(
        self,
        input_dim: int = 768,
        hidden_dims: tuple[int, ...] = (512, 256, 128),
        latent_dim: int | None = None,
        codebook_size: int | tuple[int, ...] = 256,
        depth: int = 3,
        activation: str = "relu",
        ema_decay: float | tuple[float, ...] = 0.99,
        restart_unused_codes: bool = True,
        normalize_latents: bool = False,
        normalize_output: bool = False,
    ):
        super().__init__()
        check_size("input_dim", input_dim)
        check_items("hidden_dims", hidden_dims)
        for width in hidden_dims:
            check_size("hidden_dims", width)
        if latent_dim is None:
            latent_dim = LATENT_DIM if hidden_dims else input_dim
        check_size("latent_dim", latent_dim)
        if not hidden_dims and latent_dim != input_dim:
            raise ValueError(f"without hidden_dims, latent_dim must be input_dim, got {latent_dim} and {input_dim}")
        check_choice("activation", activation, list(ACTIVATIONS))
        check_bool("normalize_latents", normalize_latents)
        check_bool("normalize_output", normalize_output)
        config = {name: as_plain(value) for name, value in self.config.items() if name[0] != "_"}
        self.register_to_config(**config | {"latent_dim": latent_dim})
        widths = (input_dim, *hidden_dims, latent_dim) if hidden_dims else ()
        self.encoder = mlp(widths, activation)
        self.quantizer = ResidualQuantizer(
            codebook_size,
            latent_dim,
            depth,
            shared_codebook=False,
            ema_decay=ema_decay,
            restart_unused_codes=restart_unused_codes,
        )
        self.decoder = mlp(widths[::-1], activation)
        self.register_buffer("mean", torch.zeros(input_dim))
        self.register_buffer("scale", torch.ones(()))

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K of every level."""
        return self.quantizer.codebook_sizes

    @onload_weights
    def to_latents(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors `(N, input_dim)` -> what is quantized: the encoder's output `(N, C)` on standardised vectors, in
        float64 for vectors of float64. Raises like [`encode`]."""
        check_vectors(vectors, self.config.input_dim)
        return self._to_latents(vectors)

    @onload_weights
    @torch.no_grad()
    def fit(self, vectors: torch.Tensor, iterations: int = 25) -> "RQEmbeddingModel":
        """
        Sets mean and scale to those of vectors `(N, input_dim)`, and the codebooks by k-means: each on the residuals
        that those before it leave of the encoder's output. Without an encoder nothing else is to be trained; with
        one, it is how a training begins. Returns the model.

        Raises `ValueError` for fewer vectors than codewords, vectors that are NaN, infinite or all equal, and while
        the weights are offloaded; `TypeError` for integers.
        """
        check_not_offloaded(self, "mean")
        check_vectors(vectors, self.config.input_dim)
        mean = vectors.mean(dim=0, dtype=torch.float64)
        variance = sum((chunk.double() - mean).square().sum() for chunk in vectors.split(CHUNK)) / vectors.numel()
        if not variance > 0:
            raise ValueError(f"all {len(vectors)} vectors are equal: there is nothing to quantize")
        self.mean.copy_(mean)
        self.scale.copy_(variance.sqrt())
        latents = vectors.new_empty(len(vectors), self.config.latent_dim, dtype=torch.float32)
        for chunk, found in zip(vectors.split(CHUNK), latents.split(CHUNK)):
            found.copy_(self._to_latents(chunk))
        self.quantizer.initialize(latents, iterations)
        return self

    @onload_weights
    @torch.no_grad()
    def encode(self, vectors: torch.Tensor, beam_size: int = 1, balanced: bool = False) -> torch.Tensor:
        """
        The codes `(N, D)` of vectors `(N, input_dim)`.

        Args:
            beam_size: see [`ResidualQuantizer.encode`].
            balanced: assign the codes of the last level so that none serves more than ⌈N/K⌉ of these vectors. This is
                for a whole catalogue at once, as a code then depends on the other vectors of the call.

        Raises `ValueError` for another number of channels, NaN and infinite values; `TypeError` for integers.
        """
        check_vectors(vectors, self.config.input_dim)
        check_size("beam_size", beam_size)
        check_bool("balanced", balanced)
        codes, last_residuals = [], []
        for chunk in vectors.split(CHUNK):
            encoding = self.quantizer.encode(self._to_latents(chunk.double()), beam_size=beam_size)
            codes.append(encoding.codes)
            last_residuals.append(encoding.residuals[:, -1] if balanced else None)
        codes = torch.cat(codes)
        if balanced:
            codes[:, -1] = self.quantizer.balanced_codes(torch.cat(last_residuals))
        return codes

    @onload_weights
    @torch.no_grad()
    def decode(self, codes: torch.Tensor, depth: int | None = None) -> torch.Tensor:
        """
        Codes `(N, d)`, d ≤ D -> the vectors `(N, input_dim)` that they stand for.

        Args:
            depth: decode from the first `depth` codes only, in [1, d].

        Raises `ValueError` for codes out of range or of more levels, `TypeError` unless they are int64.
        """
        check_int64("codes", codes, "N", "d")
        if depth is not None:
            check_integer("depth", depth, 1, codes.shape[1])
            codes = codes[:, :depth]
        return self._reconstruct(self.quantizer.decode(codes))

    def forward(self, vectors: torch.Tensor, return_dict: bool = True) -> RQEmbeddingOutput | tuple[torch.Tensor, ...]:
        """Encode, quantize, decode: vectors `(N, input_dim)` -> [`RQEmbeddingOutput`]; in training mode also updates
        the codebooks.

        Raises `ValueError` for another number of channels, NaN and infinite values; `TypeError` for integers.
        """
        check_vectors(vectors, self.config.input_dim)
        latents = self._to_latents(vectors)
        quantization = self.quantizer(latents)
        sample = self._reconstruct(quantization.quantized)
        output = RQEmbeddingOutput(sample, quantization.codes, latents, quantization.commitment_loss)
        return output if return_dict else output.to_tuple()

    def _to_latents(self, vectors: torch.Tensor) -> torch.Tensor:
        dtype = torch.float64 if vectors.dtype == torch.float64 else self.dtype
        latents = self.encoder(((vectors - self.mean) / self.scale).to(dtype))
        return F.normalize(latents, dim=-1) if self.config.normalize_latents else latents

    def _reconstruct(self, quantized: torch.Tensor) -> torch.Tensor:
        vectors = self.decoder(quantized.to(self.dtype)) * self.scale + self.mean
        return F.normalize(vectors, dim=-1) if self.config.normalize_output else vectors

    save_pretrained = with_card(with_code(unless_on_disk(ModelMixin.save_pretrained)))
    loaders = {}  # with one, AutoModel of diffusers would ask everyone for trust_remote_code

    def card(self, model: str, **sections) -> str:
        """See [`HubMixin.card`]."""
        channels, sizes = self.config.input_dim, "×".join(map(str, self.codebook_sizes))
        usage = f"""import torch
from rq_hf import RQEmbeddingModel

model = RQEmbeddingModel.from_pretrained({quoted(model)})
vectors = torch.randn(2, {channels})  # here of noise
codes = model.encode(vectors)  # (2, {self.config.depth})
vectors = model.decode(codes)  # (2, {channels})"""
        own = {
            "about": "Residual quantization of embedding vectors: every vector becomes a tuple of codes, coarse to "
            "fine, which can serve as the semantic ID of an item.",
            "tags": ["semantic-ids", "residual-quantization"],
            "citation": RQ_CITATION,
        }
        return model_card(f"Vectors of {channels} channels → codes of {sizes}", usage, **own | sections)


def mlp(widths: Sequence[int], activation: str) -> nn.Module:
    """Linear layers of these widths with an activation between them; without widths, the identity."""
    if not widths:
        return nn.Identity()
    layers = []
    for width, following in pairwise(widths):
        linear = Linear(width, following)
        nn.init.xavier_normal_(linear.weight)  # that of nn.Linear would shrink the latents to hundredths
        nn.init.zeros_(linear.bias)
        layers += [linear, ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def check_vectors(vectors: torch.Tensor, channels: int, count: int | str = "N") -> None:
    """Raises `ValueError` or `TypeError` unless `vectors` are `count` finite ones of `channels` channels."""
    check_floating("vectors", vectors, count, channels)
    check_values("vectors", vectors)
    check_finite("vectors", vectors)
