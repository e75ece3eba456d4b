"""RQ-VAE: an image as a small map of stacked codes (Lee et al., CVPR 2022, section 3.1).

Shapes: `B` batch, `H W` code grid, `D` quantization depth, `K` codebook size, `C` channels of a codeword. Pixels are
`(B, 3, height, width)` in [-1, 1] with height = H·f, width = W·f, f = 2^(levels − 1).

The feature map is `(B, C, H, W)`, unless one code position covers a patch of p×q features (`code_patch_size`): then it
is `(B, C/pq, H·p, W·q)`, and the pixels are as many times more.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.single_file_model import FromOriginalModelMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, Decoder, DecoderOutput, Encoder
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils import BaseOutput
from torch import nn

from ...argument_checks import (
    as_plain,
    check_bool,
    check_choice,
    check_floating,
    check_integer,
    check_items,
    check_number,
    check_size,
)
from ...model_cards import RQ_CITATION, HubMixin, model_card, quoted, with_card
from ...untrusted_files import read_state_dict, read_yaml
from ..codes import check_codes
from ..offloading import check_not_group_offloaded, onload_weights, unless_on_disk
from ..presets import load_preset
from ..pretrained import CheckedLoadingMixin
from ..remote_code import with_code
from .fused_blocks import fuse_blocks
from .residual_quantizer import QuantizerOutput, ResidualQuantizer


@dataclass
class RQVAEEncoderOutput(BaseOutput):
    """
    Args:
        latents (`torch.Tensor` of shape `(B, C, H, W)`): the feature map before quantization.
    """

    latents: torch.Tensor


@dataclass
class RQVAEOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor` of shape `(B, 3, height, width)`): the reconstruction, about [-1, 1], not clamped.
        codes (`torch.Tensor` of shape `(B, H, W, D)`, int64): the codes, coarse to fine.
        commitment_loss (`torch.Tensor`, scalar): mean over all partial sums of the squared error (eq. 7).
        codebook_loss (`torch.Tensor`, scalar, or `None`): only with `codebook_update="gradient"`.
    """

    # Defaults let accelerate rebuild the output field by field under mixed precision.
    sample: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    codebook_loss: torch.Tensor | None = None


class RQVAEModel(HubMixin, CheckedLoadingMixin, ModelMixin, AutoencoderMixin, FromOriginalModelMixin, ConfigMixin):
    r"""
    A VQ-GAN encoder and decoder with residual quantization between them. With `depth=1` it is a VQ-VAE.

    Args:
        in_channels (`int`): channels of the input image.
        out_channels (`int`): channels of the reconstruction.
        down_block_types (`tuple[str, ...]`): block of every level, fine to coarse; attention at a level is
            `"AttnDownEncoderBlock2D"` instead of `"DownEncoderBlock2D"`.
        up_block_types (`tuple[str, ...]`): likewise for the decoder, coarse to fine (`"AttnUpDecoderBlock2D"`).
        block_out_channels (`tuple[int, ...]`): width of every level, fine to coarse; each level halves the image.
        layers_per_block (`int`): residual blocks per level (the decoder has one more).
        mid_block_add_attention (`bool`): attention between the two residual blocks of the coarsest level.
        norm_num_groups (`int`): groups of the group normalization; divides every width.
        dropout (`float`): dropout inside the residual blocks.
        latent_channels (`int`): channels of the encoder's output.
        codebook_dim (`int`): C, dimension of a codeword; 1×1 convolutions map to and from it.
        code_patch_size (`tuple[int, int]`): rows p and columns q of features that one code position covers; its
            vector is their concatenation, so that p·q divides `codebook_dim`.
        codebook_size (`int`): K.
        depth (`int`): D, codes per position.
        shared_codebook (`bool`): one codebook for all depths, or one per depth.
        codebook_update (`str`): `"ema"` (moving average) or `"gradient"` (codebook loss), see [`ResidualQuantizer`].
        ema_decay (`float`, or one per codebook): decay of the moving average.
        restart_unused_codes (`bool`): restart dead codewords at features of the batch.
        quantizer_dropout (`float`): share of training images that are decoded from a random number of their first
            codes; one model then serves every depth.
        sample_size (`int`): height and width of the images the model was made for.
        scaling_factor (`float`): what continuous latents are multiplied with before a MAR model sees them: 1 / their
            standard deviation. Codes do not depend on it.

    Raises:
        `ValueError` or `TypeError`: block types and widths of different number, patches that do not divide a
            codeword, sizes that are no integers of at least 1, or invalid arguments of [`ResidualQuantizer`].
    """

    kind = "an RQ-VAE"
    _supports_gradient_checkpointing = True
    _group_offload_block_modules = ["encoder", "quant_conv", "quantizer", "post_quant_conv", "decoder"]
    _no_split_modules = ["Encoder", "Decoder", "ResidualQuantizer"]
    _keep_in_fp32_modules = ["quantizer"]
    _keys_to_ignore_on_load_unexpected = [r"quantizer\.cluster_"]  # of a codebook that is now trained by gradient
    _skip_layerwise_casting_patterns = ["quantizer"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 5 + ("AttnDownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 5,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512, 512),
        layers_per_block: int = 2,
        mid_block_add_attention: bool = True,
        norm_num_groups: int = 32,
        dropout: float = 0.0,
        latent_channels: int = 256,
        codebook_dim: int = 256,
        code_patch_size: tuple[int, int] = (1, 1),
        codebook_size: int = 16384,
        depth: int = 4,
        shared_codebook: bool = True,
        codebook_update: str = "ema",
        ema_decay: float | tuple[float, ...] = 0.99,
        restart_unused_codes: bool = True,
        quantizer_dropout: float = 0.0,
        sample_size: int = 256,
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        self.register_to_config(**{name: as_plain(value) for name, value in self.config.items() if name[0] != "_"})
        check_size("in_channels", in_channels)
        check_size("out_channels", out_channels)
        check_block_types("down_block_types", down_block_types, ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"))
        check_block_types("up_block_types", up_block_types, ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"))
        check_items("block_out_channels", block_out_channels)
        for width in block_out_channels:
            check_size("block_out_channels", width)
        check_size("layers_per_block", layers_per_block)
        check_bool("mid_block_add_attention", mid_block_add_attention)
        check_size("norm_num_groups", norm_num_groups)
        if any(width % norm_num_groups for width in block_out_channels):
            raise ValueError(
                f"norm_num_groups must divide all block_out_channels, got {norm_num_groups} and {block_out_channels}"
            )
        check_number("dropout", dropout, "lie in [0, 1)")
        check_size("latent_channels", latent_channels)
        check_size("codebook_dim", codebook_dim)
        check_items("code_patch_size", code_patch_size, 2)
        for side in code_patch_size:
            check_size("code_patch_size", side)
        check_size("codebook_size", codebook_size)
        check_size("sample_size", sample_size)
        check_number("scaling_factor", scaling_factor, "be greater than 0")
        if not len(down_block_types) == len(up_block_types) == len(block_out_channels):
            raise ValueError(
                "down_block_types, up_block_types and block_out_channels need one entry per level, got "
                f"{len(down_block_types)}, {len(up_block_types)} and {len(block_out_channels)}"
            )
        if codebook_dim % math.prod(code_patch_size):
            raise ValueError(
                "code_patch_size must be two numbers whose product divides codebook_dim, got "
                f"{tuple(code_patch_size)} and {codebook_dim}"
            )
        feature_channels = codebook_dim // math.prod(code_patch_size)
        self.encoder = Encoder(
            in_channels=in_channels,
            out_channels=latent_channels,
            down_block_types=down_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            double_z=False,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.quant_conv = nn.Conv2d(latent_channels, feature_channels, 1)
        self.quantizer = ResidualQuantizer(
            codebook_size,
            codebook_dim,
            depth,
            shared_codebook=shared_codebook,
            codebook_update=codebook_update,
            ema_decay=ema_decay,
            restart_unused_codes=restart_unused_codes,
            quantizer_dropout=quantizer_dropout,
        )
        self.post_quant_conv = nn.Conv2d(feature_channels, latent_channels, 1)
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=out_channels,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=mid_block_add_attention,
        )
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                module.dropout.p = dropout
        self.use_slicing = False

    @classmethod
    def from_preset(cls, name: str) -> "RQVAEModel":
        """A new model, with random weights, of the sizes of a published one: a name of [`PRESETS`].

        Raises `ValueError` for another name.
        """
        return cls(**load_preset(name, "vae"))

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path_or_dict=None, **kwargs) -> "RQVAEModel":
        """Loads the authors' `model.pt`, or its state dict, by `original_config="config.yaml"`.

        Everything else is as in diffusers. Raises `ValueError` without a configuration, which cannot be guessed, for
        broken files, and where weights do not fit it.
        """
        source, original_config = pretrained_model_link_or_path_or_dict, kwargs.get("original_config")
        if kwargs.get("original_config") is None and kwargs.get("config") is None:
            raise ValueError("from_single_file needs original_config, the config.yaml of the checkpoint, or config")
        # diffusers maps files as they are, also what is compressed or damaged, and limits YAML in nothing.
        if isinstance(original_config, str | os.PathLike) and os.path.isfile(original_config):
            kwargs["original_config"] = read_yaml(original_config, str(original_config))
        if isinstance(source, str | os.PathLike) and os.path.isfile(source):
            if os.path.splitext(source)[1] not in (".safetensors", ".gguf"):
                source = read_state_dict(source)
        elif isinstance(source, str):
            kwargs["disable_mmap"] = True
        return super().from_single_file(source, **kwargs)

    @property
    def pixels_per_code(self) -> tuple[int, int]:
        """Rows and columns of pixels that one position of the code grid covers."""
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        rows, columns = self.config.code_patch_size
        return factor * rows, factor * columns

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """(H, W, D) of the codes of images of `config.sample_size`."""
        rows, columns = self.pixels_per_code
        return self.config.sample_size // rows, self.config.sample_size // columns, self.config.depth

    @onload_weights
    def encode(self, pixels: torch.Tensor, return_dict: bool = True) -> RQVAEEncoderOutput | tuple[torch.Tensor]:
        """Pixels `(B, 3, height, width)` in [-1, 1] -> feature map `(B, C, H, W)` before quantization.

        Raises `ValueError` when code positions do not cover the pixels, or for another number of channels; `TypeError`
        for pixels that are not floating point.
        """
        self.check_pixels(pixels)
        pixels = pixels.to(self.dtype)
        latents = torch.cat([self._encode(p) for p in self._slices(pixels)])
        return RQVAEEncoderOutput(latents=latents) if return_dict else (latents,)

    @onload_weights
    def encode_to_vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(B, 3, height, width)` in [-1, 1] -> the vectors `(B, H, W, C)` that are quantized."""
        return self.patchify(self.encode(pixels).latents)

    @onload_weights
    def quantize(self, latents: torch.Tensor, return_dict: bool = True) -> QuantizerOutput | tuple[torch.Tensor, ...]:
        """Feature map `(B, C, H, W)` -> its residual quantization; in training mode also updates the codebook.

        In the output `quantized` is a feature map `(B, C, H, W)` and `codes` are `(B, H, W, D)`.
        """
        output = self.quantizer(self.patchify(latents))
        output.quantized = self.unpatchify(output.quantized)
        return output if return_dict else output.to_tuple()

    @onload_weights
    def decode(self, quantized: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Feature map `(B, C, H, W)` -> pixels `(B, 3, height, width)`, about [-1, 1], not clamped."""
        rows, columns = self.config.code_patch_size
        check_floating("quantized", quantized, "B", self.config.codebook_dim // (rows * columns), "H", "W")
        sample = torch.cat([self._decode(q) for q in self._slices(quantized.to(self.dtype))])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, pixels: torch.Tensor, return_dict: bool = True) -> RQVAEOutput | tuple[torch.Tensor, ...]:
        """Encode, quantize, decode: pixels `(B, 3, height, width)` in [-1, 1] -> [`RQVAEOutput`]."""
        latents = self.encode(pixels).latents
        quantization = self.quantize(latents)
        sample = self.decode(quantization.quantized).sample
        output = RQVAEOutput(sample, quantization.codes, quantization.commitment_loss, quantization.codebook_loss)
        return output if return_dict else output.to_tuple()

    @onload_weights
    @torch.no_grad()
    def get_codes(self, pixels: torch.Tensor, beam_size: int = 1) -> torch.Tensor:
        """The codes `(B, H, W, D)` of pixels `(B, 3, height, width)` in [-1, 1]; `beam_size` is that of
        [`ResidualQuantizer.encode`]."""
        return self.quantizer.encode(self.encode_to_vectors(pixels), beam_size=beam_size).codes

    @onload_weights
    @torch.no_grad()
    def get_soft_codes(
        self,
        pixels: torch.Tensor,
        temperature: float = 1.0,
        stochastic: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Soft targets of the codes of pixels `(B, 3, height, width)` (section 3.2.3).

        Args:
            temperature: τ > 0 of softmax(−‖r − e(k)‖²/τ).
            stochastic: sample the codes from the targets instead of taking the nearest.

        Returns:
            targets `(B, H, W, D, K)` float32 and codes `(B, H, W, D)`.
        """
        return self.quantizer.get_soft_codes(self.encode_to_vectors(pixels), temperature, stochastic, generator)

    @onload_weights
    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codewords `(B, H, W, D, C)` of codes `(B, H, W, D)`, not summed."""
        check_codes(codes, self.config.depth, self.config.codebook_size)
        return self.quantizer.embed(codes)

    @onload_weights
    @torch.no_grad()
    def decode_codes(
        self,
        codes: torch.Tensor,
        depth: int | None = None,
        num_positions: int | None = None,
        return_dict: bool = True,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Codes `(B, H, W, D)` -> pixels `(B, 3, height, width)`, about [-1, 1].

        Args:
            depth: decode from the first `depth` codes of every position only, in [1, D]: a coarse-to-fine preview.
            num_positions: decode the first positions in raster order only, in [0, H·W], and zeros elsewhere: a
                preview of a map that is still being sampled.
        """
        depth = self.config.depth if depth is None else depth
        check_integer("depth", depth, 1, self.config.depth)
        check_codes(codes, self.config.depth, self.config.codebook_size)
        vectors = self.quantizer.decode(codes[..., :depth])  # (B, H, W, C)
        if num_positions is not None:
            check_integer("num_positions", num_positions, 0, codes[0, ..., 0].numel())
            vectors.flatten(1, 2)[:, num_positions:] = 0
        return self.decode(self.unpatchify(vectors), return_dict=return_dict)

    save_pretrained = with_card(with_code(unless_on_disk(ModelMixin.save_pretrained)))
    loaders = {}  # with one, AutoModel of diffusers would ask everyone for trust_remote_code

    def card(self, model: str, **sections) -> str:
        """See [`HubMixin.card`]."""
        height, width, depth = self.code_shape
        channels, side, dim = self.config.in_channels, self.config.sample_size, self.config.codebook_dim
        usage = f"""import torch
from rq_hf import RQVAEModel

vae = RQVAEModel.from_pretrained({quoted(model)})
pixels = torch.rand(1, {channels}, {side}, {side}) * 2 - 1  # images in [-1, 1], here of noise
codes = vae.get_codes(pixels)  # (1, {height}, {width}, {depth})
pixels = vae.decode_codes(codes).sample  # (1, {channels}, {side}, {side})
vectors = vae.embed_codes(codes)  # (1, {height}, {width}, {depth}, {dim})"""
        title = f"RQ-VAE {side}² → {height}×{width}×{depth}, {self.config.codebook_size} codewords"
        own = {
            "about": "An autoencoder of images whose latents are quantized to stacked codes: every feature vector "
            "becomes a sum of codewords ([Lee et al., CVPR 2022](https://arxiv.org/abs/2203.01941)).",
            "tags": ["rq-vae", "image-tokenizer"],
            "citation": RQ_CITATION,
        }
        return model_card(title, usage, **own | sections)

    def enable_tiling(self) -> None:
        """Not supported: raises `NotImplementedError`."""
        raise NotImplementedError(
            "tiles would be normalised and attended to one by one, so that their codes are not those of the image; to "
            "save memory, call enable_slicing(), use bfloat16, or resize images towards config.sample_size"
        )

    def fuse_blocks(self) -> None:
        """
        Speeds up encoding and decoding, in place: weights become channels-last, residual blocks compute in place,
        each upsampling and the convolution after it become one transposed convolution. Images stay the same up to
        rounding. The model can still be moved, cast, saved and loaded, but no longer trained.
        """
        check_not_group_offloaded(self)
        self.requires_grad_(False)
        fuse_blocks(self)
        self.to(memory_format=torch.channels_last)

    def patchify(self, latents: torch.Tensor) -> torch.Tensor:
        """Feature map `(B, C, H, W)` -> the vectors `(B, H, W, C)` that are quantized, one per code position.

        Raises `ValueError` when patches of `code_patch_size` do not cover the map.
        """
        rows, columns = self.config.code_patch_size
        check_floating("latents", latents, "B", self.config.codebook_dim // (rows * columns), "H", "W")
        if latents.shape[-2] % rows or latents.shape[-1] % columns:
            raise ValueError(f"patches of {rows}×{columns} do not cover a feature map of {tuple(latents.shape)}")
        patches = latents.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))  # (B, C/pq, H, p, W, q)
        return patches.permute(0, 2, 4, 3, 5, 1).flatten(3)

    def unpatchify(self, vectors: torch.Tensor) -> torch.Tensor:
        """The inverse of [`patchify`]: `(B, H, W, C)` -> `(B, C, H, W)`."""
        check_floating("vectors", vectors, "B", "H", "W", self.config.codebook_dim)
        patches = vectors.unflatten(3, (*self.config.code_patch_size, -1))  # (B, H, W, p, q, C/pq)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def encoding_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights that codes depend on: those of the encoder and the codebook."""
        prefixes = ("encoder.", "quant_conv.", "quantizer.codebook")
        return {name: weight for name, weight in self.state_dict().items() if name.startswith(prefixes)}

    def check_pixels(self, pixels: torch.Tensor) -> None:
        """Raises `ValueError` unless `pixels` is `(B, 3, height, width)` with sides the encoder can divide."""
        rows, columns = self.pixels_per_code
        check_floating("pixels", pixels, "B", self.config.in_channels, "height", "width")
        height, width = pixels.shape[-2:]
        if height % rows or width % columns:
            raise ValueError(
                f"height and width must be divisible by {rows} and {columns}, the pixels that one code position "
                f"covers; got {height}×{width}"
            )

    def _slices(self, batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return batch.split(1) if self.use_slicing and len(batch) > 1 else (batch,)

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.quant_conv(self.encoder(pixels))

    def _decode(self, quantized: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(quantized))


def check_block_types(name: str, block_types: Sequence[str], accepted: Sequence[str]) -> None:
    """Raises `TypeError` unless `block_types` is a list or tuple, `ValueError` for a block that is not `accepted`."""
    check_items(name, block_types)
    for block_type in block_types:
        check_choice(name, block_type, accepted)
