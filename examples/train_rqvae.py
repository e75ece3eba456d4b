"""Train an RQ-VAE (stage 1) on any image data set.

One process:
    accelerate launch examples/train_rqvae.py --dataset_name user/pictures --resolution 64 --output_dir runs/rqvae
Eight GPUs, bf16:
    accelerate launch --multi_gpu --num_processes 8 examples/train_rqvae.py --mixed_precision bf16 ...
Two processes on a CPU:
    torchrun --nproc_per_node 2 examples/train_rqvae.py --cpu ...
Local files, read as a stream:
    accelerate launch examples/train_rqvae.py --data_files 'data/*.parquet' --streaming ...
Go on after an interruption:
    ... --resume_from_checkpoint latest

The finished model is OUTPUT_DIR/rqvae: RQVAEModel.from_pretrained("OUTPUT_DIR/rqvae").
Reconstruction loss (L1 or squared error) and commitment loss; the codebook follows by moving average.
"""

import functools
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from rq_hf import RQVAEModel
from rq_hf.data import Collator, DataArguments, load_images
from rq_hf.models.quantizer import codebook_health, count_codes
from rq_hf.training import (
    OptimizationArguments,
    create_accelerator,
    create_stream,
    flat_configuration,
    parse_arguments,
    save_finished,
    train,
)


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
    reconstruction_loss: str = field(
        default="mse", metadata={"help": "Squared error or L1.", "choices": ["mse", "l1"]}
    )
    commitment_weight: float = field(default=0.25, metadata={"help": "Weight β of the commitment loss."})


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
        sample_size=args.resolution,
    )


def compute_loss(model, batch: dict, args: RQVAEArguments) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Reconstruction loss + β · commitment loss (section 3.1.3), plus the codebook loss if there is one."""
    pixels = batch["pixels"]
    output = model(pixels)
    sample = output.sample.float()
    squared_error = F.mse_loss(sample, pixels)
    reconstruction = squared_error if args.reconstruction_loss == "mse" else F.l1_loss(sample, pixels)
    loss = reconstruction + args.commitment_weight * output.commitment_loss
    if output.codebook_loss is not None:
        loss = loss + output.codebook_loss
    metrics = {
        "loss_reconstruction": reconstruction,
        "loss_commitment": output.commitment_loss,
        "psnr": 10 * torch.log10(4 / squared_error.detach()),  # pixels span [-1, 1]
    }
    health = codebook_health(count_codes(output.codes, args.codebook_size))
    for d in range(args.depth):
        metrics[f"batch_usage_depth_{d + 1}"] = health["usage"][d]
        metrics[f"batch_perplexity_depth_{d + 1}"] = health["perplexity"][d]
    return loss, metrics


def reconstructions(model: RQVAEModel, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pictures, and their reconstructions after them."""
    with torch.no_grad():
        sample = model(pixels.to(model.device)).sample.cpu()
    return {"reconstructions": torch.cat([pixels, sample]) / 2 + 0.5}


def model_card(args: RQVAEArguments, model: RQVAEModel) -> str:
    height, width = (args.resolution // pixels for pixels in model.pixels_per_code)
    return (
        "---\nlibrary_name: rq_hf\ntags:\n- rq-vae\n- image-tokenizer\n---\n\n"
        f"# RQ-VAE {args.resolution}² → {height}×{width}×{args.depth}, {args.codebook_size} codewords\n\n"
        "```python\nfrom rq_hf import RQVAEModel\n\nvae = RQVAEModel.from_pretrained(...)\n"
        "codes = vae.get_codes(pixels)  # (B, 3, height, width) in [-1, 1] -> (B, H, W, D)\n"
        "pixels = vae.decode_codes(codes).sample\n```\n"
    )


def main() -> None:
    optimization, data, args = parse_arguments(
        OptimizationArguments, DataArguments, RQVAEArguments, description=__doc__
    )
    accelerator = create_accelerator(optimization)
    model = create_model(args)
    if any(args.resolution % pixels for pixels in model.pixels_per_code):
        raise ValueError(f"--resolution must be divisible by {max(model.pixels_per_code)}, got {args.resolution}")
    if optimization.gradient_checkpointing:
        model.enable_gradient_checkpointing()

    dataset = load_images(data)
    collate = Collator(
        data.image_column,
        args.resolution,
        data.random_flip,
        data.skip_corrupt_images,
        center_crop=data.center_crop,
    )
    stream = create_stream(accelerator, dataset, collate, optimization, data)
    shown = collate(list(itertools.islice(dataset, 16)))["pixels"]

    train(
        accelerator,
        optimization,
        model,
        stream,
        compute_loss=functools.partial(compute_loss, args=args),
        make_images=lambda: reconstructions(model, shown),
        configuration=flat_configuration(optimization, data, args),
    )
    destination = Path(optimization.output_dir) / "rqvae"
    save_finished(accelerator, model, destination, optimization, model_card(args, model))
    accelerator.print(f"saved {destination}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
