"""What the training scripts share: arguments, the loop with checkpoints and logs, and the average of the weights."""

import functools
import json
import os
import re
import shutil
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.logging import get_logger
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import set_seed
from huggingface_hub import create_repo, upload_folder
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import HfArgumentParser, get_scheduler

from ..data import DataArguments, TrainingStream, count_images, next_readable
from ..images import image_grid
from .adversarial import Adversary

logger = get_logger(__name__)


@dataclass
class OptimizationArguments:
    _argument_group_name = "run and optimization"

    output_dir: str = field(metadata={"help": "Folder for checkpoints, logs and the finished model."})
    max_train_steps: int = field(default=100_000, metadata={"help": "Optimizer steps."})
    train_batch_size: int = field(default=32, metadata={"help": "Images per process and backward pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Backward passes per optimizer step."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler: str = field(
        default="cosine",
        metadata={"help": "After the warm-up: a cosine to zero, or no change.", "choices": ["cosine", "constant"]},
    )
    lr_warmup_steps: int = field(default=500, metadata={"help": "Steps of linear warm-up."})
    adam_beta1: float = field(default=0.9, metadata={"help": "Adam's β₁."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Adam's β₂."})
    weight_decay: float = field(default=1e-4, metadata={"help": "AdamW's weight decay, applied to matrices only."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    mixed_precision: str | None = field(
        default=None,
        metadata={
            "help": "Arithmetic of the forward pass (default: as accelerate is configured).",
            "choices": ["no", "fp16", "bf16"],
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, a third more time."}
    )
    ema_decay: float = field(
        default=0.999,
        metadata={
            "help": "Decay of the moving average of weights and buffers, which is what is saved; 0 switches it off."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, shuffling and sampling."})
    logging_steps: int = field(default=50, metadata={"help": "Log every so many steps."})
    image_logging_steps: int = field(default=1000, metadata={"help": "Log pictures every so many steps; 0 for never."})
    peak_teraflops: float | None = field(
        default=None,
        metadata={"help": "Peak of one device in the arithmetic used, 10¹² FLOP/s: its utilization is then logged."},
    )
    checkpointing_steps: int = field(default=1000, metadata={"help": "Save a checkpoint every so many steps."})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "Keep only the newest checkpoints."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint folder, or 'latest' for the newest in the output folder."}
    )
    report_to: str = field(
        default="tensorboard",
        metadata={"help": "Tracker beside the JSON lines in log.jsonl.", "choices": ["tensorboard", "none"]},
    )
    cpu: bool = field(default=False, metadata={"help": "Train on the CPU even where there is an accelerator."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the finished model to the Hub."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository to upload to: user/name."})

    def __post_init__(self):
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("--push_to_hub needs --hub_model_id user/name")
        at_least_one = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "logging_steps")
        for name in (*at_least_one, "checkpointing_steps", "checkpoints_total_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.peak_teraflops is not None and self.peak_teraflops <= 0:
            raise ValueError(f"--peak_teraflops must be greater than 0, got {self.peak_teraflops}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay must lie in [0, 1), got {self.ema_decay}")


class ManualPage(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Help with the description as it is, one name per option, and only defaults that say something."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=36, width=120)

    def _format_action_invocation(self, action):
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        if isinstance(action.const, bool):
            return action.option_strings[0]
        kind = getattr(action.type, "__name__", "value") if action.choices is None else "|".join(action.choices)
        return f"{action.option_strings[0]} {kind}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action):
        says_nothing = action.default is None or action.default is False or action.default == []
        return action.help if says_nothing else super()._get_help_string(action)


def parse_arguments(*argument_classes: type, description: str, **defaults) -> tuple:
    """Command line -> one object per class, with a script's own `defaults`. The help is a manual page: the
    description, then the options by group."""
    usage = "%(prog)s --output_dir FOLDER [options]"
    parser = HfArgumentParser(argument_classes, description=description, usage=usage, formatter_class=ManualPage)
    parser.set_defaults(**defaults)
    return parser.parse_args_into_dataclasses()


class JSONLinesTracker(GeneralTracker):
    """Appends every logged dictionary as one line to `log.jsonl`."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    @property
    def tracker(self):
        return self.path

    @on_main_process
    def store_init_configuration(self, values: dict):
        self._append({"arguments": values})

    @on_main_process
    def log(self, values: dict, step: int | None, **kwargs):
        self._append({"step": step, **values})

    def _append(self, values: dict):
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered from all ranks, which must all ask for it; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class WeightAverage:
    """
    Exponential moving average of all floating-point tensors of a model's state, parameters *and* buffers; other
    tensors are copied. The decay warms up as (1 + step) / (10 + step), from step 0 on.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self.step = 0
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.average = {
            n: t.to(torch.float32 if t.is_floating_point() else t.dtype, copy=True) for n, t in state.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        weight = 1 - min(self.decay, (1 + self.step) / (10 + self.step))
        self.step += 1
        floating, current = [], []
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point():
                floating.append(local(self.average[name]))
                current.append(local(tensor).float())
            else:
                self.average[name].copy_(tensor)
        torch._foreach_lerp_(floating, current, weight)

    @contextmanager
    def applied(self):
        """Inside, the model has the averaged weights."""
        trained = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        try:
            yield
        finally:
            self.model.load_state_dict(trained)

    def state_dict(self) -> dict:
        return {"step": self.step, "average": {name: whole(tensor) for name, tensor in self.average.items()}}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        for name, tensor in self.average.items():
            saved = state["average"][name]
            if isinstance(tensor, DTensor):
                saved = distribute_tensor(saved.to(tensor.device), tensor.device_mesh, tensor.placements)
            tensor.copy_(saved)


def create_accelerator(args: OptimizationArguments) -> Accelerator:
    """Accelerator with the trackers of `args`; seeds all generators, differently on every rank.

    Raises `ValueError` when a new run would write over the checkpoints of an old one, or when accelerate did not
    start what it was asked for.
    """
    output_dir = Path(args.output_dir)
    checkpoints = list_checkpoints(output_dir)
    if checkpoints and args.resume_from_checkpoint is None:
        raise ValueError(
            f"{output_dir} already holds {checkpoints[-1].name}: "
            "pass --resume_from_checkpoint latest, or another --output_dir"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    trackers = [JSONLinesTracker(output_dir / "log.jsonl")]
    if args.report_to == "tensorboard":
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "--report_to tensorboard needs tensorboard: pip install 'rq_hf[train]', or --report_to none"
            ) from error
        trackers.append("tensorboard")
    accelerator = Accelerator(
        # Otherwise DDP reorders its buckets after the first step of a process, and the first step after a resume would
        # sum the gradients of three and more ranks in another order than the unbroken run.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
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
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    set_seed(args.seed, device_specific=True)
    return accelerator


def check_launch(accelerator: Accelerator) -> None:
    """Raises `ValueError` for what `accelerate launch` leaves out on a CPU without a word: processes and sharding."""
    launcher = psutil.Process().parent()
    command = launcher.cmdline() if launcher else []
    if sys.argv[0] in command:
        parser = ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--num_processes", "--num-processes", type=int, default=1)
        asked = parser.parse_known_args(command[: command.index(sys.argv[0])])[0].num_processes
        if asked > 1 and accelerator.num_processes == 1:
            raise ValueError(
                f"accelerate launch was asked for --num_processes {asked} and started one process, "
                f"as it does on a CPU: use torchrun --nproc_per_node {asked} {sys.argv[0]} --cpu ..."
            )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError("this configuration shards the model (FSDP), which accelerate does on GPUs only")


def create_stream(
    accelerator: Accelerator, dataset, collate: Callable, args: OptimizationArguments, data_args: DataArguments
) -> TrainingStream:
    """This rank's share of the data set as an endless stream of batches."""
    return TrainingStream(
        dataset,
        collate,
        batch_size=args.train_batch_size,
        seed=args.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        shuffle_buffer_size=data_args.shuffle_buffer_size,
        num_workers=data_args.dataloader_num_workers,
    )


def create_optimizer(model: torch.nn.Module, args: OptimizationArguments) -> torch.optim.AdamW:
    """AdamW that decays matrices (two dimensions and more) but neither biases, norms nor codebook."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and not name.endswith("codebook")
            (decayed if is_matrix else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2))


def create_scheduler(
    optimizer: torch.optim.Optimizer, args: OptimizationArguments
) -> torch.optim.lr_scheduler.LRScheduler:
    name = {"cosine": "cosine", "constant": "constant_with_warmup"}[args.lr_scheduler]
    return get_scheduler(name, optimizer, args.lr_warmup_steps, args.max_train_steps)


def train(
    accelerator: Accelerator,
    args: OptimizationArguments,
    model: torch.nn.Module,
    stream: TrainingStream,
    compute_loss: Callable[[torch.nn.Module, dict], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    make_images: Callable[[], dict[str, torch.Tensor]],
    configuration: dict,
    codes_per_image: int,
    adversary: Adversary | None = None,
    validate: Callable[[], dict[str, float]] | None = None,
) -> None:
    """
    Trains `model` in place for `args.max_train_steps` optimizer steps; afterwards it has the averaged weights.

    Args:
        compute_loss: (prepared model, batch) -> (loss, metrics to be averaged and logged).
        make_images: -> name: pictures `(B, 3, height, width)` in [0, 1]; called with the averaged weights.
        configuration: of the run, for the trackers.
        codes_per_image: H·W·D, for the codes per second.
        adversary: learns after each of the model's steps, from what `compute_loss` showed it.
        validate: -> metrics to be logged; called with the averaged weights, as often as `make_images`.

    Raises `ValueError` when a loss is no longer a finite number, before any optimizer has stepped.
    """
    unprepared = model
    optimizer = create_optimizer(model, args)
    scheduler = create_scheduler(optimizer, args)
    model, optimizer = accelerator.prepare(model, optimizer)
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "generate")  # for `make_images`
    average = WeightAverage(unprepared, args.ema_decay) if args.ema_decay else None
    accelerator.register_for_checkpointing(scheduler, *([average] if average else []))
    if adversary is not None:
        adversary.prepare(accelerator)
    step = resume(accelerator, args, stream)
    accelerator.init_trackers("logs", config=configuration)

    progress = tqdm(
        total=args.max_train_steps, initial=step, desc="training", disable=not accelerator.is_local_main_process
    )
    meter = Meter(accelerator, codes_per_image, "skipped_images", "truncated_captions")
    batches = iter(stream)
    model.train()
    while step < args.max_train_steps:
        for _ in range(args.gradient_accumulation_steps):
            batch = next_readable(batches)
            batch = {k: v.to(accelerator.device) if torch.is_tensor(v) else v for k, v in batch.items()}
            with accelerator.accumulate(model, *([adversary.prepared] if adversary else [])):
                with meter.counting_flops(batch, args.peak_teraflops):
                    loss, metrics = compute_loss(model, batch)
                    check_finite(args, step + 1, loss=loss)
                    if adversary is not None:
                        losses = adversary.compute_loss()
                        check_finite(args, step + 1, **losses)
                        metrics |= losses
                    accelerator.backward(loss)
                if accelerator.sync_gradients:
                    metrics["grad_norm"] = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                if adversary is not None:
                    adversary.update()
            meter.add(batch, loss=loss, **metrics)
        scheduler.step()
        if average:
            average.update()
        step += 1
        progress.update()

        if step % args.logging_steps == 0 or step == args.max_train_steps:
            values = meter.result()
            values["learning_rate"] = scheduler.get_last_lr()[0]
            values["epoch"] = stream.epoch
            accelerator.log(values, step=step)
            progress.set_postfix(loss=f"{values['loss']:.4f}", images_per_s=f"{values['images_per_second']:.1f}")
        if args.image_logging_steps and (step % args.image_logging_steps == 0 or step == args.max_train_steps):
            with averaged_weights(unprepared, average):
                log_images(accelerator, args, make_images(), step)
                if validate is not None:
                    accelerator.log({f"validation/{name}": value for name, value in validate().items()}, step=step)
            meter.restart_clock()
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            save_checkpoint(accelerator, args, stream, step)
            meter.restart_clock()
    progress.close()
    if average:
        unprepared.load_state_dict(average.average)
    unprepared.eval()
    if isinstance(model, FSDPModule):
        state = accelerator.get_state_dict(model)
        unprepared.save_pretrained = functools.partial(unprepared.save_pretrained, state_dict=state)


def check_finite(args: OptimizationArguments, step: int, **losses: torch.Tensor) -> None:
    """Raises `ValueError` for the first loss that is NaN or infinite, naming the step and the last checkpoint."""
    for name, loss in losses.items():
        if not loss.isfinite().all():
            checkpoints = list_checkpoints(Path(args.output_dir))
            last = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
            raise ValueError(
                f"{name} is {loss.tolist()} at step {step}; {last}. A lower --learning_rate, a lower --max_grad_norm "
                "or --mixed_precision bf16 instead of fp16 may help"
            )


@contextmanager
def averaged_weights(model: torch.nn.Module, average: WeightAverage | None):
    """Inside, the model is in eval mode with the averaged weights, if any; random state is left untouched."""
    generators = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    model.eval()
    try:
        if average is None:
            yield
        else:
            with average.applied():
                yield
    finally:
        model.train()
        torch.set_rng_state(generators[0])
        if generators[1]:
            torch.cuda.set_rng_state_all(generators[1])


class Meter:
    """Means of logged values since the last result and counts since the start, over all ranks; images and codes per
    second, and the share of a device's peak arithmetic that forward and backward pass use."""

    def __init__(self, accelerator: Accelerator, codes_per_image: int, *counters: str):
        self.accelerator = accelerator
        self.codes_per_image = codes_per_image
        self.utilization_per_image = None  # seconds that an image takes at the peak
        self.counts = torch.zeros(len(counters))
        self.counters = counters
        self._reset()

    def _reset(self):
        self.values = defaultdict(list)
        self.images = 0
        self.seconds = 0.0
        self.restart_clock()

    @contextmanager
    def counting_flops(self, batch: dict, peak_teraflops: float | None):
        """Inside, the operations on the first batch are counted, recomputed activations too; no others."""
        if peak_teraflops is None or self.utilization_per_image is not None:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.utilization_per_image = counter.get_total_flops() / count_images(batch) / (peak_teraflops * 1e12)

    def restart_clock(self):
        """Leaves out the time since the last `add`: what a checkpoint or pictures took."""
        self.started = time.perf_counter()

    def add(self, batch: dict, **values: torch.Tensor):
        for name, value in values.items():
            self.values[name].append(whole(torch.as_tensor(value).detach()))
        self.counts += torch.tensor([batch.get(name, 0) for name in self.counters])
        self.images += count_images(batch)
        self.seconds += time.perf_counter() - self.started
        self.started = time.perf_counter()

    def result(self) -> dict[str, float]:
        means = {name: torch.stack(v).float().mean() for name, v in self.values.items()}
        result = {name: mean.item() for name, mean in self.accelerator.reduce(means, "mean").items()}
        images_per_second = self.images / self.seconds  # of this process
        result["images_per_second"] = images_per_second * self.accelerator.num_processes
        result["codes_per_second"] = result["images_per_second"] * self.codes_per_image
        if self.utilization_per_image is not None:
            result["flops_utilization"] = images_per_second * self.utilization_per_image
        counts = self.accelerator.reduce(self.counts.to(self.accelerator.device), "sum").tolist()
        result.update((name, int(count)) for name, count in zip(self.counters, counts) if count)
        self._reset()
        return result


def save_checkpoint(accelerator: Accelerator, args: OptimizationArguments, stream: TrainingStream, step: int) -> None:
    """Writes `checkpoint-{step}` under another name, then renames it: a run killed meanwhile harms no other."""
    output_dir = Path(args.output_dir)
    destination, unfinished = output_dir / f"checkpoint-{step}", output_dir / f"unfinished-checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(unfinished)
    position = {"step": step, "num_processes": accelerator.num_processes, **stream.state_dict()}
    (unfinished / f"position-{accelerator.process_index}.json").write_text(json.dumps(position))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        replace_folder(destination, unfinished)
        up_to_here = [path for path in list_checkpoints(output_dir) if checkpoint_step(path) <= step]
        for old in up_to_here[: -args.checkpoints_total_limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def replace_folder(destination: Path, finished: Path) -> None:
    """Renames `finished` to `destination`; what was there before stays as `previous-…`."""
    if destination.exists():
        previous = destination.with_name(f"previous-{destination.name}")
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(destination, previous)
    os.rename(finished, destination)


def resume(accelerator: Accelerator, args: OptimizationArguments, stream: TrainingStream) -> int:
    """Loads the checkpoint that `args` name and returns its step, 0 for a new run.

    Raises `ValueError` when that checkpoint does not exist or was written by another number of processes.
    """
    if args.resume_from_checkpoint is None:
        return 0
    if args.resume_from_checkpoint == "latest":
        checkpoints = list_checkpoints(Path(args.output_dir))
        if not checkpoints:
            logger.info(f"no checkpoint in {args.output_dir} yet: a new run")
            return 0
        checkpoint = checkpoints[-1]
    else:
        checkpoint = Path(args.resume_from_checkpoint)
    position_file = checkpoint / f"position-{accelerator.process_index}.json"
    if not position_file.exists():
        raise ValueError(f"{checkpoint} is not a checkpoint of this script with {accelerator.num_processes} processes")
    position = json.loads(position_file.read_text())
    if position["num_processes"] != accelerator.num_processes:
        raise ValueError(
            f"{checkpoint} was written by {position['num_processes']} processes, "
            f"this run has {accelerator.num_processes}"
        )
    accelerator.load_state(checkpoint)
    stream.load_state_dict(position)
    return position["step"]


def log_images(
    accelerator: Accelerator, args: OptimizationArguments, images: dict[str, torch.Tensor], step: int
) -> None:
    """Writes pictures `(B, 3, height, width)` in [0, 1] as grids to `images/` and to TensorBoard."""
    if not accelerator.is_main_process:
        return
    folder = Path(args.output_dir) / "images"
    folder.mkdir(exist_ok=True)
    for name, batch in images.items():
        grid = image_grid(batch)
        grid.save(folder / f"{name}-{step:07d}.png")
        if args.report_to == "tensorboard":
            writer = accelerator.get_tracker("tensorboard", unwrap=True)
            writer.add_image(name, np.asarray(grid), step, dataformats="HWC")


@contextmanager
def written_whole(destination: Path):
    """A folder to write to, which becomes `destination` when all is written; what was there stays as `previous-…`."""
    unfinished = destination.with_name(f"unfinished-{destination.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    replace_folder(destination, unfinished)


def save_finished(accelerator: Accelerator, model, destination: Path, args: OptimizationArguments, card: str) -> None:
    """Saves a model or pipeline with its card, and uploads it if asked to."""
    if accelerator.is_main_process:
        with written_whole(destination) as folder:
            model.save_pretrained(folder)
            (folder / "README.md").write_text(card)
        if args.push_to_hub:
            create_repo(args.hub_model_id, exist_ok=True)
            upload_folder(repo_id=args.hub_model_id, folder_path=destination, commit_message="Upload trained model")
    accelerator.wait_for_everyone()


def flat_configuration(*arguments) -> dict:
    """Arguments as one dictionary of values that any tracker can store."""
    values = {k: v for args in arguments for k, v in asdict(args).items()}
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in values.items()}
