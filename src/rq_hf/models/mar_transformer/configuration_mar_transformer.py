"""Configuration of the MAR transformer: encoder, decoder and diffusion head have a sub-configuration each."""

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
class MARStackConfig(PreTrainedConfig):
    r"""
    One stack of pre-norm transformer blocks: the encoder or the decoder.

    Args:
        hidden_size (`int`): width, E of the encoder and Z of the decoder.
        num_hidden_layers (`int`): number of blocks.
        num_attention_heads (`int`): heads; divides `hidden_size`.
        intermediate_size (`int`, *optional*, defaults to 4 · `hidden_size`): width of the MLP.
        hidden_act (`str`): `"gelu"` or any other activation of transformers.
        attention_dropout (`float`): dropout on the attention weights, in [0, 1).
        hidden_dropout (`float`): dropout on the outputs of attention and MLP and inside the MLP, in [0, 1).
        layer_norm_eps (`float`): epsilon of the layer norms.
    """

    model_type = "mar_transformer_stack"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    attention_dropout: float = 0.1
    hidden_dropout: float = 0.1
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs):
        check_size("hidden_size", self.hidden_size)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        for name in ("intermediate_size", "num_hidden_layers", "num_attention_heads"):
            check_size(name, getattr(self, name))
        check_choice("hidden_act", self.hidden_act, list(ACT2FN))
        check_number("layer_norm_eps", self.layer_norm_eps, "be greater than 0")
        check_number("attention_dropout", self.attention_dropout, "lie in [0, 1)")
        check_number("hidden_dropout", self.hidden_dropout, "lie in [0, 1)")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be divisible by num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        super().__post_init__(**kwargs)


@strict
class MARHeadConfig(PreTrainedConfig):
    r"""
    The diffusion head: an MLP that denoises one token.

    Args:
        hidden_size (`int`): width.
        num_hidden_layers (`int`): number of residual blocks.
        frequency_embedding_size (`int`): sines and cosines that a timestep is embedded as; even.
        layer_norm_eps (`float`): epsilon of the layer norms.
    """

    model_type = "mar_transformer_head"

    hidden_size: int = 1024
    num_hidden_layers: int = 6
    frequency_embedding_size: int = 256
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs):
        check_size("hidden_size", self.hidden_size)
        check_integer("num_hidden_layers", self.num_hidden_layers, 0, LARGEST_SIZE)
        check_size("frequency_embedding_size", self.frequency_embedding_size)
        if self.frequency_embedding_size % 2:
            raise ValueError(f"frequency_embedding_size must be even, got {self.frequency_embedding_size}")
        check_number("layer_norm_eps", self.layer_norm_eps, "be greater than 0")
        super().__post_init__(**kwargs)


@strict
class MARTransformerConfig(LoaderFileMixin, PreTrainedConfig):
    r"""
    Args:
        latent_shape (`tuple[int, int, int]`): channels, height and width of the latents of the autoencoder.
        patch_size (`int`): p; a token is a patch of p × p latents and has C = channels·p² numbers; H and W are height
            and width divided by p.
        cond_vocab_size (`int`): V, number of condition ids: classes, or the vocabulary of the tokenizer; 1 when
            unconditional.
        cond_length (`int`): L, tokens of a condition: the text length, or 1.
        cond_repeats (`int`): how often the condition is repeated in front of the image; the authors' models repeat a
            class 64 times, as a buffer for the encoder to compute in.
        null_cond_id (`int`, *optional*): the id that stands for "no condition" (all L tokens of it) in
            classifier-free guidance: the padding token of a text model, an extra class of a class model.
        encoder_config, decoder_config (`dict` or [`MARStackConfig`]): the two stacks.
        head_config (`dict` or [`MARHeadConfig`]): the diffusion head.
        mask_ratio_min (`float`): in training, the share of hidden tokens follows a normal distribution of mean 1 and
            standard deviation 0.25, truncated to [`mask_ratio_min`, 1].
        diffusion_batch_mul (`int`): noised copies of every token in the diffusion loss.
        initializer_range (`float`): standard deviation of the initial embeddings.
    """

    model_type = "mar_transformer"
    attribute_map = {"vocab_size": "cond_vocab_size"}  # what `resize_token_embeddings` sets
    # Older releases of transformers know the first name only, and leave it to the class to create the configurations.
    sub_configs = sub_configs_defaults = {
        "encoder_config": MARStackConfig,
        "decoder_config": MARStackConfig,
        "head_config": MARHeadConfig,
    }

    latent_shape: list[int] | tuple[int, ...] = (16, 16, 16)
    patch_size: int = 1
    cond_vocab_size: int = 1
    cond_length: int = 1
    cond_repeats: int = 1
    null_cond_id: int | None = None
    encoder_config: dict | PreTrainedConfig | None = None
    decoder_config: dict | PreTrainedConfig | None = None
    head_config: dict | PreTrainedConfig | None = None
    mask_ratio_min: float = 0.7
    diffusion_batch_mul: int = 4
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.latent_shape = tuple(self.latent_shape)
        for name, config_class in self.sub_configs.items():
            if getattr(self, name) is not None:
                check_instance(name, getattr(self, name), dict | config_class)
            if not isinstance(getattr(self, name), config_class):
                setattr(self, name, config_class(**(getattr(self, name) or {})))
        super().__post_init__(**kwargs)
        check_items("latent_shape", self.latent_shape, 3)
        for size in self.latent_shape:
            check_size("latent_shape", size)
        for name in ("patch_size", "cond_vocab_size", "cond_length", "cond_repeats", "diffusion_batch_mul"):
            check_size(name, getattr(self, name))
        if any(size % self.patch_size for size in self.latent_shape[1:]):
            raise ValueError(
                f"patch_size must divide height and width of latent_shape, got {self.patch_size} and "
                f"{self.latent_shape}"
            )
        if self.null_cond_id is not None and not 0 <= self.null_cond_id < self.cond_vocab_size:
            raise ValueError(f"null_cond_id must lie in [0, {self.cond_vocab_size}), got {self.null_cond_id}")
        check_number("mask_ratio_min", self.mask_ratio_min, "lie in (0, 1]")
        check_number("initializer_range", self.initializer_range, "be at least 0")

    @property
    def grid_size(self) -> tuple[int, int]:
        """(H, W), rows and columns of tokens."""
        _, height, width = self.latent_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """T = H·W."""
        height, width = self.grid_size
        return height * width

    @property
    def token_dim(self) -> int:
        """C, numbers of a token."""
        return self.latent_shape[0] * self.patch_size**2

    @property
    def num_cond_slots(self) -> int:
        """Slots of the condition in front of the tokens."""
        return self.cond_length * self.cond_repeats

    @classmethod
    def from_preset(cls, name: str) -> "MARTransformerConfig":
        """The configuration of a published model: a name of [`PRESETS`]. Raises `ValueError` for another name."""
        return cls(**load_preset(name, "mar_transformer"))
