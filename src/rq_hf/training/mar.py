"""Training the MAR transformer on the continuous latents of an autoencoder (Li et al., 2024), on images or latents."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from ..argument_checks import LARGEST_SIZE, check_integer, check_number
from ..models import MARTransformerConfig, MARTransformerModel
from ..models.continuous_latents import Autoencoder, encode_moments, latent_shape, sample_latents
from .loop import LossOutput
from .pipelines import drop_conditions


def create_mar_transformer(
    vae: Autoencoder,
    *,
    hidden_size: int = 768,
    encoder_layers: int = 12,
    decoder_layers: int = 12,
    num_attention_heads: int = 12,
    dropout: float = 0.1,
    head_hidden_size: int = 1024,
    head_layers: int = 3,
    patch_size: int = 1,
    cond_repeats: int = 1,
    mask_ratio_min: float = 0.7,
    diffusion_batch_mul: int = 4,
    cond_vocab_size: int = 1,
    cond_length: int = 1,
    null_cond_id: int | None = None,
) -> MARTransformerModel:
    """A new transformer on the latents of `vae`. The arguments are those of [`MARTransformerConfig`]; encoder and
    decoder have the same width, heads and dropout."""
    stack = {
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "attention_dropout": dropout,
        "hidden_dropout": dropout,
    }
    config = MARTransformerConfig(
        latent_shape=latent_shape(vae),
        patch_size=patch_size,
        cond_vocab_size=cond_vocab_size,
        cond_length=cond_length,
        cond_repeats=cond_repeats,
        null_cond_id=null_cond_id,
        encoder_config={**stack, "num_hidden_layers": encoder_layers},
        decoder_config={**stack, "num_hidden_layers": decoder_layers},
        head_config={"hidden_size": head_hidden_size, "num_hidden_layers": head_layers},
        mask_ratio_min=mask_ratio_min,
        diffusion_batch_mul=diffusion_batch_mul,
    )
    return MARTransformerModel(config)


def load_mar_transformer(
    name: str,
    vae: Autoencoder,
    *,
    cond_vocab_size: int = 1,
    cond_length: int = 1,
    null_cond_id: int | None = None,
) -> MARTransformerModel:
    """
    A trained transformer on the latents of `vae`, in float32, to continue training.

    Args:
        name: a folder or a Hub id.

    Raises `ValueError` when it has other latents or other conditions.
    """
    model = MARTransformerModel.from_pretrained(name, dtype=torch.float32)
    config = model.config
    found = (config.latent_shape, config.cond_vocab_size, config.cond_length, config.null_cond_id)
    needed = (latent_shape(vae), cond_vocab_size, cond_length, null_cond_id)
    if found != needed:
        raise ValueError(
            f"the transformer {name} has (latent shape, condition ids, length, null id) {found}, "
            f"this data needs {needed}"
        )
    return model


class MARLoss:
    """
    (model, batch with `pixels` or `latents`, and `cond_ids`) -> [`LossOutput`]: the diffusion loss of the hidden
    tokens. Of an `AutoencoderKL`, the latents are sampled anew each time.

    Args:
        vae: encodes the pixels.
        null_cond_id: replaces dropped conditions; `None` drops none.
        cond_dropout: share of conditions that are dropped, for classifier-free guidance.
        autocast: -> context of the forward passes; a sharded model does not bring its own.
    """

    def __init__(
        self,
        vae: Autoencoder,
        *,
        null_cond_id: int | None = None,
        cond_dropout: float = 0.1,
        autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ):
        if null_cond_id is not None:
            check_integer("null_cond_id", null_cond_id, 0, LARGEST_SIZE)
        check_number("cond_dropout", cond_dropout, "lie in [0, 1)")
        self.vae = vae
        self.null_cond_id = null_cond_id
        self.cond_dropout = cond_dropout
        self.autocast = autocast

    def __call__(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> LossOutput:
        latents = continuous_latents(self.vae, batch)
        cond_ids = drop_conditions(batch.get("cond_ids"), self.null_cond_id, self.cond_dropout)
        with self.autocast():
            output = model(latents, cond_ids)
        return LossOutput(output.loss, {"mse": output.mse, "vlb": output.vlb})

    def for_validation(self) -> "MARLoss":
        """No condition is dropped."""
        return MARLoss(self.vae, autocast=self.autocast)


@torch.no_grad()
def continuous_latents(vae: Autoencoder, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Scaled latents `(B, C, H, W)` of a batch: of its `latents` `(B, H, W, C)`, moments in the case of an
    `AutoencoderKL`, or of its `pixels`."""
    if "latents" in batch:
        moments = batch["latents"].to(vae.device).permute(0, 3, 1, 2)
    else:
        moments = encode_moments(vae, batch["pixels"].to(vae.device))
    return sample_latents(vae, moments)
