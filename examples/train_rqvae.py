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

from rq_hf import RQVAEModel
from rq_hf.training import (
    AutoencoderArguments,
    LossArguments,
    RQVAELoss,
    RunArguments,
    TrainingDataArguments,
    ValidationArguments,
    check_numbers,
    check_unsharded,
    evaluate_reconstructions,
    first_pixels,
    flat_configuration,
    initialize_codebook,
    parse_arguments,
    reconstruction_grid,
    save_autoencoder,
    train,
)

SHOWN_IMAGES = 16


@dataclass
class RQVAEArguments(AutoencoderArguments):
    dropout: float = field(default=0.0, metadata={"help": "Dropout in the residual blocks."})
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
        super().__post_init__()
        check_numbers(self, "be at least 1", "codebook_dim", "codebook_size", "depth", "codebook_init_images")
        check_numbers(self, "lie in [0, 1)", "dropout", "codebook_ema_decay")


@dataclass
class RQVAELossArguments(LossArguments):
    commitment_weight: float = field(default=0.25, metadata={"help": "Weight β of the commitment loss."})

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "be at least 0", "commitment_weight")


def create_model(args: RQVAEArguments) -> RQVAEModel:
    return RQVAEModel(
        **args.network_options(),
        dropout=args.dropout,
        codebook_dim=args.codebook_dim,
        codebook_size=args.codebook_size,
        depth=args.depth,
        shared_codebook=not args.codebook_per_depth,
        codebook_update=args.codebook_update,
        ema_decay=args.codebook_ema_decay,
        quantizer_dropout=args.quantizer_dropout,
    )


def main() -> None:
    run, data, args, losses, validation = parse_arguments(
        RunArguments,
        TrainingDataArguments,
        RQVAEArguments,
        RQVAELossArguments,
        ValidationArguments,
        description=__doc__,
        sections=("autoencoder", "rqvae"),
        learning_rate=4e-5,
        lr_scheduler="constant",
        adam_beta1=0.5,
        adam_beta2=0.9,
        weight_decay=0.0,
    )
    configuration = flat_configuration(run, data, args, losses, validation)
    accelerator = run.create_accelerator(configuration)
    check_unsharded(accelerator)

    model = create_model(args)
    if run.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    perceptual = losses.create_perceptual(accelerator)
    discriminator = losses.create_discriminator(accelerator, run, args.in_channels)

    dataset = data.load()
    collate = args.create_collator(data, data.random_flip)
    held_out = args.load_validation(validation, data, run.train_batch_size)
    shown = held_out or first_pixels(dataset, collate, SHOWN_IMAGES, run.train_batch_size)
    shown = torch.cat(shown)[:SHOWN_IMAGES]
    if args.codebook_init == "k-means":
        pixels = first_pixels(dataset, collate, args.codebook_init_images, run.train_batch_size)
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
    save_autoencoder(
        accelerator,
        model,
        Path(run.output_dir) / "rqvae",
        model.card,
        reconstruction_grid(model, shown),
        configuration=configuration,
        dataset=dataset,
        upload_to=run.upload_to,
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
