"""Train a KL autoencoder, the tokenizer of MAR, on any image data set.

One process:
    accelerate launch examples/train_autoencoder_kl.py --dataset_name user/images --resolution 256 \\
        --output_dir runs/kl --lpips_vgg vgg16-397923af.pth --lpips_heads vgg.pth
Eight GPUs, bf16, 256 images per step:
    accelerate launch --multi_gpu --num_processes 8 examples/train_autoencoder_kl.py --mixed_precision bf16 ...
Two processes on a CPU:
    torchrun --nproc_per_node 2 examples/train_autoencoder_kl.py --cpu ...
Resume after an interruption:
    ... --resume_from_checkpoint latest

Without perceptual and adversarial losses, fast but blurred:
    ... --perceptual_weight 0 --discriminator_weight 0 --learning_rate 5e-4
With fewer latents, which are easier to learn for a small MAR model:
    ... --latent_channels 4

The finished model is OUTPUT_DIR/vae: diffusers.AutoencoderKL.from_pretrained("OUTPUT_DIR/vae"). Its scaling_factor is
1 / standard deviation of the latents of --scaling_factor_images images.
Defaults are those of latent diffusion's kl-f16 (Rombach et al. 2022), whose sizes MAR's KL-16 has: L1, LPIPS and, from
step 50,000 on, a PatchGAN; a KL weight of 1e-6; Adam at a constant rate of 1e-4, for batches of 256 images. Attention
at the coarsest level, as there, is --attention_levels 4. LPIPS needs weights: files, or user/repository/file on the
Hub.
"""

import functools
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from rq_hf.models.continuous_latents import autoencoder_kl_card
from rq_hf.training import (
    AutoencoderArguments,
    AutoencoderKLForTraining,
    AutoencoderKLLoss,
    LossArguments,
    RunArguments,
    TrainingDataArguments,
    ValidationArguments,
    autoencoder_kl_grid,
    check_numbers,
    check_unsharded,
    evaluate_autoencoder_kl,
    first_pixels,
    flat_configuration,
    parse_arguments,
    save_autoencoder,
    set_scaling_factor,
    train,
)

SHOWN_IMAGES = 16


@dataclass
class AutoencoderKLArguments(AutoencoderArguments):
    scaling_factor_images: int = field(
        default=1000,
        metadata={"help": "Images that the scaling factor is measured on, at the end; rounded up to whole batches."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "be at least 1", "scaling_factor_images")


@dataclass
class AutoencoderKLLossArguments(LossArguments):
    kl_weight: float = field(default=1e-6, metadata={"help": "Weight λ of the KL divergence from N(0, 1)."})

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "be at least 0", "kl_weight")


def main() -> None:
    run, data, args, losses, validation = parse_arguments(
        RunArguments,
        TrainingDataArguments,
        AutoencoderKLArguments,
        AutoencoderKLLossArguments,
        ValidationArguments,
        description=__doc__,
        sections=("autoencoder",),
        block_out_channels=[128, 128, 256, 256, 512],
        latent_channels=16,
        reconstruction_loss="l1",
        discriminator_weight=0.5,
        discriminator_layers=3,
        discriminator_start=50_000,
        learning_rate=1e-4,
        lr_scheduler="constant",
        adam_beta1=0.5,
        adam_beta2=0.9,
        weight_decay=0.0,
    )
    configuration = flat_configuration(run, data, args, losses, validation)
    accelerator = run.create_accelerator(configuration)
    check_unsharded(accelerator)

    vae = AutoencoderKL(**args.network_options(), scaling_factor=1.0)
    if run.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    perceptual = losses.create_perceptual(accelerator)
    discriminator = losses.create_discriminator(accelerator, run, args.in_channels)

    dataset = data.load()
    collate = args.create_collator(data, data.random_flip)
    held_out = args.load_validation(validation, data, run.train_batch_size)
    shown = held_out or first_pixels(dataset, collate, SHOWN_IMAGES, run.train_batch_size)
    shown = torch.cat(shown)[:SHOWN_IMAGES]

    model = AutoencoderKLForTraining(vae)
    optimizer = run.create_optimizer(model)
    train(
        accelerator,
        model,
        optimizer,
        run.create_scheduler(optimizer),
        data.create_stream(accelerator, dataset, collate, run),
        AutoencoderKLLoss(
            model,
            reconstruction_loss=losses.reconstruction_loss,
            kl_weight=losses.kl_weight,
            perceptual=perceptual,
            perceptual_weight=losses.perceptual_weight,
            discriminator=discriminator,
        ),
        hooks=[discriminator] if discriminator else [],
        evaluate=functools.partial(evaluate_autoencoder_kl, accelerator, vae, shown, held_out, perceptual),
        configuration=configuration,
        **run.training_options(),
    )
    batches = data.create_stream(accelerator, dataset, args.create_collator(data), run)
    num_batches = math.ceil(args.scaling_factor_images / run.train_batch_size)
    set_scaling_factor(vae, (batch["pixels"] for batch in itertools.islice(batches, num_batches)), run.seed)
    save_autoencoder(
        accelerator,
        vae,
        Path(run.output_dir) / "vae",
        functools.partial(autoencoder_kl_card, vae),
        autoencoder_kl_grid(vae, shown),
        configuration=configuration,
        dataset=dataset,
        upload_to=run.upload_to,
    )
    accelerator.print(f"scaling factor {vae.config.scaling_factor:.4g}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
