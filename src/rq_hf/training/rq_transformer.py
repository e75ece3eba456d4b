"""Stage 2: the RQ-Transformer on the codes of an RQ-VAE (Lee et al., CVPR 2022, section 3.2), on images or latents."""

import contextlib
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..argument_checks import LARGEST_SIZE, check_bool, check_integer, check_number, check_temperature
from ..data import TrainingStream
from ..model_cards import PIPELINE_USAGE, model_card
from ..models import RQTransformerConfig, RQTransformerModel, RQVAEModel
from ..pipelines import RQPipeline
from .checkpoints import save_finished
from .loop import LossOutput, TrainingHook, train
from .trackers import log_images


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
        with torch.no_grad(), self.autocast():
            if "latents" in batch:
                vectors = batch["latents"]  # (B, H, W, C)
            else:
                vectors = self.vae.encode_to_vectors(batch["pixels"])
            codes, residuals = self.vae.quantizer.encode(vectors, temperature if self.stochastic_codes else None)
        if temperature is None:
            targets = {"labels": codes}
        else:
            targets = {"residuals": residuals, "soft_label_temperature": temperature}
        with self.autocast():
            output = model(codes, self.drop_conditions(batch.get("cond_ids")), **targets, return_logits=False)
        metrics = {f"loss_depth_{d}": loss for d, loss in enumerate(output.depth_losses, start=1)}
        if output.cond_loss is not None:
            metrics["loss_text"] = output.cond_loss
        return LossOutput(output.loss, metrics)

    def drop_conditions(self, cond_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Condition ids `(B, L)` with a random share of the rows replaced by the null condition."""
        if cond_ids is None or self.null_cond_id is None:
            return cond_ids
        dropped = torch.rand(len(cond_ids), 1, device=cond_ids.device) < self.cond_dropout
        return cond_ids.masked_fill(dropped, self.null_cond_id)


class ShardedGeneration(TrainingHook):
    """Lets a transformer that FSDP has sharded generate, for samples during the training."""

    def prepare(self, model: torch.nn.Module) -> None:
        if isinstance(model, FSDPModule):
            register_fsdp_forward_method(model, "generate")


def train_pipeline(
    accelerator: Accelerator,
    pipeline: RQPipeline,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    stream: TrainingStream,
    compute_loss: RQTransformerLoss,
    *,
    samples: dict | None = None,
    **options,
) -> dict[str, torch.Tensor]:
    """
    [`train`] for the transformer of `pipeline`, which logs samples of the pipeline.

    Args:
        samples: the pipeline's arguments for the samples; `None` for no samples.
        options: further arguments of [`train`].
    """
    pipeline.set_progress_bar_config(disable=True)
    return train(
        accelerator,
        pipeline.transformer,
        optimizer,
        scheduler,
        stream,
        compute_loss,
        hooks=[ShardedGeneration()],
        evaluate=None if samples is None else functools.partial(log_samples, accelerator, pipeline, samples),
        units_per_image={"codes": math.prod(pipeline.transformer.config.code_shape)},
        **options,
    )


def log_samples(accelerator: Accelerator, pipeline: RQPipeline, arguments: dict, step: int) -> None:
    """Logs images that the pipeline generates, from the same seed at every step."""
    generator = torch.Generator(accelerator.device).manual_seed(0)
    with accelerator.autocast():
        images = pipeline(**arguments, generator=generator, output_type="pt").images
    log_images(accelerator, {"samples": images}, step)


def save_pipeline(
    accelerator: Accelerator,
    pipeline: RQPipeline,
    state_dict: dict[str, torch.Tensor],
    destination: Path,
    call: str,
    upload_to: str | None = None,
) -> None:
    """
    Saves a trained pipeline with its card, see [`save_finished`].

    Args:
        state_dict: of the transformer, as [`train`] returns it.
        call: Python expression that samples from `pipe`, for the card.
    """
    card = pipeline_card(pipeline.transformer, call)
    if isinstance(pipeline.transformer, FSDPModule) and accelerator.is_main_process:
        pipeline = RQPipeline(pipeline.vae, gathered_transformer(pipeline.transformer, state_dict), pipeline.tokenizer)
    save_finished(accelerator, pipeline, destination, card, upload_to)


def gathered_transformer(sharded: RQTransformerModel, state_dict: dict[str, torch.Tensor]) -> RQTransformerModel:
    """An unsharded copy of a sharded transformer."""
    model = RQTransformerModel(sharded.config)
    model.load_state_dict(state_dict)
    model.generation_config = sharded.generation_config
    return model


def pipeline_card(model: RQTransformerModel, call: str) -> str:
    """The model card of a trained pipeline; `call` is the Python expression that samples from `pipe`."""
    height, width, depth = model.config.code_shape
    return model_card(
        f"RQ-Transformer on {height}×{width}×{depth} codes, {model.num_parameters():,} parameters",
        PIPELINE_USAGE.format(call=f"{call}.images"),
        pipeline_tag="text-to-image" if model.config.cond_length > 1 else "unconditional-image-generation",
        tags=["rq-transformer"],
    )
