"""Stage 2: the RQ-Transformer on the codes of an RQ-VAE (Lee et al., CVPR 2022, section 3.2), on images or latents."""

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..argument_checks import LARGEST_SIZE, check_bool, check_integer, check_number, check_temperature
from ..data import TrainingStream
from ..images import captioned_grid
from ..models import RQTransformerConfig, RQTransformerModel, RQVAEModel
from ..pipelines import RQPipeline
from ..pipelines.pipeline_rq import pipeline_card
from .checkpoints import save_finished
from .loop import LossOutput, TrainingHook, train
from .soft_labels import effective_codewords
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
        with self.autocast():
            vectors = encode_batch(self.vae, batch)
            codes, residuals = self.vae.quantizer.encode(vectors, temperature if self.stochastic_codes else None)
        if temperature is None:
            targets = {"labels": codes}
        else:
            targets = {"residuals": residuals, "target_temperature": temperature}
        with self.autocast():
            output = model(codes, self.drop_conditions(batch.get("cond_ids")), **targets, return_logits=False)
        metrics = per_depth("loss", output.depth_losses)
        if output.cond_loss is not None:
            metrics["loss_text"] = output.cond_loss
        if temperature is not None:  # of the first image, which is enough for a mean over many steps
            metrics |= per_depth(
                "effective_codewords", effective_codewords(self.vae.quantizer, residuals[0], temperature)
            )
        return LossOutput(output.loss, metrics)

    def drop_conditions(self, cond_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Condition ids `(B, L)` with a random share of the rows replaced by the null condition."""
        if cond_ids is None or self.null_cond_id is None:
            return cond_ids
        dropped = torch.rand(len(cond_ids), 1, device=cond_ids.device) < self.cond_dropout
        return cond_ids.masked_fill(dropped, self.null_cond_id)


@torch.no_grad()
def encode_batch(vae: RQVAEModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The vectors `(B, H, W, C)` of a batch: its `latents`, or those of its `pixels`."""
    if "latents" in batch:
        return batch["latents"].to(vae.device)
    return vae.encode_to_vectors(batch["pixels"].to(vae.device))


def per_depth(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Values `(D,)` as metrics `{name}_depth_1` and so on."""
    return {f"{name}_depth_{d}": value for d, value in enumerate(values, start=1)}


@torch.no_grad()
def validation_losses(
    compute_loss: RQTransformerLoss, model: torch.nn.Module, batches: Sequence[dict[str, torch.Tensor]]
) -> dict[str, float]:
    """
    Cross-entropy of the nearest codes of held-out batches, as `validation/loss` and for every depth.

    The labels are hard and no condition is dropped, whatever the training does: the values of runs with other soft
    labels compare.
    """
    compute_loss = RQTransformerLoss(
        compute_loss.vae, soft_label_temperature=None, cond_dropout=0.0, autocast=compute_loss.autocast
    )
    device = compute_loss.vae.device
    totals, images = Counter(), 0
    for batch in batches:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        output = compute_loss(model, batch)
        count = len(next(iter(batch.values())))
        images += count
        for name, value in ({"loss": output.loss} | output.metrics).items():
            totals[f"validation/{name}"] += value.item() * count
    return {name: total / images for name, total in totals.items()}


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
    held_out: Sequence[dict[str, torch.Tensor]] = (),
    **options,
) -> dict[str, torch.Tensor]:
    """
    [`train`] for the transformer of `pipeline`, which logs samples of the pipeline and losses on held-out images.

    Args:
        samples: the pipeline's arguments for the samples; `None` for no samples.
        held_out: batches like those of the stream, for [`validation_losses`].
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
        evaluate=functools.partial(evaluate_pipeline, accelerator, pipeline, compute_loss, samples, held_out),
        units_per_image={"codes": math.prod(pipeline.transformer.config.code_shape)},
        **options,
    )


def evaluate_pipeline(
    accelerator: Accelerator,
    pipeline: RQPipeline,
    compute_loss: RQTransformerLoss,
    samples: dict | None,
    held_out: Sequence[dict[str, torch.Tensor]],
    step: int,
) -> dict[str, float]:
    """[`log_samples`] and [`validation_losses`], each if there is something to do it with."""
    if samples is not None:
        log_samples(accelerator, pipeline, samples, step)
    return validation_losses(compute_loss, pipeline.transformer, held_out) if held_out else {}


def log_samples(accelerator: Accelerator, pipeline: RQPipeline, arguments: dict, step: int) -> None:
    """Logs images that the pipeline generates, from the same seed at every step, with their prompts or classes."""
    generator = torch.Generator(accelerator.device).manual_seed(0)
    with accelerator.autocast():
        images = pipeline(**arguments, generator=generator).images
    captions = sample_captions(pipeline.transformer.config, len(images), **arguments)
    log_images(accelerator, {"samples": captioned_grid(images, captions)}, step)


def sample_captions(
    config: RQTransformerConfig,
    count: int,
    *,
    prompt: list[str] | None = None,
    class_labels: list[int] | None = None,
    **others,
) -> list[str]:
    """What `count` samples of a call of the pipeline show: prompts, classes by name (`LABEL_0` where they have none),
    or nothing."""
    if prompt is not None:
        return prompt
    if class_labels is not None:
        return [config.id2label.get(label, f"LABEL_{label}") for label in class_labels]
    return [""] * count


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
