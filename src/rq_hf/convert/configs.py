"""The authors' `config.yaml` -> our configurations.

Two layouts exist: that of their repository (`dataset.vocab_size`, `experiment.sample`) and that of their checkpoints
(`arch.vocab_size`, `sampling`). Missing options take the defaults of their code.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml
from transformers import GenerationConfig

from ..models import RQTransformerConfig

RQVAE, RQTRANSFORMER = "rq-vae", "rq-transformer"
ACTIVATIONS = {"v1": "gelu", "v2": "quick_gelu"}
SAMPLING_OPTIONS = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p"}


class Section(dict):
    """A section of a `config.yaml`. Errors name the missing option; the options that were read are recorded."""

    def __init__(self, values: dict, path: str = ""):
        super().__init__({k: Section(v, f"{path}{k}.") if isinstance(v, dict) else v for k, v in values.items()})
        self.path = path
        self.read = set()

    def __getitem__(self, option):
        self.read.add(option)
        if option not in self:
            raise ValueError(f"config.yaml lacks {self.path}{option}")
        return super().__getitem__(option)

    def get(self, option, default=None):
        self.read.add(option)
        return super().get(option, default)

    def section(self, option) -> "Section":
        """The section with this name, or an empty one if it is missing or empty."""
        return self.get(option) or Section({}, f"{self.path}{option}.")

    def unread(self) -> Iterator[str]:
        for option, value in self.items():
            if option not in self.read:
                yield f"{self.path}{option}"
            elif isinstance(value, Section):
                yield from value.unread()


def read_config(path: Path) -> Section:
    """Raises `ValueError` for a file that is not YAML, or whose top level is not a mapping."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        section = Section(config) if isinstance(config, dict) else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if section is None:
        raise ValueError(f"{path} must hold named options, got {type(config).__name__}")
    return section


def stage_of(config: Section) -> str | None:
    """`"rq-vae"`, `"rq-transformer"`, or `None` for the configuration of any other model."""
    arch = config.get("arch")
    kind = str(arch.get("type")).lower() if isinstance(arch, Section) else None
    return kind if kind in (RQVAE, RQTRANSFORMER) else None


def rqvae_config(config: Section) -> dict:
    """Arguments of [`RQVAEModel`].

    Raises `ValueError`, naming the option and its value, for codebooks of unequal size, a `ch_mult` that does not
    start with 1, and unsupported options.
    """
    arch = config["arch"]
    hparams, ddconfig = arch["hparams"], arch["ddconfig"]
    for section, option, default, accepted in (
        (hparams, "bottleneck_type", "rq", "rq"),
        (ddconfig, "double_z", True, False),
        (ddconfig, "resamp_with_conv", True, True),
        (ddconfig, "give_pre_end", False, False),
    ):
        if section.get(option, default) != accepted:
            refuse(section, option, section.get(option, default), f"it must be {str(accepted).lower()}")

    widths = ddconfig.get("ch_mult", [1, 2, 4, 8])
    if widths[0] != 1:
        refuse(ddconfig, "ch_mult", widths, "it must start with 1")
    levels, resolution, attention = len(widths), ddconfig["resolution"], ddconfig["attn_resolutions"]
    coarsest = resolution // 2 ** (levels - 1)

    latent_rows, latent_columns, latent_dim = hparams["latent_shape"]
    code_rows, code_columns, depth = hparams["code_shape"]
    if latent_rows % code_rows or latent_columns % code_columns:
        refuse(hparams, "code_shape", hparams["code_shape"], f"it must divide latent_shape {hparams['latent_shape']}")
    if hparams["embed_dim"] != latent_dim:
        refuse(
            hparams, "embed_dim", hparams["embed_dim"], f"it must be that of latent_shape {hparams['latent_shape']}"
        )
    patch = (latent_rows // code_rows, latent_columns // code_columns)

    return {
        "in_channels": ddconfig["in_channels"],
        "out_channels": ddconfig["out_ch"],
        "down_block_types": [
            "AttnDownEncoderBlock2D" if resolution // 2**i in attention else "DownEncoderBlock2D"
            for i in range(levels)
        ],
        "up_block_types": [
            "AttnUpDecoderBlock2D" if coarsest * 2**i in attention else "UpDecoderBlock2D" for i in range(levels)
        ],
        "block_out_channels": [ddconfig["ch"] * width for width in widths],
        "layers_per_block": ddconfig["num_res_blocks"],
        "dropout": ddconfig.get("dropout", 0.0),
        "latent_channels": ddconfig["z_channels"],
        "codebook_dim": patch[0] * patch[1] * latent_dim,
        "code_patch_size": patch,
        "codebook_size": equal_sizes(hparams, "n_embed"),
        "depth": depth,
        "shared_codebook": hparams["shared_codebook"],
        "ema_decay": hparams.get("decay", 0.99),
        "restart_unused_codes": hparams.get("restart_unused_codes", False),
        "sample_size": resolution,
    }


def rqtransformer_config(config: Section, shared_codebook: bool) -> RQTransformerConfig:
    """
    Args:
        shared_codebook: whether the RQ-VAE has one codebook for all depths; `config` does not contain it.

    Raises `ValueError`, naming the option and its value, for learned token embeddings and codebooks of unequal size.
    """
    arch = config["arch"]
    for option in ("input_emb_vqvae", "head_emb_vqvae"):
        if not arch.get(option, False):
            refuse(arch, option, arch.get(option, False), "codes must enter as codewords, not as token embeddings")
    loss = config.section("loss")
    text_weight, image_weight = loss.get("txt_weight", 0.1), loss.get("img_weight", 0.9)
    return RQTransformerConfig(
        code_shape=arch["block_size"],
        codebook_size=equal_sizes(arch if "vocab_size" in arch else config.section("dataset"), "vocab_size"),
        codebook_dim=arch["input_embed_dim"],
        shared_codebook=shared_codebook,
        cond_vocab_size=max(arch.get("vocab_size_cond", 0), 1),
        cond_length=max(arch.get("block_size_cond", 0), 1),
        spatial_config=stack_config(arch, "body"),
        depth_config=stack_config(arch, "head"),
        cumulative_depth_inputs=arch.get("cumsum_depth_ctx", False),
        shared_classifier=arch.get("shared_cls_emb", False),
        embedding_dropout=arch.get("embd_pdrop", 0.0),
        text_loss_weight=text_weight / (text_weight + image_weight),
    )


def stack_config(arch: Section, name: str) -> dict:
    stack = arch[name]
    block, width = stack["block"], arch["embed_dim"]
    if block.get("embed_dim", width) != width:
        refuse(block, "embed_dim", block["embed_dim"], f"it must be arch.embed_dim {width}")
    if block.get("gelu", "v1") not in ACTIVATIONS:
        refuse(block, "gelu", block["gelu"], f"it must be {' or '.join(ACTIVATIONS)}")
    return {
        "hidden_size": width,
        "num_hidden_layers": stack["n_layer"],
        "num_attention_heads": block["n_head"],
        "hidden_act": ACTIVATIONS[block.get("gelu", "v1")],
        "attention_bias": block.get("attn_bias", True),
        "mlp_bias": block.get("mlp_bias", True),
        "attention_dropout": block.get("attn_pdrop", 0.0),
        "hidden_dropout": block.get("resid_pdrop", 0.1),
    }


def generation_config(config: Section) -> GenerationConfig:
    """The sampling settings in `sampling`, or else in `experiment.sample`: numbers, or lists with one per depth."""
    sampling = config.section("sampling") or config.section("experiment").section("sample")
    settings = {}
    for option, name in SAMPLING_OPTIONS.items():
        value = sampling.get(option)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(number, int | float) for number in values):
            refuse(sampling, option, value, "it must be a number, or one per depth")
        if values:
            settings[name] = values[0] if len(values) == 1 else values
    return GenerationConfig(do_sample=True, **settings)


def equal_sizes(section: Section, option: str) -> int:
    sizes = section[option] if isinstance(section[option], list) else [section[option]]
    if len(set(sizes)) > 1:
        refuse(section, option, sizes, "all depths must have the same codebook size")
    return sizes[0]


def refuse(section: Section, option: str, value, reason: str) -> None:
    raise ValueError(f"{section.path}{option}: {str(value).lower()} is not supported: {reason}")
