"""The training loop of both stages, on any accelerator and number of processes."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import get_scheduler

from ..data import TrainingStream
from .checkpoints import Checkpoints, check_finite
from .ema import EMA
from .launch import check_launch
from .stop_signals import StopSignals
from .trackers import JSONLinesTracker, Meter

SCHEDULERS = {"cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass
class LossOutput:
    """
    Args:
        loss (`torch.Tensor`, scalar): what the model's optimizer minimizes.
        metrics (`dict[str, torch.Tensor]`): scalars to average and log.
        outputs: whatever the hooks need of the forward pass.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: Any = None


class TrainingHook:
    """What a recipe adds to [`train`]. Subclasses override what they need.

    `modules` are prepared modules that accumulate gradients together with the model.
    """

    modules: Sequence[torch.nn.Module] = ()

    def prepare(self, model: torch.nn.Module) -> None:
        """Called once, with the prepared model, before a checkpoint is loaded."""

    def compute_losses(self, outputs: Any) -> dict[str, torch.Tensor]:
        """
        Losses and metrics of the hook's own modules, from [`LossOutput.outputs`], forward only; they are logged.

        A value that is not finite stops the run before any optimizer steps.
        """
        return {}

    def step(self, losses: dict[str, torch.Tensor]) -> None:
        """Backward pass and optimizer step on what [`compute_losses`] returned, after the model's step."""


def create_accelerator(
    output_dir: str | Path,
    *,
    resume_from: str | None = None,
    cpu: bool = False,
    mixed_precision: str | None = None,
    gradient_accumulation_steps: int = 1,
    train_batch_size: int = 1,
    report_to: str = "none",
    seed: int = 0,
) -> Accelerator:
    """
    Accelerator that logs to `output_dir/log.jsonl`; seeds all generators, differently on every rank.

    Args:
        resume_from: the checkpoint that [`train`] will resume from, if any.
        cpu, mixed_precision, gradient_accumulation_steps: see [`Accelerator`].
        train_batch_size: images per process and backward pass, for DeepSpeed.
        report_to: `"tensorboard"`, to log there as well, or `"none"`.

    Raises:
        `ValueError`: a new run would overwrite the checkpoints of an old one, or accelerate ignored a launch option.
        `ImportError`: TensorBoard is not installed.
    """
    output_dir = Path(output_dir)
    latest = Checkpoints(output_dir).latest()
    if latest is not None and resume_from is None:
        raise ValueError(
            f"{output_dir} already holds {latest.name}: pass --resume_from_checkpoint latest, or another --output_dir"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    trackers = [JSONLinesTracker(output_dir / "log.jsonl")]
    if report_to == "tensorboard":
        check_tensorboard()
        trackers.append("tensorboard")
    accelerator = Accelerator(
        # Otherwise DDP reorders its buckets after the first step of a process, and the first step after a resume would
        # sum the gradients of three and more ranks in another order than the unbroken run.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        cpu=cpu,
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_with=trackers,
        project_dir=output_dir,
    )
    check_launch(accelerator)
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.mixed_precision_policy is not None:
        # accelerate's own would round inputs, the sum of the gradients and the loss; casts are left to autocast.
        fsdp.mixed_precision_policy = MixedPrecisionPolicy(
            fsdp.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if accelerator.state.deepspeed_plugin is not None:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = train_batch_size
    set_seed(seed, device_specific=True)
    return accelerator


def check_tensorboard() -> None:
    """Raises `ImportError` when TensorBoard is not installed; accelerate would only warn."""
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "--report_to tensorboard needs tensorboard: pip install 'rq_hf[train]', or --report_to none"
        ) from error


def create_optimizer(
    model: torch.nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW that decays matrices (two dimensions and more), but no biases, norms or what a module lists in
    `no_weight_decay`."""
    excluded = {
        id(module.get_parameter(name)) for module in model.modules() for name in getattr(module, "no_weight_decay", ())
    }
    decayed, others = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 and id(parameter) not in excluded else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)


def create_scheduler(optimizer: Optimizer, name: str, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """After a linear warm-up, a `"cosine"` to zero or a `"constant"` learning rate. Raises `ValueError` for another
    name."""
    if name not in SCHEDULERS:
        raise ValueError(f"the scheduler must be 'cosine' or 'constant', got {name!r}")
    return get_scheduler(SCHEDULERS[name], optimizer, num_warmup_steps, num_training_steps)


def continue_schedule(scheduler: LambdaLR, peak_rates: Sequence[float]) -> None:
    """Sets the learning rates of a schedule's step to those of its own curve, with one peak for each group of its
    optimizer; after the state of a run with the same curve and peaks, that changes nothing."""
    scheduler.base_lrs = list(peak_rates)
    for group, rate, schedule in zip(scheduler.optimizer.param_groups, peak_rates, scheduler.lr_lambdas):
        group["initial_lr"] = rate
        group["lr"] = rate * schedule(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def train(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    stream: TrainingStream,
    compute_loss: Callable[[torch.nn.Module, dict], LossOutput],
    *,
    max_train_steps: int,
    checkpoints: Checkpoints,
    resume_from: str | None = None,
    hooks: Sequence[TrainingHook] = (),
    ema_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    logging_steps: int = 50,
    checkpointing_steps: int = 1000,
    evaluation_steps: int = 0,
    evaluate: Callable[[int], dict[str, float] | None] | None = None,
    units_per_image: dict[str, int] | None = None,
    peak_flops: float | None = None,
    examples: str = "images",
    configuration: dict | None = None,
) -> dict[str, torch.Tensor]:
    """
    Trains `model` in place for `max_train_steps` optimizer steps.

    Args:
        model, optimizer, scheduler: not prepared yet. A resumed run continues on the curve and with the peak learning
            rates of this scheduler, from its step on, not on those of the checkpoint.
        stream: its batches have `counts`, see [`ImageCollator`].
        compute_loss: (prepared model, batch) -> [`LossOutput`].
        checkpoints: where to save the state every `checkpointing_steps` steps and at the end.
        resume_from: see [`Checkpoints.restore`].
        hooks: what else happens in every step.
        ema_decay: decay of the [`EMA`] of the weights; 0 disables it.
        max_grad_norm: gradients are clipped to this norm; 0 for no clipping.
        logging_steps: log every N steps.
        evaluate: step -> metrics to log, or `None`; called on all ranks every `evaluation_steps` steps (0 for never)
            and at the end, with the averaged weights in eval mode. The random state is restored afterwards.
        units_per_image, peak_flops, examples: see [`Meter`].
        configuration: of the run, for the trackers and [`Checkpoints.saved_configuration`].

    Returns:
        the final state of the model, averaged if there is an EMA and gathered from all ranks if it is sharded (then on
        the main process only). An unsharded `model` itself also has this state afterwards, and is in eval mode.

    Raises:
        `ValueError`: a loss is NaN or infinite on any rank, before any optimizer steps; the checkpoint is beyond
            `max_train_steps`, or see [`Checkpoints.restore`].
        `OSError`: a checkpoint cannot be written.
        `SystemExit`: any rank received one of [`StopSignals`]; after the step, with a checkpoint. The exit code is
            128 + the signal's number.
    """
    unprepared = model
    model, optimizer = accelerator.prepare(model, optimizer)
    # Created after `prepare`, so that the average of a sharded model is sharded.
    ema = EMA(unprepared, ema_decay) if ema_decay else None
    # Checkpoints number these objects: the order is part of their format.
    accelerator.register_for_checkpointing(scheduler, *([ema] if ema else []))
    for hook in hooks:
        hook.prepare(model)
    peak_learning_rates = scheduler.base_lrs
    position = checkpoints.restore(accelerator, resume_from)
    step = 0
    if position is not None:
        step = position["step"]
        if step > max_train_steps:
            raise ValueError(f"--max_train_steps must be at least {step}, as in the checkpoint, got {max_train_steps}")
        stream.load_state_dict(position)
        continue_schedule(scheduler, peak_learning_rates)
        rate = scheduler.get_last_lr()[0]
        accelerator.print(f"resumed at step {step} of {max_train_steps}; the learning rate is {rate:.4g} there")
    accelerator.init_trackers("logs", config=configuration)

    progress = tqdm(
        total=max_train_steps, initial=step, desc="training", disable=not accelerator.is_local_main_process
    )
    meter = Meter(accelerator, units_per_image, peak_flops, examples)
    with StopSignals(announced=accelerator.is_main_process) as signals:
        batches = iter(stream)
        model.train()
        while step < max_train_steps:
            for _ in range(accelerator.gradient_accumulation_steps):
                batch = next(batches)
                counts = batch.pop("counts")
                batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
                # Gradients are synchronized, and optimizers step, in the last of these passes only.
                with accelerator.accumulate(model, *(module for hook in hooks for module in hook.modules)):
                    with meter.counting_flops(counts["images"]):
                        output = compute_loss(model, batch)
                        hook_losses = [hook.compute_losses(output.outputs) for hook in hooks]
                        named = {"loss": output.loss} | {name: own[name] for own in hook_losses for name in own}
                        # Before the first backward pass, so that a run that stops has changed nothing.
                        everywhere = gather_values(accelerator, [*named.values(), signals.received])
                        check_finite(step + 1, checkpoints, list(named), everywhere)
                        accelerator.backward(output.loss)
                    metrics = {"loss": output.loss, **output.metrics}
                    if accelerator.sync_gradients:
                        metrics["grad_norm"] = accelerator.clip_grad_norm_(
                            model.parameters(), max_grad_norm or math.inf
                        )
                    optimizer.step()
                    optimizer.zero_grad()
                    for hook, losses in zip(hooks, hook_losses):
                        hook.step(losses)
                        metrics |= losses
                meter.add(counts, **metrics)
            # The scheduler is not prepared: accelerate would step it once per process.
            scheduler.step()
            if ema:
                ema.update()
            step += 1
            progress.update()

            stop_signal = int(max(values[-1] for values in everywhere))  # the same on all ranks
            is_last = step == max_train_steps
            if step % logging_steps == 0 or is_last or stop_signal:
                means = meter.result()
                means["learning_rate"] = scheduler.get_last_lr()[0]
                means["epoch"] = stream.epoch
                accelerator.log(means, step=step)
                speed = {f"{examples}_per_s": f"{means[f'{examples}_per_second']:.1f}"}
                progress.set_postfix(loss=f"{means['loss']:.4f}", **speed)
            is_evaluated = evaluation_steps and (step % evaluation_steps == 0 or is_last)
            if evaluate is not None and is_evaluated and not stop_signal:
                with evaluation_mode(unprepared, ema):
                    result = evaluate(step)
                if result:
                    accelerator.log(result, step=step)
                meter.restart_clock()
            if step % checkpointing_steps == 0 or is_last or stop_signal:
                checkpoint = checkpoints.save(accelerator, step, stream.state_dict(), configuration)
                meter.restart_clock()
            if stop_signal:
                progress.close()
                name = Signals(stop_signal).name
                accelerator.print(f"{name} stopped the run: go on with --resume_from_checkpoint {checkpoint}")
                accelerator.end_training()
                raise SystemExit(128 + stop_signal)
    progress.close()
    if ema:
        unprepared.load_state_dict(ema.average)
    unprepared.eval()
    return accelerator.get_state_dict(model)


def gather_values(accelerator: Accelerator, values: Sequence[torch.Tensor | float]) -> list[list[float]]:
    """Scalars of all ranks, a list per rank (a collective call)."""
    own = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=accelerator.device) for value in values])
    return accelerator.gather(own.detach()[None]).tolist()


@contextmanager
def evaluation_mode(model: torch.nn.Module, ema: EMA | None) -> Iterator[None]:
    """Inside, the model is in eval mode with the averaged weights, if any; the random state is restored afterwards."""
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    model.eval()
    try:
        if ema is None:
            yield
        else:
            with ema.applied():
                yield
    finally:
        model.train()
        torch.set_rng_state(cpu_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
