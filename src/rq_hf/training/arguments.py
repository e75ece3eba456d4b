"""
The command line of the training scripts. Only here and in the scripts' `main` are there argument classes: their
methods hand the values on to functions that know nothing of a command line.
"""

import json
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch.optim.lr_scheduler import LambdaLR
from transformers import HfArgumentParser

from ..argument_checks import check_number
from ..data import (
    ImageCollator,
    LatentCollator,
    TrainingStream,
    first_batches,
    load_image_dataset,
    load_latents,
    stored_dtype,
    stored_shape,
)
from ..data.loading import BUILDERS
from ..metrics import LPIPS
from ..models import RQTransformerModel, RQVAEModel
from ..models.continuous_latents import Autoencoder
from .adversarial import DiscriminatorTrainer, PatchDiscriminator
from .checkpoints import Checkpoints, create_repository, failing_together
from .loop import create_accelerator, create_optimizer, create_scheduler
from .reconstruction import first_pixels
from .rq_transformer import RQTransformerLoss, create_transformer, encode_batch, load_transformer
from .soft_labels import EFFECTIVE_CODEWORDS, choose_soft_label_temperature, describe_soft_labels

PRESETS = Path(__file__).parent / "presets"

# What a resumed run may change: it goes on with the new value. Everything else would make another run.
MAY_CHANGE = (
    *("output_dir", "max_train_steps", "learning_rate", "max_grad_norm", "mixed_precision", "gradient_checkpointing"),
    *("attn_implementation", "cpu", "logging_steps", "image_logging_steps", "peak_teraflops", "report_to"),
    *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "push_to_hub", "hub_model_id"),
    "preset",  # as the options that it sets are the same
    # Of the scripts.
    *("validation_split", "validation_files", "validation_images", "validation_prompts", "num_samples"),
    *("scaling_factor_images", "beam_size", "balanced", "resolve"),
)
# Also changeable, where it does not change which examples are read.
MAY_CHANGE_UNLESS_STREAMING = ("dataloader_num_workers",)

SOFT_LABEL_IMAGES = 256  # that τ is chosen on


def check_numbers(arguments, requirement: str, *names: str) -> None:
    """
    Raises `ValueError` with the name of the first option that is NaN, infinite or out of range.

    Args:
        arguments: an object with the options as attributes: numbers, lists of numbers, or `None`, which passes.
        requirement: one of [`RANGES`].
        names: of the options.
    """
    for name in names:
        value = getattr(arguments, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None:
                check_number(f"--{name}", number, requirement)


def check_repository(name: str) -> None:
    """Raises `ValueError` unless `name` can be a repository `user/name` on the Hub."""
    try:
        validate_repo_id(name)
        is_valid = "/" in name
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise ValueError(f"--hub_model_id must be user/name, of letters, digits, '-', '_' and '.', got {name!r}")


@dataclass
class RunArguments:
    _argument_group_name = "run and optimization"

    output_dir: str = field(metadata={"help": "Folder for checkpoints, logs and the finished model."})
    preset: str | None = field(
        default=None,
        metadata={
            "help": "Defaults for a small data set, see docs/first-training.md; options given as well override them.",
            "choices": sorted(path.stem for path in PRESETS.glob("*.json")),
        },
    )
    max_train_steps: int = field(
        default=100_000, metadata={"help": "Optimizer steps, those before a resume included."}
    )
    train_batch_size: int = field(default=32, metadata={"help": "Images per process and backward pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Backward passes per optimizer step."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler: str = field(
        default="cosine",
        metadata={"help": "After the warm-up: cosine to zero, or constant.", "choices": ["cosine", "constant"]},
    )
    lr_warmup_steps: int = field(default=500, metadata={"help": "Steps of linear warm-up."})
    adam_beta1: float = field(default=0.9, metadata={"help": "Adam's β₁."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Adam's β₂."})
    weight_decay: float = field(default=1e-4, metadata={"help": "AdamW's weight decay, applied to matrices only."})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Gradients are clipped to this norm; 0 for no clipping."}
    )
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
            "help": "Decay of the moving average of weights and buffers, which is what is saved; 0 disables it."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, shuffling and sampling."})
    logging_steps: int = field(default=50, metadata={"help": "Log every N steps."})
    image_logging_steps: int = field(
        default=1000, metadata={"help": "Log images and validation metrics every N steps; 0 for never."}
    )
    peak_teraflops: float | None = field(
        default=None,
        metadata={
            "help": "Peak of one device in the arithmetic used, 10¹² FLOP/s, to log the model FLOPs utilization (mfu)."
        },
    )
    checkpointing_steps: int = field(default=1000, metadata={"help": "Save a checkpoint every N steps."})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "Number of newest checkpoints to keep."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint folder, or 'latest' for the newest in the output folder. Options that may change: "
            f"--{', --'.join(MAY_CHANGE)} and, without --streaming, --{', --'.join(MAY_CHANGE_UNLESS_STREAMING)}. "
            "Others would make another run and are refused."
        },
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
        if self.hub_model_id is not None:
            check_repository(self.hub_model_id)
        check_numbers(self, "be at least 1", "max_train_steps", "train_batch_size", "gradient_accumulation_steps")
        check_numbers(self, "be at least 1", "logging_steps", "checkpointing_steps", "checkpoints_total_limit")
        check_numbers(self, "be at least 0", "lr_warmup_steps", "weight_decay", "max_grad_norm", "image_logging_steps")
        check_numbers(self, "be at least 0", "seed")
        check_numbers(self, "be greater than 0", "learning_rate", "peak_teraflops")
        check_numbers(self, "lie in [0, 1)", "adam_beta1", "adam_beta2", "ema_decay")

    @property
    def upload_to(self) -> str | None:
        """Repository to upload the finished model to, if any."""
        return self.hub_model_id if self.push_to_hub else None

    def create_accelerator(self, configuration: dict) -> Accelerator:
        """
        See [`create_accelerator`]; what would fail after hours fails here.

        Args:
            configuration: all options of the run, see [`flat_configuration`].

        Raises `ValueError` when a resumed run has options of another run, and when `upload_to` cannot be written to.
        """
        accelerator = create_accelerator(
            self.output_dir,
            resume_from=self.resume_from_checkpoint,
            cpu=self.cpu,
            mixed_precision=self.mixed_precision,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            train_batch_size=self.train_batch_size,
            report_to=self.report_to,
            seed=self.seed,
        )
        checkpoints = Checkpoints(self.output_dir)
        checkpoint = checkpoints.find(self.resume_from_checkpoint)
        if checkpoint is not None:
            saved = checkpoints.saved_configuration(self.resume_from_checkpoint)
            accelerator.print(f"resuming from {checkpoint}{describe_changes(saved, configuration)}")
        if self.upload_to is not None:
            with failing_together(ValueError):
                if accelerator.is_main_process:
                    create_repository(self.upload_to)
        return accelerator

    def create_optimizer(self, model: torch.nn.Module) -> torch.optim.AdamW:
        return create_optimizer(model, self.learning_rate, (self.adam_beta1, self.adam_beta2), self.weight_decay)

    def create_scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        return create_scheduler(optimizer, self.lr_scheduler, self.lr_warmup_steps, self.max_train_steps)

    def training_options(self) -> dict:
        """Keyword arguments of [`train`]."""
        return {
            "max_train_steps": self.max_train_steps,
            "checkpoints": Checkpoints(self.output_dir, self.checkpoints_total_limit),
            "resume_from": self.resume_from_checkpoint,
            "ema_decay": self.ema_decay,
            "max_grad_norm": self.max_grad_norm,
            "logging_steps": self.logging_steps,
            "checkpointing_steps": self.checkpointing_steps,
            "evaluation_steps": self.image_logging_steps,
            "peak_flops": None if self.peak_teraflops is None else self.peak_teraflops * 1e12,
        }


@dataclass
class DatasetArguments:
    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub, or a local folder of images or parquet files."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of the data set."})
    data_files: str | None = field(
        default=None,
        metadata={"help": f"Instead of --dataset_name: local files, globs allowed, one of {', '.join(BUILDERS)}."},
    )
    split: str = field(default="train", metadata={"help": "Split to read."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the data set as a stream, without preparing it on disk first."}
    )
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    center_crop: bool = field(
        default=True, metadata={"help": "Keep the middle square of an image; otherwise squeeze it into a square."}
    )
    skip_corrupt_images: bool = field(
        default=False,
        metadata={"help": "Leave out images that cannot be decoded, and log how many (default: stop at the first)."},
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that decode images; 0 decodes in the main process."}
    )

    def __post_init__(self):
        check_numbers(self, "be at least 0", "dataloader_num_workers")

    def load(self, required_columns: tuple[str, ...] = ()) -> datasets.Dataset | datasets.IterableDataset:
        return load_image_dataset(
            dataset_name=self.dataset_name,
            dataset_config=self.dataset_config,
            data_files=self.data_files,
            split=self.split,
            streaming=self.streaming,
            image_column=self.image_column,
            required_columns=required_columns,
        )

    def describe(self, resolution: int | None, num_images: int | None = None) -> dict[str, str | None]:
        """`dataset`, `split` and `transform` of its first `num_images` images, resized to a square of `resolution`
        or left as they are, as a [`FeatureStatistics`] notes them."""
        config = f"/{self.dataset_config}" if self.dataset_config is not None else ""
        transform = "none"
        if resolution is not None:
            transform = f"{'centre crop and ' if self.center_crop else ''}bilinear resize to {resolution}×{resolution}"
        return {
            "dataset": self.data_files if self.dataset_name is None else self.dataset_name + config,
            "split": self.split if num_images is None else f"{self.split}[:{num_images}]",
            "transform": transform,
        }

    def create_collator(self, resolution: int, **options) -> ImageCollator:
        """`options` are further arguments of [`ImageCollator`]."""
        return ImageCollator(
            self.image_column,
            resolution,
            skip_corrupt_images=self.skip_corrupt_images,
            center_crop=self.center_crop,
            **options,
        )


@dataclass
class TrainingDataArguments(DatasetArguments):
    random_flip: bool = field(default=False, metadata={"help": "Mirror half of the images at random."})
    shuffle_buffer_size: int = field(
        default=10_000,
        metadata={"help": "Examples in the shuffle buffer of a stream; a prepared data set is shuffled whole."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "be at least 1", "shuffle_buffer_size")

    def create_stream(
        self,
        accelerator: Accelerator,
        dataset: datasets.Dataset | datasets.IterableDataset,
        collate: Callable[[list[dict]], dict],
        run: RunArguments,
    ) -> TrainingStream:
        """This rank's share of the data set."""
        return TrainingStream(
            dataset,
            collate,
            batch_size=run.train_batch_size,
            seed=run.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            shuffle_buffer_size=self.shuffle_buffer_size,
            num_workers=self.dataloader_num_workers,
        )


@dataclass
class ValidationArguments:
    _argument_group_name = "validation"

    validation_split: str | None = field(
        default=None, metadata={"help": "Split of the same data set for validation metrics."}
    )
    validation_files: str | None = field(
        default=None, metadata={"help": "Or files for it, like --data_files; a folder, like --latents."}
    )
    validation_images: int = field(
        default=1000, metadata={"help": "Number of them to evaluate, every --image_logging_steps steps."}
    )

    def __post_init__(self):
        check_numbers(self, "be at least 1", "validation_images")
        if self.validation_split and self.validation_files:
            raise ValueError(
                "give at most one of --validation_split and --validation_files, "
                f"got {self.validation_split!r} and {self.validation_files!r}"
            )

    @property
    def is_given(self) -> bool:
        return bool(self.validation_split or self.validation_files)

    def select_from(self, data: TrainingDataArguments) -> TrainingDataArguments:
        """`data` with the validation images instead, never flipped. Raises `ValueError` for a split of files, all of
        which are trained on."""
        data = replace(data, random_flip=False)
        if self.validation_files:
            return replace(data, dataset_name=None, data_files=self.validation_files)
        if data.data_files:
            raise ValueError(
                "--validation_split names a split of --dataset_name, "
                f"got {self.validation_split!r} with --data_files: pass --validation_files"
            )
        return replace(data, split=self.validation_split)


@dataclass
class AutoencoderArguments:
    _argument_group_name = "model"

    resolution: int = field(default=256, metadata={"help": "Height and width of the images."})
    in_channels: int = field(default=3, metadata={"help": "3 for RGB, 1 for grey images.", "choices": [1, 3]})
    block_out_channels: list[int] = field(
        default_factory=lambda: [128, 128, 256, 256, 512, 512],
        metadata={"help": "Width of every level, fine to coarse; between levels the image is halved."},
    )
    layers_per_block: int = field(default=2, metadata={"help": "Residual blocks per level."})
    attention_levels: list[int] = field(
        default_factory=list, metadata={"help": "Levels with attention, 0 being the finest."}
    )
    norm_num_groups: int = field(default=32, metadata={"help": "Groups of the group norms; divides every width."})
    latent_channels: int = field(default=256, metadata={"help": "Channels between encoder and decoder."})

    def __post_init__(self):
        check_numbers(self, "be at least 1", "resolution", "block_out_channels", "layers_per_block", "norm_num_groups")
        check_numbers(self, "be at least 1", "latent_channels")
        levels = len(self.block_out_channels)
        for level in self.attention_levels:
            if not 0 <= level < levels:
                raise ValueError(
                    f"--attention_levels must lie in [0, {levels}), the levels of --block_out_channels, got {level}"
                )
        if self.resolution % 2 ** (levels - 1):
            raise ValueError(f"--resolution must be divisible by {2 ** (levels - 1)}, got {self.resolution}")

    def network_options(self) -> dict:
        """The keyword arguments that [`RQVAEModel`] and `AutoencoderKL` have in common."""
        attention = [level in self.attention_levels for level in range(len(self.block_out_channels))]
        return {
            "in_channels": self.in_channels,
            "out_channels": self.in_channels,
            "down_block_types": tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention),
            "up_block_types": tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attention)),
            "block_out_channels": tuple(self.block_out_channels),
            "layers_per_block": self.layers_per_block,
            "norm_num_groups": self.norm_num_groups,
            "latent_channels": self.latent_channels,
            "sample_size": self.resolution,
        }

    def create_collator(self, data: DatasetArguments, random_flip: bool = False) -> ImageCollator:
        return data.create_collator(self.resolution, random_flip=random_flip, in_channels=self.in_channels)

    def load_validation(
        self, validation: ValidationArguments, data: TrainingDataArguments, batch_size: int
    ) -> list[torch.Tensor]:
        """Batches of pixels of the validation images, none without such options. Raises `ValueError` like
        [`ValidationArguments.select_from`]."""
        if not validation.is_given:
            return []
        data = validation.select_from(data)
        return first_pixels(data.load(), self.create_collator(data), validation.validation_images, batch_size)


@dataclass
class LossArguments:
    _argument_group_name = "losses"

    reconstruction_loss: str = field(
        default="mse", metadata={"help": "Squared error or L1.", "choices": ["mse", "l1"]}
    )
    perceptual_weight: float = field(default=1.0, metadata={"help": "Weight of LPIPS; 0 disables it."})
    lpips_vgg: str | None = field(
        default=None, metadata={"help": "Weights of VGG16 (ImageNet): a file, or user/repository/file on the Hub."}
    )
    lpips_heads: str | None = field(
        default=None, metadata={"help": "Weights of LPIPS for VGG16, lin0 to lin4: a file, or likewise."}
    )
    discriminator_weight: float = field(
        default=0.75,
        metadata={"help": "Weight of the adversarial loss, besides its adaptive weight; 0 disables it."},
    )
    discriminator_loss: str = field(
        default="hinge", metadata={"help": "Loss of the discriminator.", "choices": ["hinge", "vanilla"]}
    )
    discriminator_width: int = field(default=64, metadata={"help": "Channels of the discriminator's first layer."})
    discriminator_layers: int = field(default=2, metadata={"help": "Its layers that halve the image."})
    discriminator_norm: str = field(
        default="batch", metadata={"help": "Its normalization: BatchNorm or ActNorm.", "choices": ["batch", "act"]}
    )
    discriminator_start: int = field(default=0, metadata={"help": "Step from which the discriminator learns."})
    discriminator_warmup_steps: int = field(
        default=0, metadata={"help": "Steps that it learns alone, before its loss reaches the autoencoder."}
    )
    max_adaptive_weight: float = field(default=1e4, metadata={"help": "Bound of the adaptive weight."})

    def __post_init__(self):
        check_numbers(self, "be at least 0", "perceptual_weight", "discriminator_weight")
        check_numbers(self, "be at least 0", "discriminator_start", "discriminator_warmup_steps")
        check_numbers(self, "be at least 1", "discriminator_width", "discriminator_layers")
        check_numbers(self, "be greater than 0", "max_adaptive_weight")
        if self.perceptual_weight and not (self.lpips_vgg and self.lpips_heads):
            raise ValueError(
                f"--perceptual_weight {self.perceptual_weight} needs --lpips_vgg, the ImageNet weights of VGG16 "
                "(vgg16-397923af.pth of torchvision), and --lpips_heads, vgg.pth of LPIPS v0.1; "
                "--perceptual_weight 0 disables it"
            )

    def create_perceptual(self, accelerator: Accelerator) -> LPIPS | None:
        """`None` if disabled."""
        if not self.perceptual_weight:
            return None
        return LPIPS.from_pretrained(self.lpips_vgg, self.lpips_heads).to(accelerator.device)

    def create_discriminator(
        self, accelerator: Accelerator, run: RunArguments, in_channels: int
    ) -> DiscriminatorTrainer | None:
        """The discriminator with its own Adam and learning rate schedule, those of the autoencoder; `None` if
        disabled."""
        if not self.discriminator_weight:
            return None
        discriminator = PatchDiscriminator(
            in_channels, self.discriminator_width, self.discriminator_layers, norm=self.discriminator_norm
        )
        optimizer = torch.optim.Adam(
            discriminator.parameters(), lr=run.learning_rate, betas=(run.adam_beta1, run.adam_beta2)
        )
        return DiscriminatorTrainer(
            accelerator,
            discriminator,
            optimizer,
            run.create_scheduler(optimizer),
            loss=self.discriminator_loss,
            weight=self.discriminator_weight,
            start=self.discriminator_start,
            warmup_steps=self.discriminator_warmup_steps,
            max_adaptive_weight=self.max_adaptive_weight,
        )


@dataclass(kw_only=True)
class LatentsArguments:
    latents: str | None = field(
        default=None,
        metadata={"help": "Instead of images: a folder of their latents, written by extract_latents.py."},
    )

    def load_dataset(
        self, vae: Autoencoder, data: TrainingDataArguments, required_columns: tuple[str, ...] = ()
    ) -> datasets.Dataset | datasets.IterableDataset:
        """The latents or, without them, the images of `data`. Raises `ValueError` for latents with options that only
        images have, and like [`load_latents`] and [`load_image_dataset`]."""
        if self.latents is None:
            return data.load(required_columns)
        for option in fields(data):
            applies_to_images = option.name not in ("streaming", "dataloader_num_workers", "shuffle_buffer_size")
            if applies_to_images and getattr(data, option.name) != option.default:
                raise ValueError(f"--{option.name} applies to images and cannot be combined with --latents")
        return load_latents(self.latents, vae, data.streaming, required_columns)

    def load_validation(
        self,
        validation: ValidationArguments,
        vae: Autoencoder,
        data: TrainingDataArguments,
        batch_size: int,
        **conditions,
    ) -> list[dict[str, torch.Tensor]]:
        """Batches of the validation images or latents, none without such options; `conditions` as in
        [`create_collator`]. Raises `ValueError` like [`load_dataset`] and [`ValidationArguments.select_from`]."""
        if not validation.is_given:
            return []
        if self.latents is None:
            source, data = self, validation.select_from(data)
        elif validation.validation_files:
            source = replace(self, latents=validation.validation_files)
        else:
            raise ValueError("--validation_split applies to images: with --latents, pass --validation_files FOLDER")
        columns = (conditions.get("text_column"), conditions.get("label_column"))
        dataset = source.load_dataset(vae, data, tuple(filter(None, columns)))
        collate = source.create_collator(vae, data, **conditions)
        return list(first_batches(dataset, collate, validation.validation_images, batch_size))

    def create_collator(
        self, vae: Autoencoder, data: TrainingDataArguments, **conditions
    ) -> ImageCollator | LatentCollator:
        """For the examples of [`load_dataset`]; `conditions` are the columns, the tokenizer, and the number and names
        of the classes."""
        if self.latents is not None:
            return LatentCollator(stored_shape(vae), dtype=stored_dtype(self.latents), **conditions)
        return data.create_collator(
            vae.config.sample_size, random_flip=data.random_flip, in_channels=vae.config.in_channels, **conditions
        )


@dataclass(kw_only=True)
class TransformerArguments(LatentsArguments):
    _argument_group_name = "transformer"

    rqvae: str = field(metadata={"help": "Trained RQ-VAE: a folder or a Hub id."})
    transformer: str | None = field(
        default=None,
        metadata={"help": "Trained transformer to continue from: a folder or a Hub id (default: a new one)."},
    )
    hidden_size: int = field(default=512, metadata={"help": "Width of both stacks."})
    spatial_layers: int = field(default=12, metadata={"help": "Blocks of the spatial transformer."})
    depth_layers: int = field(default=4, metadata={"help": "Blocks of the depth transformer; 0 with depth 1 only."})
    num_attention_heads: int = field(default=8, metadata={"help": "Attention heads."})
    hidden_dropout: float = field(default=0.1, metadata={"help": "Dropout in the blocks."})
    attn_implementation: str = field(
        default="sdpa",
        metadata={
            "help": "Attention kernel; on a CPU in bf16, eager trains short maps 1.5 times faster than sdpa.",
            "choices": ["eager", "sdpa", "flash_attention_2"],
        },
    )
    labels: str = field(
        default="soft",
        metadata={
            "help": "Targets: the nearest codes, or soft labels over all codes.",
            "choices": ["hard", "soft"],
        },
    )
    soft_label_temperature: float | None = field(
        default=None,
        metadata={
            "help": "τ of the soft labels softmax(−‖r − e(k)‖²/τ) (default: that of --transformer or, for a new one, "
            f"the τ at which they spread over {EFFECTIVE_CODEWORDS} codewords on the first images; the paper has 0.5)."
        },
    )
    stochastic_codes: bool = field(
        default=True,
        metadata={"help": "With soft labels: sample the codes from them; otherwise the nearest codes are the inputs."},
    )
    cond_dropout: float = field(
        default=0.1, metadata={"help": "Share of conditions replaced by none, for classifier-free guidance."}
    )

    def __post_init__(self):
        if self.labels not in ("hard", "soft"):
            raise ValueError(f"--labels must be hard or soft, got {self.labels!r}")
        check_numbers(self, "be at least 1", "hidden_size", "spatial_layers", "num_attention_heads")
        check_numbers(self, "be at least 0", "depth_layers")
        check_numbers(self, "be greater than 0", "soft_label_temperature")
        check_numbers(self, "lie in [0, 1)", "hidden_dropout", "cond_dropout")

    def create_model(self, vae: RQVAEModel, **conditions) -> RQTransformerModel:
        """A new or a trained transformer; `conditions` are `cond_vocab_size`, `cond_length` and `null_cond_id`."""
        if self.transformer is not None:
            model = load_transformer(self.transformer, vae, **conditions)
        else:
            model = create_transformer(
                vae,
                hidden_size=self.hidden_size,
                spatial_layers=self.spatial_layers,
                depth_layers=self.depth_layers,
                num_attention_heads=self.num_attention_heads,
                hidden_dropout=self.hidden_dropout,
                **conditions,
            )
        model.set_attn_implementation(self.attn_implementation)
        return model

    def create_loss(
        self,
        accelerator: Accelerator,
        vae: RQVAEModel,
        model: RQTransformerModel,
        dataset: datasets.Dataset | datasets.IterableDataset,
        collate: Callable[[list[dict]], dict],
    ) -> RQTransformerLoss:
        """The loss; with soft labels of a τ that is given, that of a trained model, or chosen on the first examples
        of the data set, and kept in the model's configuration."""
        temperature = None
        if self.labels == "soft":
            batches = first_batches(dataset, collate, SOFT_LABEL_IMAGES, batch_size=32)
            vectors = torch.cat([encode_batch(vae, batch) for batch in batches])
            if self.soft_label_temperature is not None:
                temperature = self.soft_label_temperature
            elif self.transformer is not None:
                temperature = model.config.soft_label_temperature
            else:
                temperature = choose_soft_label_temperature(vae.quantizer, vectors)
            accelerator.print(describe_soft_labels(vae.quantizer, vectors, temperature))
            model.config.soft_label_temperature = temperature
        return RQTransformerLoss(
            vae,
            null_cond_id=model.config.null_cond_id,
            soft_label_temperature=temperature,
            stochastic_codes=self.stochastic_codes,
            cond_dropout=self.cond_dropout,
            autocast=accelerator.autocast,
        )


def describe_changes(saved: dict | None, configuration: dict) -> str:
    """
    What a resumed run does otherwise than the run that wrote its checkpoint, to be appended to a sentence.

    Args:
        saved: options of that run; `None` if they are not known.
        configuration: options of this run.

    Raises `ValueError` with the names and values of options that would make another run.
    """
    if saved is None:
        return (
            ", which version 0.1 wrote without the options of its run: they cannot be compared. By default, "
            "--soft_label_temperature was 0.5 then"
        )
    changed = [name for name in configuration if name in saved and configuration[name] != saved[name]]
    may_change = {*MAY_CHANGE, *(() if configuration.get("streaming") else MAY_CHANGE_UNLESS_STREAMING)}
    refused = [
        f"--{name} was {saved[name]!r}, got {configuration[name]!r}" for name in changed if name not in may_change
    ]
    if refused:
        raise ValueError(
            f"the checkpoint belongs to another run: {'; '.join(refused)}. Resume with the options of that run, or "
            "begin a new one in another --output_dir"
        )
    changes = [
        f"--{name} {configuration[name]!r} (was {saved[name]!r})"
        for name in changed
        if name != "resume_from_checkpoint"
    ]
    unknown = sorted(saved.keys() ^ configuration.keys())
    return (f", with {', '.join(changes)}" if changes else "") + (
        f"; only one version of rq_hf knows {', '.join(map(repr, unknown))}" if unknown else ""
    )


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Help with the description as it is and one name per option; omits uninformative defaults."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=36, width=120)

    def _format_action_invocation(self, action):
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        if isinstance(action.const, bool):
            return action.option_strings[0]
        kind = "|".join(map(str, action.choices or [])) or getattr(action.type, "__name__", "value")
        return f"{action.option_strings[0]} {kind}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action):
        is_uninformative = action.default is None or action.default is False or action.default == []
        return action.help if is_uninformative else super()._get_help_string(action)


def parse_arguments(
    *argument_classes: type,
    description: str,
    sections: tuple[str, ...],
    usage: str = "%(prog)s --output_dir FOLDER [options]",
    **defaults,
) -> tuple:
    """Command line -> one object per class, with the `defaults` of a script, or those in its `sections` of a preset.
    The help is a manual page: the description, then the options by group."""
    parser = HfArgumentParser(argument_classes, description=description, usage=usage, formatter_class=HelpFormatter)
    parser.set_defaults(**defaults)
    chooser = ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset")
    path = PRESETS / f"{chooser.parse_known_args()[0].preset}.json"
    if path.exists():
        preset = json.loads(path.read_text())
        for section in sections:
            parser.set_defaults(**preset[section])
    return parser.parse_args_into_dataclasses()


def flat_configuration(*arguments) -> dict:
    """Arguments as one dictionary of values that any tracker can store."""
    values = {k: v for args in arguments for k, v in asdict(args).items()}
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in values.items()}
