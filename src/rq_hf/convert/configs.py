"""The authors' `config.yaml` -> our configurations.

Two layouts exist: that of their repository (`dataset.vocab_size`, `experiment.sample`) and that of their checkpoints
(`arch.vocab_size`, `sampling`). Missing options take the defaults of their code.
"""

import math
from collections.abc import Iterator
from typing import NoReturn

from transformers import GenerationConfig

from ..argument_checks import is_integer
from ..models import RQTransformerConfig
from ..untrusted_files import shown

RQVAE, RQTRANSFORMER = "rq-vae", "rq-transformer"
ACTIVATIONS = {"v1": "gelu", "v2": "quick_gelu"}
SAMPLING_OPTIONS = {
    "temp": ("temperature", lambda t: is_number(t) and 0 < t < math.inf, "greater than 0"),
    "top_k": ("top_k", lambda k: is_integer(k) and k >= 1, "integers of at least 1"),
    "top_p": ("top_p", lambda p: is_number(p) and 0 < p <= 1, "in (0, 1]"),
}
# Far above all published models. Without these limits a few bytes of YAML would describe a model that takes hours to
# build, or one whose sizes exceed 64 bits.
MAX_SIZE = 1_000_000  # widths, vocabularies, resolutions
MAX_REPEATS = 200  # layers, blocks, depths
REQUIRED = object()


class Section:
    """A section of a `config.yaml`, which records the options that were read.

    Errors name the option, what it holds and what is accepted.
    """

    def __init__(self, values: dict, path: str = ""):
        self.values = values
        self.path = path
        self.sections = {}
        self.read = set()

    def __contains__(self, option: str) -> bool:
        return option in self.values

    def get(self, option: str, default=REQUIRED):
        self.read.add(option)
        value = self.values.get(option, default)
        if value is REQUIRED:
            raise ValueError(f"config.yaml lacks {self.path}{option}")
        return value

    def section(self, option: str) -> "Section":
        """The section with this name, without options if it is missing or empty."""
        if option not in self.sections:
            values = self.get(option, None)
            if not isinstance(values, dict | None):
                self.refuse(option, values, "it must hold named options")
            self.sections[option] = Section(values or {}, f"{self.path}{option}.")
        return self.sections[option]

    def flag(self, option: str, default=REQUIRED) -> bool:
        value = self.get(option, default)
        if not isinstance(value, bool):
            self.refuse(option, value, "it must be true or false")
        return value

    def number(self, option: str, default: float, below: float) -> float:
        """A number in [0, below)."""
        value = self.get(option, default)
        if not is_number(value) or not 0 <= value < below:
            self.refuse(option, value, f"it must be a number in [0, {below:,})")
        return value

    def integer(self, option: str, default=REQUIRED, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        value = self.get(option, default)
        if not is_integer(value) or not minimum <= value <= maximum:
            self.refuse(option, value, f"it must be an integer from {minimum} to {maximum:,}")
        return value

    def integers(self, option: str, default=REQUIRED) -> list[int]:
        values = self.get(option, default)
        if not isinstance(values, list) or not all(is_integer(value) and 1 <= value <= MAX_SIZE for value in values):
            self.refuse(option, values, f"it must be a list of integers from 1 to {MAX_SIZE:,}")
        return values

    def shape(self, option: str) -> list[int]:
        """Rows, columns, and channels or depth."""
        shape = self.integers(option)
        if len(shape) != 3:
            self.refuse(option, shape, "it must be three integers")
        return shape

    def code_shape(self, option: str) -> list[int]:
        """Rows, columns and depth."""
        shape = self.shape(option)
        if shape[-1] > MAX_REPEATS:
            self.refuse(option, shape, f"the depth, its last integer, must be at most {MAX_REPEATS}")
        return shape

    def equal_sizes(self, option: str) -> int:
        """A size that may be given once for all depths or once per depth."""
        sizes = self.integers(option) if isinstance(self.get(option), list) else [self.integer(option)]
        if len(set(sizes)) != 1:
            self.refuse(option, sizes, "all depths must have the same codebook size")
        return sizes[0]

    def refuse(self, option: str, value, reason: str) -> NoReturn:
        raise ValueError(f"{self.path}{option}: {shown(value).lower()} is not supported: {reason}")

    def unread(self) -> Iterator[str]:
        for option in self.values:
            if option not in self.read:
                yield shown(f"{self.path}{option}")
            elif option in self.sections:
                yield from self.sections[option].unread()


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def stage_of(config: Section) -> str | None:
    """`"rq-vae"`, `"rq-transformer"`, or `None` for the configuration of any other model."""
    if not isinstance(config.get("arch", None), dict):
        return None
    kind = config.section("arch").get("type", None)
    return kind.lower() if isinstance(kind, str) and kind.lower() in (RQVAE, RQTRANSFORMER) else None


def rqvae_config(config: Section) -> dict:
    """Arguments of [`RQVAEModel`].

    Raises `ValueError`, naming the option and its value, for codebooks of unequal size, a `ch_mult` that does not
    start with 1, unsupported options, and values of another type or out of range.
    """
    arch = config.section("arch")
    hparams, ddconfig = arch.section("hparams"), arch.section("ddconfig")
    latent_shape, code_shape = hparams.shape("latent_shape"), hparams.code_shape("code_shape")
    latent_rows, latent_columns, latent_dim = latent_shape
    code_rows, code_columns, depth = code_shape
    if latent_rows % code_rows or latent_columns % code_columns:
        hparams.refuse("code_shape", code_shape, f"it must divide latent_shape {latent_shape}")
    patch = (latent_rows // code_rows, latent_columns // code_columns)
    codebook_dim = math.prod(patch) * latent_dim
    if codebook_dim > MAX_SIZE:
        hparams.refuse("code_shape", code_shape, f"with latent_shape {latent_shape} codewords would be too large")
    if hparams.integer("embed_dim") != latent_dim:
        hparams.refuse("embed_dim", hparams.get("embed_dim"), f"it must be that of latent_shape {latent_shape}")

    for section, option, default, accepted in (
        (hparams, "bottleneck_type", "rq", "rq"),
        (ddconfig, "double_z", True, False),
        (ddconfig, "resamp_with_conv", True, True),
        (ddconfig, "give_pre_end", False, False),
    ):
        if section.get(option, default) != accepted:
            section.refuse(option, section.get(option, default), f"it must be {str(accepted).lower()}")

    width, multiples = ddconfig.integer("ch"), ddconfig.integers("ch_mult", [1, 2, 4, 8])
    if multiples[:1] != [1]:
        ddconfig.refuse("ch_mult", multiples, "it must start with 1")
    if width % 32 or width * max(multiples) > MAX_SIZE:
        ddconfig.refuse("ch", width, f"it must be a multiple of 32, and with ch_mult at most {MAX_SIZE:,}")
    levels, attention = len(multiples), ddconfig.integers("attn_resolutions")
    resolution = ddconfig.integer("resolution")
    coarsest = resolution >> (levels - 1)
    if coarsest == 0:
        ddconfig.refuse("resolution", resolution, f"it is too small for the {levels} levels of ch_mult")

    decay = hparams.get("decay", 0.99)
    if not all(is_number(d) and 0 <= d < 1 for d in (decay if isinstance(decay, list) else [decay])):
        hparams.refuse("decay", decay, "it must be a number in [0, 1), or one per depth")
    return {
        "in_channels": ddconfig.integer("in_channels"),
        "out_channels": ddconfig.integer("out_ch"),
        "down_block_types": [
            "AttnDownEncoderBlock2D" if resolution // 2**i in attention else "DownEncoderBlock2D"
            for i in range(levels)
        ],
        "up_block_types": [
            "AttnUpDecoderBlock2D" if coarsest * 2**i in attention else "UpDecoderBlock2D" for i in range(levels)
        ],
        "block_out_channels": [width * multiple for multiple in multiples],
        "layers_per_block": ddconfig.integer("num_res_blocks", maximum=MAX_REPEATS),
        "dropout": ddconfig.number("dropout", 0.0, below=1),
        "latent_channels": ddconfig.integer("z_channels"),
        "codebook_dim": codebook_dim,
        "code_patch_size": patch,
        "codebook_size": hparams.equal_sizes("n_embed"),
        "depth": depth,
        "shared_codebook": hparams.flag("shared_codebook"),
        "ema_decay": decay,
        "restart_unused_codes": hparams.flag("restart_unused_codes", False),
        "sample_size": resolution,
    }


def rqtransformer_config(config: Section, shared_codebook: bool) -> RQTransformerConfig:
    """
    Args:
        shared_codebook: whether the RQ-VAE has one codebook for all depths; `config` does not contain it.

    Raises `ValueError`, naming the option and its value, for learned token embeddings, codebooks of unequal size, and
    values of another type or out of range.
    """
    arch = config.section("arch")
    for option in ("input_emb_vqvae", "head_emb_vqvae"):
        if not arch.flag(option, False):
            arch.refuse(option, False, "codes must enter as codewords, not as token embeddings")
    loss = config.section("loss")
    text_weight, image_weight = (
        loss.number(option, default, below=MAX_SIZE) for option, default in (("txt_weight", 0.1), ("img_weight", 0.9))
    )
    if text_weight + image_weight == 0:
        loss.refuse("img_weight", image_weight, "txt_weight and img_weight cannot both be 0")
    return RQTransformerConfig(
        code_shape=arch.code_shape("block_size"),
        codebook_size=(arch if "vocab_size" in arch else config.section("dataset")).equal_sizes("vocab_size"),
        codebook_dim=arch.integer("input_embed_dim"),
        shared_codebook=shared_codebook,
        cond_vocab_size=max(arch.integer("vocab_size_cond", 0, minimum=0), 1),
        cond_length=max(arch.integer("block_size_cond", 0, minimum=0), 1),
        spatial_config=stack_config(arch, "body"),
        depth_config=stack_config(arch, "head"),
        cumulative_depth_inputs=arch.flag("cumsum_depth_ctx", False),
        shared_classifier=arch.flag("shared_cls_emb", False),
        embedding_dropout=arch.number("embd_pdrop", 0.0, below=1),
        text_loss_weight=text_weight / (text_weight + image_weight),
    )


def stack_config(arch: Section, name: str) -> dict:
    stack = arch.section(name)
    block, width = stack.section("block"), arch.integer("embed_dim")
    if block.get("embed_dim", width) != width:
        block.refuse("embed_dim", block.get("embed_dim"), f"it must be arch.embed_dim {width}")
    if width % block.integer("n_head"):
        block.refuse("n_head", block.get("n_head"), f"it must divide arch.embed_dim {width}")
    activation = block.get("gelu", "v1")
    if activation not in list(ACTIVATIONS):
        block.refuse("gelu", activation, f"it must be {' or '.join(ACTIVATIONS)}")
    return {
        "hidden_size": width,
        "num_hidden_layers": stack.integer("n_layer", minimum=0, maximum=MAX_REPEATS),
        "num_attention_heads": block.get("n_head"),
        "hidden_act": ACTIVATIONS[activation],
        "attention_bias": block.flag("attn_bias", True),
        "mlp_bias": block.flag("mlp_bias", True),
        "attention_dropout": block.number("attn_pdrop", 0.0, below=1),
        "hidden_dropout": block.number("resid_pdrop", 0.1, below=1),
    }


def generation_config(config: Section) -> GenerationConfig:
    """The sampling settings in `sampling`, or else in `experiment.sample`: numbers, or lists with one per depth."""
    sampling = config.section("sampling")
    if not sampling.values:
        sampling = config.section("experiment").section("sample")
    depth = config.section("arch").code_shape("block_size")[-1]
    settings = {}
    for option, (name, accepts, accepted) in SAMPLING_OPTIONS.items():
        value = sampling.get(option, None)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if len(values) not in (0, 1, depth) or not all(map(accepts, values)):
            sampling.refuse(option, value, f"it must be {accepted}: one number, or one per depth ({depth})")
        if values:
            settings[name] = values[0] if len(values) == 1 else values
    return GenerationConfig(do_sample=True, **settings)
