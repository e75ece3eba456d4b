"""Stage 2: the RQ-Transformer on the codes of an RQ-VAE (Lee et al., CVPR 2022, section 3.2), on images or latents."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from ..argument_checks import LARGEST_SIZE, check_bool, check_integer, check_number, check_temperature
from ..models import RQTransformerConfig, RQTransformerModel, RQVAEModel
from .loop import LossOutput
from .pipelines import drop_conditions
from .soft_labels import effective_codewords


def create_transformer(
    vae: RQVAEModel,
    *,
    hidden_size: int = 512,
    spatial_layers: int = 12,
    depth_layers: int = 4,
    num_attention_heads: int = 8,
    hidden_dropout: float = 0.1,
    cond_vocab_size: int = 1,
    cond_length: int = 1,
    null_cond_id: int | None = None,
) -> RQTransformerModel:
    """A new transformer on the codes of `vae`, with a copy of its codebook. The arguments are those of
    [`RQTransformerConfig`], the same for both stacks."""
    check_integer("spatial_layers", spatial_layers, 1, LARGEST_SIZE)
    check_integer("depth_layers", depth_layers, 0, LARGEST_SIZE)
    stack = {
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "hidden_dropout": hidden_dropout,
    }
    config = RQTransformerConfig(
        code_shape=vae.code_shape,
        codebook_size=vae.config.codebook_size,
        codebook_dim=vae.config.codebook_dim,
        shared_codebook=vae.config.shared_codebook,
        cond_vocab_size=cond_vocab_size,
        cond_length=cond_length,
        null_cond_id=null_cond_id,
        spatial_config={**stack, "num_hidden_layers": spatial_layers},
        depth_config={**stack, "num_hidden_layers": depth_layers},
    )
    model = RQTransformerModel(config)
    model.set_codebook(vae.quantizer.codebook)
    return model


def load_transformer(
    name: str, vae: RQVAEModel, *, cond_vocab_size: int = 1, cond_length: int = 1, null_cond_id: int | None = None
) -> RQTransformerModel:
    """
    A trained transformer on the codes of `vae`, in float32, to continue training.

    Args:
        name: a folder or a Hub id.

    Raises `ValueError` when it has another code map, other conditions or another codebook.
    """
    model = RQTransformerModel.from_pretrained(name, dtype=torch.float32)
    config = model.config
    found = (config.code_shape, config.cond_vocab_size, config.cond_length, config.null_cond_id)
    needed = (vae.code_shape, cond_vocab_size, cond_length, null_cond_id)
    if found != needed:
        raise ValueError(
            f"the transformer {name} has (code shape, condition ids, length, null id) {found}, "
            f"this data needs {needed}"
        )
    if not torch.equal(model.codebook, vae.quantizer.codebook.cpu()):
        raise ValueError(f"the transformer {name} has another codebook than the RQ-VAE")
    return model


class RQTransformerLoss:
    """
    (model, batch with `pixels` or `latents`, and `cond_ids`) -> [`LossOutput`]: the cross-entropy of the codes
    against hard labels, the codes themselves, or soft labels softmax(−‖r − e(k)‖²/τ) (section 3.2.3).

    Args:
        vae: encodes the pixels.
        null_cond_id: replaces dropped conditions; `None` drops none.
        soft_label_temperature: τ of the soft labels; `None` for hard labels.
        stochastic_codes: sample the codes from the soft labels; otherwise, and with hard labels, they are the nearest.
        cond_dropout: share of conditions that are dropped, for classifier-free guidance.
        autocast: -> context of the forward passes; a sharded model does not bring its own.
    """

    def __init__(
        self,
        vae: RQVAEModel,
        *,
        null_cond_id: int | None = None,
        soft_label_temperature: float | None = 0.5,
        stochastic_codes: bool = True,
        cond_dropout: float = 0.1,
        autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ):
        if null_cond_id is not None:
            check_integer("null_cond_id", null_cond_id, 0, LARGEST_SIZE)
        if soft_label_temperature is not None:
            check_temperature("soft_label_temperature", soft_label_temperature)
        check_bool("stochastic_codes", stochastic_codes)
        check_number("cond_dropout", cond_dropout, "lie in [0, 1)")
        self.vae = vae
        self.null_cond_id = null_cond_id
        self.soft_label_temperature = soft_label_temperature
        self.stochastic_codes = stochastic_codes
        self.cond_dropout = cond_dropout
        self.autocast = autocast

    def __call__(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> LossOutput:
        temperature = self.soft_label_temperature
        with self.autocast():
            vectors = encode_batch(self.vae, batch)
            codes, residuals = self.vae.quantizer.encode(vectors, temperature if self.stochastic_codes else None)
        if temperature is None:
            targets = {"labels": codes}
        else:
            targets = {"residuals": residuals, "target_temperature": temperature}
        cond_ids = drop_conditions(batch.get("cond_ids"), self.null_cond_id, self.cond_dropout)
        with self.autocast():
            output = model(codes, cond_ids, **targets, return_logits=False)
        metrics = per_depth("loss", output.depth_losses)
        if output.cond_loss is not None:
            metrics["loss_text"] = output.cond_loss
        if temperature is not None:  # of the first image, which is enough for a mean over many steps
            metrics |= per_depth(
                "effective_codewords", effective_codewords(self.vae.quantizer, residuals[0], temperature)
            )
        return LossOutput(output.loss, metrics)

    def for_validation(self) -> "RQTransformerLoss":
        """The cross-entropy of the nearest codes: hard labels, and no condition dropped, whatever the training does,
        so that the values of runs with other soft labels compare."""
        return RQTransformerLoss(self.vae, soft_label_temperature=None, cond_dropout=0.0, autocast=self.autocast)


@torch.no_grad()
def encode_batch(vae: RQVAEModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The vectors `(B, H, W, C)` of a batch: its `latents`, or those of its `pixels`."""
    if "latents" in batch:
        return batch["latents"].to(vae.device)
    return vae.encode_to_vectors(batch["pixels"].to(vae.device))


def per_depth(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Values `(D,)` as metrics `{name}_depth_1` and so on."""
    return {f"{name}_depth_{d}": value for d, value in enumerate(values, start=1)}
