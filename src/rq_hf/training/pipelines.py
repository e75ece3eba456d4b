"""Training the transformer of a pipeline: what both methods share."""

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL import Image
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from ..data import TrainingStream
from ..images import captioned_grid
from ..pipelines import MARPipeline, RQPipeline
from .cards import SAMPLES_FILE, Dataset, training_sections
from .checkpoints import save_finished
from .loop import LossOutput, TrainingHook, train
from .trackers import log_images

Pipeline = RQPipeline | MARPipeline

logger = get_logger(__name__)


class PipelineLoss(Protocol):
    """(model, batch with `pixels` or `latents`, and `cond_ids`) -> [`LossOutput`]."""

    def __call__(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> LossOutput: ...

    def for_validation(self) -> "PipelineLoss":
        """The loss that held-out images are measured by."""


def drop_conditions(
    cond_ids: torch.Tensor | None, null_cond_id: int | None, cond_dropout: float
) -> torch.Tensor | None:
    """Condition ids `(B, L)` with a random share of the rows replaced by the null condition, if there is one."""
    if cond_ids is None or null_cond_id is None:
        return cond_ids
    dropped = torch.rand(len(cond_ids), 1, device=cond_ids.device) < cond_dropout
    return cond_ids.masked_fill(dropped, null_cond_id)


@torch.no_grad()
def validation_losses(
    compute_loss: PipelineLoss,
    model: torch.nn.Module,
    batches: Sequence[dict[str, torch.Tensor]],
) -> dict[str, float]:
    """Loss and metrics of held-out batches, as `validation/loss` and so on; with the same random numbers each time."""
    compute_loss = compute_loss.for_validation()
    totals, images = Counter(), 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for batch in batches:
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            output = compute_loss(model, batch)
            count = len(next(iter(batch.values())))
            images += count
            for name, value in ({"loss": output.loss} | output.metrics).items():
                totals[f"validation/{name}"] += value.item() * count
    return {name: total / images for name, total in totals.items()}


class ShardedGeneration(TrainingHook):
    """Lets a transformer that FSDP has sharded generate, for samples during the training."""

    def prepare(self, model: torch.nn.Module) -> None:
        for module in model.modules():
            for method in ("generate", "sample"):
                if isinstance(module, FSDPModule) and hasattr(module, method):
                    register_fsdp_forward_method(module, method)


def train_pipeline(
    accelerator: Accelerator,
    pipeline: Pipeline,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    stream: TrainingStream,
    compute_loss: PipelineLoss,
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
        **options,
    )


def evaluate_pipeline(
    accelerator: Accelerator,
    pipeline: Pipeline,
    compute_loss: PipelineLoss,
    samples: dict | None,
    held_out: Sequence[dict[str, torch.Tensor]],
    step: int,
) -> dict[str, float]:
    """[`log_samples`] and [`validation_losses`], each if there is something to do it with."""
    if samples is not None:
        log_samples(accelerator, pipeline, samples, step)
    return validation_losses(compute_loss, pipeline.transformer, held_out) if held_out else {}


def log_samples(accelerator: Accelerator, pipeline: Pipeline, arguments: dict, step: int) -> None:
    """Logs images that the pipeline generates, from the same seed at every step, with their prompts or classes."""
    log_images(accelerator, {"samples": sample_grid(accelerator, pipeline, arguments)}, step)


def sample_grid(accelerator: Accelerator, pipeline: Pipeline, arguments: dict) -> Image.Image:
    """Images of [`sample_call`] with their prompts or classes, for the arguments of the pipeline."""
    with accelerator.autocast():
        images = pipeline(**arguments, generator=torch.Generator().manual_seed(0)).images
    captions = sample_captions(pipeline.transformer.config, len(images), **arguments)
    return captioned_grid(images, captions)


def sample_call(arguments: dict) -> str:
    """The Python code that samples the images of [`sample_grid`] from `pipe`."""
    given = "".join(f"{name}={value!r}, " for name, value in arguments.items())
    return f"images = pipe({given}generator=torch.Generator().manual_seed(0)).images"


def sample_captions(
    config: PreTrainedConfig,
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
    pipeline: Pipeline,
    state_dict: dict[str, torch.Tensor],
    destination: Path,
    samples: dict | None,
    *,
    configuration: dict,
    dataset: Dataset,
    upload_to: str | None = None,
) -> None:
    """
    Saves a trained pipeline with its samples and its card, see [`save_finished`].

    Args:
        state_dict: of the transformer, as [`train`] returns it.
        samples: the pipeline's arguments for the samples; `None` for no samples.
        configuration, dataset: see [`training_sections`].
    """
    sections = training_sections(accelerator, configuration, dataset, pipeline.task)
    files, call = {}, None
    if samples is not None:
        call = sample_call(samples)
        try:
            files[SAMPLES_FILE] = sample_grid(accelerator, pipeline, samples).save
            sections["introduction"] = f"![Samples]({SAMPLES_FILE})\n\n*Samples of this model, by the code below.*"
        except ValueError as error:  # a model that was hardly trained; it is saved nevertheless
            logger.warning(f"the model card has no samples: {error}", main_process_only=True)
    card = pipeline.card(upload_to or str(destination), call, **sections)
    if isinstance(pipeline.transformer, FSDPModule) and accelerator.is_main_process:
        components = pipeline.components | {"transformer": gathered(pipeline.transformer, state_dict)}
        pipeline = type(pipeline)(**components)
    save_finished(accelerator, pipeline, destination, card, upload_to, files)


def gathered(sharded: PreTrainedModel, state_dict: dict[str, torch.Tensor]) -> PreTrainedModel:
    """An unsharded copy of a sharded transformer."""
    model = AutoModel.from_config(sharded.config)
    model.load_state_dict(state_dict)
    if sharded.can_generate():
        model.generation_config = sharded.generation_config
    return model
