"""Configuration of the RQ-Transformer: one sub-configuration per stack."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ...argument_checks import (
    LARGEST_SIZE,
    check_choice,
    check_instance,
    check_integer,
    check_items,
    check_number,
    check_size,
)
from ..presets import load_preset
from ..remote_code import LoaderFileMixin


@strict
class RQStackConfig(PreTrainedConfig):
    r"""
    One stack of pre-norm transformer blocks.

    Args:
        hidden_size (`int`): E.
        num_hidden_layers (`int`): number of blocks; the depth stack may have none.
        num_attention_heads (`int`): heads; divides `hidden_size`.
        intermediate_size (`int`, *optional*, defaults to 4·E): width of the MLP.
        hidden_act (`str`): `"gelu"` or any other activation of transformers.
        attention_bias (`bool`): biases in the attention projections.
        mlp_bias (`bool`): biases in the MLP.
        attention_dropout (`float`): dropout on the attention weights, in [0, 1).
        hidden_dropout (`float`): dropout on the outputs of attention and MLP, in [0, 1).
        layer_norm_eps (`float`): epsilon of the layer norms.
        initializer_range (`float`): standard deviation of the initial weights.
    """

    model_type = "rq_transformer_stack"

    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    attention_bias: bool = True
    mlp_bias: bool = True
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        check_size("hidden_size", self.hidden_size)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        check_size("intermediate_size", self.intermediate_size)
        check_size("num_attention_heads", self.num_attention_heads)
        check_integer("num_hidden_layers", self.num_hidden_layers, 0, LARGEST_SIZE)
        check_choice("hidden_act", self.hidden_act, list(ACT2FN))
        check_number("layer_norm_eps", self.layer_norm_eps, "be greater than 0")
        check_number("initializer_range", self.initializer_range, "be at least 0")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be divisible by num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        check_number("attention_dropout", self.attention_dropout, "lie in [0, 1)")
        check_number("hidden_dropout", self.hidden_dropout, "lie in [0, 1)")
        super().__post_init__(**kwargs)


@strict
class RQTransformerConfig(LoaderFileMixin, PreTrainedConfig):
    r"""
    Args:
        code_shape (`tuple[int, int, int]`): (H, W, D).
        codebook_size (`int`): K.
        codebook_dim (`int`): C.
        shared_codebook (`bool`): whether the RQ-VAE has one codebook for all depths or one per depth.
        cond_vocab_size (`int`): V, number of condition ids: classes, or the vocabulary of the tokenizer; 1 when
            unconditional.
        cond_length (`int`): L, condition tokens in front of the image: the text length, or 1.
        null_cond_id (`int`, *optional*): the id that stands for "no condition" (all L tokens of it) in
            classifier-free guidance: the padding token of a text model, an extra class of a class model.
        spatial_config, depth_config (`dict` or [`RQStackConfig`]): the two stacks, with the same hidden size.
        cumulative_depth_inputs (`bool`): the input of depth d is the projected sum of the codewords before d (the
            paper's section 3.2.2), or, when false, the projected codeword of d − 1 alone.
        shared_classifier (`bool`): one classifier for all depths, or one per depth.
        embedding_dropout (`float`): dropout on the inputs of the spatial stack, in [0, 1).
        text_loss_weight (`float`): weight w in loss = w·(next-token loss of the text) + (1 − w)·(loss of the codes);
            in [0, 1]; only used when L > 1.
        soft_label_temperature (`float`): τ > 0 of the soft labels that the model learns from, in units of squared
            distance; the paper's 0.5 suits the paper's codebooks.
        initializer_range (`float`): standard deviation of the initial embeddings and classifiers.
    """

    model_type = "rq_transformer"
    attribute_map = {"vocab_size": "cond_vocab_size"}  # what `resize_token_embeddings` sets
    # Older releases of transformers know the first name only, and leave it to the class to create the configurations.
    sub_configs = sub_configs_defaults = {"spatial_config": RQStackConfig, "depth_config": RQStackConfig}

    code_shape: list[int] | tuple[int, ...] = (8, 8, 4)
    codebook_size: int = 16384
    codebook_dim: int = 256
    shared_codebook: bool = True
    cond_vocab_size: int = 1
    cond_length: int = 1
    null_cond_id: int | None = None
    spatial_config: dict | PreTrainedConfig | None = None
    depth_config: dict | PreTrainedConfig | None = None
    cumulative_depth_inputs: bool = True
    shared_classifier: bool = True
    embedding_dropout: float = 0.0
    text_loss_weight: float = 0.1
    soft_label_temperature: float = 0.5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.code_shape = tuple(self.code_shape)
        if self.depth_config is None:
            self.depth_config = {"num_hidden_layers": 4}
        for name, config_class in self.sub_configs.items():
            if getattr(self, name) is not None:
                check_instance(name, getattr(self, name), dict | config_class)
            if not isinstance(getattr(self, name), config_class):
                setattr(self, name, config_class(**(getattr(self, name) or {})))
        super().__post_init__(**kwargs)
        check_items("code_shape", self.code_shape, 3)
        for size in self.code_shape:
            check_size("code_shape", size)
        for name in ("codebook_size", "codebook_dim", "cond_vocab_size", "cond_length"):
            check_size(name, getattr(self, name))
        if self.spatial_config.hidden_size != self.depth_config.hidden_size:
            raise ValueError(
                "spatial_config and depth_config must have the same hidden_size, got "
                f"{self.spatial_config.hidden_size} and {self.depth_config.hidden_size}"
            )
        if self.spatial_config.num_hidden_layers < 1:
            raise ValueError(
                f"spatial_config.num_hidden_layers must be at least 1, got {self.spatial_config.num_hidden_layers}"
            )
        if self.null_cond_id is not None and not 0 <= self.null_cond_id < self.cond_vocab_size:
            raise ValueError(f"null_cond_id must lie in [0, {self.cond_vocab_size}), got {self.null_cond_id}")
        check_number("embedding_dropout", self.embedding_dropout, "lie in [0, 1)")
        check_number("text_loss_weight", self.text_loss_weight, "lie in [0, 1]")
        check_number("soft_label_temperature", self.soft_label_temperature, "be greater than 0")
        check_number("initializer_range", self.initializer_range, "be at least 0")

    @classmethod
    def from_preset(cls, name: str) -> "RQTransformerConfig":
        """The configuration of a published model: a name of [`PRESETS`]. Raises `ValueError` for another name."""
        return cls(**load_preset(name, "transformer"))
