"""Train an RQ-VAE (stage 1) on any image data set.

One process:
    accelerate launch examples/train_rqvae.py --dataset_name user/images --resolution 256 --output_dir runs/rqvae \\
        --lpips_vgg vgg16-397923af.pth --lpips_heads vgg.pth
Eight GPUs, bf16:
    accelerate launch --multi_gpu --num_processes 8 examples/train_rqvae.py --mixed_precision bf16 ...
Two processes on a CPU:
    torchrun --nproc_per_node 2 examples/train_rqvae.py --cpu ...
Local files, read as a stream:
    accelerate launch examples/train_rqvae.py --data_files 'data/*.parquet' --streaming ...
Resume after an interruption:
    ... --resume_from_checkpoint latest

Without perceptual and adversarial losses, fast but blurred:
    ... --perceptual_weight 0 --discriminator_weight 0 --learning_rate 5e-4

The finished model is OUTPUT_DIR/rqvae: RQVAEModel.from_pretrained("OUTPUT_DIR/rqvae").
Defaults are the paper's: squared error, commitment loss, LPIPS and a PatchGAN from the first step on; Adam, at a
constant learning rate after a linear warm-up. LPIPS needs weights: files, or user/repository/file on the Hub.
"""

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType

from rq_hf import RQVAEModel
from rq_hf.data import first_batches
from rq_hf.metrics import LPIPS
from rq_hf.training import (
    DiscriminatorTrainer,
    PatchDiscriminator,
    RQVAELoss,
    RunArguments,
    TrainingDataArguments,
    ValidationArguments,
    check_numbers,
    evaluate_reconstructions,
    flat_configuration,
    initialize_codebook,
    parse_arguments,
    rqvae_card,
    save_finished,
    train,
)

SHOWN_IMAGES = 16


@dataclass
class RQVAEArguments:
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
    dropout: float = field(default=0.0, metadata={"help": "Dropout in the residual blocks."})
    latent_channels: int = field(default=256, metadata={"help": "Channels of the encoder's output."})
    codebook_dim: int = field(default=256, metadata={"help": "Dimension of a codeword."})
    codebook_size: int = field(default=16384, metadata={"help": "Number of codewords."})
    depth: int = field(default=4, metadata={"help": "Codes per position."})
    codebook_per_depth: bool = field(default=False, metadata={"help": "A codebook per depth instead of a shared one."})
    codebook_update: str = field(
        default="ema",
        metadata={
            "help": "Moving average, or gradient of the codebook loss (VQ-VAE).",
            "choices": ["ema", "gradient"],
        },
    )
    codebook_ema_decay: float = field(default=0.99, metadata={"help": "Decay of the codebook's moving average."})
    codebook_init: str = field(
        default="random",
        metadata={
            "help": "First codebook: random, or k-means on the features of --codebook_init_images images.",
            "choices": ["random", "k-means"],
        },
    )
    codebook_init_images: int = field(default=1024, metadata={"help": "Images for k-means."})
    quantizer_dropout: float = field(
        default=0.0, metadata={"help": "Share of images decoded from a random number of their first codes."}
    )

    def __post_init__(self):
        check_numbers(self, "be at least 1", "resolution", "block_out_channels", "layers_per_block", "norm_num_groups")
        check_numbers(self, "be at least 1", "latent_channels", "codebook_dim", "codebook_size", "depth")
        check_numbers(self, "be at least 1", "codebook_init_images")
        check_numbers(self, "lie in [0, 1)", "dropout", "codebook_ema_decay")
        levels = len(self.block_out_channels)
        for level in self.attention_levels:
            if not 0 <= level < levels:
                raise ValueError(
                    f"--attention_levels must lie in [0, {levels}), the levels of --block_out_channels, got {level}"
                )


@dataclass
class LossArguments:
    _argument_group_name = "losses"

    reconstruction_loss: str = field(
        default="mse", metadata={"help": "Squared error or L1.", "choices": ["mse", "l1"]}
    )
    commitment_weight: float = field(default=0.25, metadata={"help": "Weight β of the commitment loss."})
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
        default=0, metadata={"help": "Steps that it learns alone, before its loss reaches the RQ-VAE."}
    )
    max_adaptive_weight: float = field(default=1e4, metadata={"help": "Bound of the adaptive weight."})

    def __post_init__(self):
        check_numbers(self, "be at least 0", "commitment_weight", "perceptual_weight", "discriminator_weight")
        check_numbers(self, "be at least 0", "discriminator_start", "discriminator_warmup_steps")
        check_numbers(self, "be at least 1", "discriminator_width", "discriminator_layers")
        check_numbers(self, "be greater than 0", "max_adaptive_weight")
        if self.perceptual_weight and not (self.lpips_vgg and self.lpips_heads):
            raise ValueError(
                f"--perceptual_weight {self.perceptual_weight} needs --lpips_vgg, the ImageNet weights of VGG16 "
                "(vgg16-397923af.pth of torchvision), and --lpips_heads, vgg.pth of LPIPS v0.1; "
                "--perceptual_weight 0 disables it"
            )


def create_model(args: RQVAEArguments) -> RQVAEModel:
    """Raises `ValueError` for a resolution that the levels do not divide."""
    attention = [level in args.attention_levels for level in range(len(args.block_out_channels))]
    model = RQVAEModel(
        in_channels=args.in_channels,
        out_channels=args.in_channels,
        down_block_types=tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention),
        up_block_types=tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attention)),
        block_out_channels=tuple(args.block_out_channels),
        layers_per_block=args.layers_per_block,
        norm_num_groups=args.norm_num_groups,
        dropout=args.dropout,
        latent_channels=args.latent_channels,
        codebook_dim=args.codebook_dim,
        codebook_size=args.codebook_size,
        depth=args.depth,
        shared_codebook=not args.codebook_per_depth,
        codebook_update=args.codebook_update,
        ema_decay=args.codebook_ema_decay,
        quantizer_dropout=args.quantizer_dropout,
        sample_size=args.resolution,
    )
    if any(args.resolution % pixels for pixels in model.pixels_per_code):
        raise ValueError(f"--resolution must be divisible by {max(model.pixels_per_code)}, got {args.resolution}")
    return model


def create_discriminator(
    accelerator: Accelerator, args: LossArguments, run: RunArguments, in_channels: int
) -> DiscriminatorTrainer | None:
    """The discriminator with its own Adam and learning rate schedule, those of the RQ-VAE; `None` if disabled."""
    if not args.discriminator_weight:
        return None
    discriminator = PatchDiscriminator(
        in_channels, args.discriminator_width, args.discriminator_layers, norm=args.discriminator_norm
    )
    optimizer = torch.optim.Adam(
        discriminator.parameters(), lr=run.learning_rate, betas=(run.adam_beta1, run.adam_beta2)
    )
    return DiscriminatorTrainer(
        accelerator,
        discriminator,
        optimizer,
        run.create_scheduler(optimizer),
        loss=args.discriminator_loss,
        weight=args.discriminator_weight,
        start=args.discriminator_start,
        warmup_steps=args.discriminator_warmup_steps,
        max_adaptive_weight=args.max_adaptive_weight,
    )


def check_distribution(accelerator: Accelerator) -> None:
    """Raises `ValueError` when the model would be sharded."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "an RQ-VAE is trained with plain data parallelism (--multi_gpu), "
            f"got {accelerator.distributed_type.value}: sharded or in bf16 its codebook would lose its moving average"
        )


def main() -> None:
    run, data, args, losses, validation = parse_arguments(
        RunArguments,
        TrainingDataArguments,
        RQVAEArguments,
        LossArguments,
        ValidationArguments,
        description=__doc__,
        sections=("rqvae",),
        learning_rate=4e-5,
        lr_scheduler="constant",
        adam_beta1=0.5,
        adam_beta2=0.9,
        weight_decay=0.0,
    )
    configuration = flat_configuration(run, data, args, losses, validation)
    accelerator = run.create_accelerator(configuration)
    check_distribution(accelerator)

    model = create_model(args)
    if run.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    perceptual = None
    if losses.perceptual_weight:
        perceptual = LPIPS.from_pretrained(losses.lpips_vgg, losses.lpips_heads).to(accelerator.device)
    discriminator = create_discriminator(accelerator, losses, run, model.config.in_channels)

    dataset = data.load()
    collate = data.create_collator(args.resolution, random_flip=data.random_flip, in_channels=args.in_channels)

    def first_pixels(dataset, collate, count):
        return [batch["pixels"] for batch in first_batches(dataset, collate, count, run.train_batch_size)]

    held_out = []
    if validation.is_given:
        validation_data = validation.select_from(data)
        validation_collate = validation_data.create_collator(args.resolution, in_channels=args.in_channels)
        held_out = first_pixels(validation_data.load(), validation_collate, validation.validation_images)
    shown = torch.cat(held_out or first_pixels(dataset, collate, SHOWN_IMAGES))[:SHOWN_IMAGES]
    if args.codebook_init == "k-means":
        pixels = first_pixels(dataset, collate, args.codebook_init_images)
        initialize_codebook(model.to(accelerator.device), pixels)

    optimizer = run.create_optimizer(model)
    train(
        accelerator,
        model,
        optimizer,
        run.create_scheduler(optimizer),
        data.create_stream(accelerator, dataset, collate, run),
        RQVAELoss(
            model,
            reconstruction_loss=losses.reconstruction_loss,
            commitment_weight=losses.commitment_weight,
            perceptual=perceptual,
            perceptual_weight=losses.perceptual_weight,
            discriminator=discriminator,
        ),
        hooks=[discriminator] if discriminator else [],
        evaluate=functools.partial(evaluate_reconstructions, accelerator, model, shown, held_out, perceptual),
        units_per_image={"codes": math.prod(model.code_shape)},
        configuration=configuration,
        **run.training_options(),
    )
    destination = Path(run.output_dir) / "rqvae"
    save_finished(accelerator, model, destination, rqvae_card(model), run.upload_to)
    accelerator.print(f"saved {destination}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
