"""Train an RQ-VAE (stage 1) on any image data set.

One process:
    accelerate launch examples/train_rqvae.py --dataset_name user/pictures --resolution 256 --output_dir runs/rqvae \\
        --lpips_vgg vgg16-397923af.pth --lpips_heads vgg.pth
Eight GPUs, bf16:
    accelerate launch --multi_gpu --num_processes 8 examples/train_rqvae.py --mixed_precision bf16 ...
Two processes on a CPU:
    torchrun --nproc_per_node 2 examples/train_rqvae.py --cpu ...
Local files, read as a stream:
    accelerate launch examples/train_rqvae.py --data_files 'data/*.parquet' --streaming ...
Go on after an interruption:
    ... --resume_from_checkpoint latest

Without perceptual and adversarial loss, fast and blurred:
    ... --perceptual_weight 0 --discriminator_weight 0 --learning_rate 5e-4

The finished model is OUTPUT_DIR/rqvae: RQVAEModel.from_pretrained("OUTPUT_DIR/rqvae").
Defaults are the paper's: squared error, commitment loss, LPIPS and a PatchGAN from the first step on; Adam, at a
constant rate after a linear warm-up. LPIPS needs weights: files, or user/repository/file on the Hub.
"""

import copy
import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import DistributedType

from rq_hf import RQVAEModel
from rq_hf.data import Collator, DataArguments, load_images
from rq_hf.metrics import codebook_health, count_codes, psnr
from rq_hf.metrics.lpips import LPIPS
from rq_hf.training import (
    OptimizationArguments,
    create_accelerator,
    create_scheduler,
    create_stream,
    flat_configuration,
    parse_arguments,
    save_finished,
    train,
)
from rq_hf.training.adversarial import Adversary, PatchDiscriminator


@dataclass
class RQVAEArguments:
    _argument_group_name = "model and losses"

    resolution: int = field(default=256, metadata={"help": "Height and width of the pictures."})
    block_out_channels: list[int] = field(
        default_factory=lambda: [128, 128, 256, 256, 512, 512],
        metadata={"help": "Width of every level, fine to coarse; between levels the picture is halved."},
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


@dataclass
class LossArguments:
    _argument_group_name = "losses"

    reconstruction_loss: str = field(
        default="mse", metadata={"help": "Squared error or L1.", "choices": ["mse", "l1"]}
    )
    commitment_weight: float = field(default=0.25, metadata={"help": "Weight β of the commitment loss."})
    perceptual_weight: float = field(default=1.0, metadata={"help": "Weight of LPIPS; 0 trains without."})
    lpips_vgg: str | None = field(
        default=None, metadata={"help": "Weights of VGG16 (ImageNet): a file, or user/repository/file on the Hub."}
    )
    lpips_heads: str | None = field(
        default=None, metadata={"help": "Weights of LPIPS for VGG16, lin0 to lin4: a file, or likewise."}
    )
    discriminator_weight: float = field(
        default=0.75,
        metadata={"help": "Weight of the adversarial loss, besides its adaptive weight; 0 trains without."},
    )
    discriminator_loss: str = field(
        default="hinge", metadata={"help": "Loss of the discriminator.", "choices": ["hinge", "vanilla"]}
    )
    discriminator_width: int = field(default=64, metadata={"help": "Channels of the discriminator's first layer."})
    discriminator_layers: int = field(default=2, metadata={"help": "Layers of it that halve the picture."})
    discriminator_norm: str = field(
        default="batch", metadata={"help": "Its normalization: BatchNorm or ActNorm.", "choices": ["batch", "act"]}
    )
    discriminator_start: int = field(default=0, metadata={"help": "Step from which on the discriminator learns."})
    discriminator_warmup_steps: int = field(
        default=0, metadata={"help": "Steps that it learns alone, before its loss reaches the RQ-VAE."}
    )
    max_adaptive_weight: float = field(default=1e4, metadata={"help": "Bound of the adaptive weight."})

    def __post_init__(self):
        if self.perceptual_weight and not (self.lpips_vgg and self.lpips_heads):
            raise ValueError(
                f"--perceptual_weight {self.perceptual_weight} needs --lpips_vgg, the ImageNet weights of VGG16 "
                "(vgg16-397923af.pth of torchvision), and --lpips_heads, vgg.pth of LPIPS v0.1; "
                "--perceptual_weight 0 trains without"
            )


@dataclass
class ValidationArguments:
    _argument_group_name = "validation"

    validation_split: str | None = field(
        default=None, metadata={"help": "Split of the same data set for PSNR, LPIPS and codebook usage."}
    )
    validation_files: str | None = field(default=None, metadata={"help": "Or files for it, like --data_files."})
    validation_images: int = field(default=1000, metadata={"help": "Its first images; every --image_logging_steps."})

    def __post_init__(self):
        if self.validation_split and self.validation_files:
            raise ValueError(
                "give at most one of --validation_split and --validation_files, "
                f"got {self.validation_split!r} and {self.validation_files!r}"
            )


def validation_batches(
    args: ValidationArguments, data: DataArguments, collate: Collator, batch_size: int
) -> list[torch.Tensor]:
    """Pixels `(B, 3, height, width)` of the validation images, batch by batch; none if not asked for."""
    if args.validation_files:
        data = replace(data, dataset_name=None, data_files=args.validation_files)
    elif args.validation_split:
        data = replace(data, split=args.validation_split)
    else:
        return []
    examples = list(itertools.islice(load_images(data), args.validation_images))
    plain = copy.copy(collate)
    plain.random_flip = False
    return list(plain(examples)["pixels"].split(batch_size))


def create_model(args: RQVAEArguments) -> RQVAEModel:
    attention = [level in args.attention_levels for level in range(len(args.block_out_channels))]
    return RQVAEModel(
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


@torch.no_grad()
def initialize_codebook(model: RQVAEModel, batches: Iterable[torch.Tensor]) -> None:
    """k-means on the features that the new encoder finds in batches of pixels."""
    vectors = [model.latents_to_vectors(model.encode(pixels.to(model.device)).latents) for pixels in batches]
    model.quantizer.initialize(torch.cat(vectors))


class RQVAELoss:
    """(model, batch) -> loss and metrics (section 3.1.3): reconstruction + β · commitment, and what is asked for of
    the codebook loss, LPIPS and the adversary's."""

    def __init__(self, args: LossArguments, model: RQVAEModel, lpips: LPIPS | None, adversary: Adversary | None):
        self.args = args
        self.lpips = lpips
        self.adversary = adversary
        self.last_layer = model.decoder.conv_out.weight
        self.codebook_size = model.config.codebook_size

    def __call__(self, model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pixels = batch["pixels"]
        output = model(pixels)
        sample = output.sample.float()
        distance = F.mse_loss if self.args.reconstruction_loss == "mse" else F.l1_loss
        reconstruction = distance(sample, pixels)
        metrics = {"loss_reconstruction": reconstruction, "loss_commitment": output.commitment_loss}
        if self.lpips is not None:
            metrics["loss_perceptual"] = self.lpips(sample, pixels).mean()
            reconstruction = reconstruction + self.args.perceptual_weight * metrics["loss_perceptual"]
        loss = reconstruction + self.args.commitment_weight * output.commitment_loss
        if output.codebook_loss is not None:
            loss = loss + output.codebook_loss
        if self.adversary is not None:
            generator_loss, more = self.adversary.generator_loss(pixels, sample, reconstruction, self.last_layer)
            loss, metrics = loss + generator_loss, metrics | more
        metrics["psnr"] = psnr(pixels, sample.detach()).mean()
        health = codebook_health(count_codes(output.codes, self.codebook_size))
        for d, (usage, perplexity) in enumerate(zip(health["usage"], health["perplexity"]), start=1):
            metrics[f"batch_usage_depth_{d}"] = usage
            metrics[f"batch_perplexity_depth_{d}"] = perplexity
        return loss, metrics


def reconstructions(model: RQVAEModel, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pictures, and after them their reconstructions from the first code alone to all of them, coarse to fine."""
    with torch.no_grad():
        codes = model.get_codes(pixels.to(model.device))
        samples = [model.decode_codes(codes, depth=d).sample.cpu() for d in range(1, model.config.depth + 1)]
    return {"reconstructions": torch.cat([pixels, *samples]) / 2 + 0.5}


@torch.no_grad()
def validation_metrics(model: RQVAEModel, batches: list[torch.Tensor], lpips: LPIPS | None) -> dict[str, float]:
    """PSNR, LPIPS if there is one, and for every depth usage and perplexity, on batches of pixels."""
    quality, distances, counts = [], [], 0
    for pixels in batches:
        pixels = pixels.to(model.device)
        output = model(pixels)
        quality.append(psnr(pixels, output.sample))
        if lpips is not None:
            distances.append(lpips(output.sample.clamp(-1, 1), pixels))
        counts = counts + count_codes(output.codes, model.config.codebook_size)
    metrics = {"psnr": torch.cat(quality).mean().item()}
    if lpips is not None:
        metrics["lpips"] = torch.cat(distances).mean().item()
    return metrics | health_metrics(counts)


def health_metrics(counts: torch.Tensor) -> dict[str, float]:
    """Usage and perplexity of every depth from `counts` `(D, K)`."""
    health = codebook_health(counts)
    return {
        f"{name}_depth_{d}": value.item()
        for name in ("usage", "perplexity")
        for d, value in enumerate(health[name], start=1)
    }


def model_card(args: RQVAEArguments, model: RQVAEModel) -> str:
    height, width = (args.resolution // pixels for pixels in model.pixels_per_code)
    return (
        "---\nlibrary_name: rq_hf\ntags:\n- rq-vae\n- image-tokenizer\n---\n\n"
        f"# RQ-VAE {args.resolution}² → {height}×{width}×{args.depth}, {args.codebook_size} codewords\n\n"
        "```python\nfrom rq_hf import RQVAEModel\n\nvae = RQVAEModel.from_pretrained(...)\n"
        "codes = vae.get_codes(pixels)  # (B, 3, height, width) in [-1, 1] -> (B, H, W, D)\n"
        "pixels = vae.decode_codes(codes).sample\n```\n"
    )


def create_adversary(args: LossArguments, optimization: OptimizationArguments, in_channels: int) -> Adversary | None:
    if not args.discriminator_weight:
        return None
    return Adversary(
        PatchDiscriminator(
            in_channels, args.discriminator_width, args.discriminator_layers, norm=args.discriminator_norm
        ),
        loss=args.discriminator_loss,
        weight=args.discriminator_weight,
        start=args.discriminator_start,
        warmup_steps=args.discriminator_warmup_steps,
        max_adaptive_weight=args.max_adaptive_weight,
        optimizer_kwargs={
            "lr": optimization.learning_rate,
            "betas": (optimization.adam_beta1, optimization.adam_beta2),
        },
        create_scheduler=functools.partial(create_scheduler, args=optimization),
    )


def main() -> None:
    optimization, data, args, losses, validation = parse_arguments(
        OptimizationArguments,
        DataArguments,
        RQVAEArguments,
        LossArguments,
        ValidationArguments,
        description=__doc__,
        learning_rate=4e-5,
        lr_scheduler="constant",
        adam_beta1=0.5,
        adam_beta2=0.9,
        weight_decay=0.0,
    )
    accelerator = create_accelerator(optimization)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "an RQ-VAE is trained with plain data parallelism (--multi_gpu), "
            f"got {accelerator.distributed_type.value}: sharded or in bf16 its codebook would lose its moving average"
        )
    model = create_model(args)
    if any(args.resolution % pixels for pixels in model.pixels_per_code):
        raise ValueError(f"--resolution must be divisible by {max(model.pixels_per_code)}, got {args.resolution}")
    if optimization.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    lpips = None
    if losses.perceptual_weight:
        lpips = LPIPS.from_pretrained(losses.lpips_vgg, losses.lpips_heads).to(accelerator.device)
    adversary = create_adversary(losses, optimization, model.config.in_channels)

    dataset = load_images(data)
    collate = Collator(
        data.image_column,
        args.resolution,
        data.random_flip,
        data.skip_corrupt_images,
        center_crop=data.center_crop,
    )
    stream = create_stream(accelerator, dataset, collate, optimization, data)
    held_out = validation_batches(validation, data, collate, optimization.train_batch_size)
    shown = held_out[0] if held_out else collate(list(itertools.islice(dataset, 16)))["pixels"]
    if args.codebook_init == "k-means":
        pixels = collate(list(itertools.islice(dataset, args.codebook_init_images)))["pixels"]
        initialize_codebook(model.to(accelerator.device), pixels.split(optimization.train_batch_size))

    train(
        accelerator,
        optimization,
        model,
        stream,
        compute_loss=RQVAELoss(losses, model, lpips, adversary),
        make_images=lambda: reconstructions(model, shown[:16]),
        configuration=flat_configuration(optimization, data, args, losses, validation),
        codes_per_image=args.depth * math.prod(args.resolution // pixels for pixels in model.pixels_per_code),
        adversary=adversary,
        validate=functools.partial(validation_metrics, model, held_out, lpips) if held_out else None,
    )
    destination = Path(optimization.output_dir) / "rqvae"
    save_finished(accelerator, model, destination, optimization, model_card(args, model))
    accelerator.print(f"saved {destination}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
