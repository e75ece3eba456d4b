"""What the benchmarks on CIFAR-10 share: the data, a training loop and the RQ-VAE."""

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from datasets import load_dataset
from torch import nn

from rq_hf import RQVAEModel

VALIDATION = 10_000


def load_pixels(pattern: str) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Images `(N, 3, 32, 32)` uint8 and their classes `(N,)`, for training and for validation."""
    dataset = load_dataset("parquet", data_files=pattern, split="train")
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in dataset["img"]])
    images, labels = torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset["label"])
    return (images[:-VALIDATION], labels[:-VALIDATION]), (images[-VALIDATION:], labels[-VALIDATION:])


def batches(
    images: torch.Tensor, labels: torch.Tensor, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pixels in [-1, 1] and classes: shuffled, and half of the images mirrored."""
    for rows in torch.randperm(len(images), generator=generator).split(batch_size):
        pixels = images[rows].float() / 127.5 - 1
        mirrored = torch.rand(len(rows), generator=generator) < 0.5
        pixels[mirrored] = pixels[mirrored].flip(-1)
        yield pixels, labels[rows]


def fit(
    model: nn.Module,
    compute_loss: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> float:
    """Trains with AdamW, a warm-up of 100 steps, a cosine to zero and bf16 arithmetic; returns the seconds it took.
    `seed` decides the order of the images and which are mirrored."""
    steps = epochs * math.ceil(len(images) / batch_size)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    generator = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    model.train()
    for epoch in range(epochs):
        for pixels, classes in batches(images, labels, batch_size, generator):
            with torch.autocast("cpu", torch.bfloat16):
                loss = compute_loss(model, pixels, classes)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        print(
            f"  epoch {epoch + 1}/{epochs}: loss {loss.item():.4f}, {time.perf_counter() - started:.0f} s", flush=True
        )
    model.eval()
    return time.perf_counter() - started


def create_rqvae(**overrides) -> RQVAEModel:
    """A new RQ-VAE of 32×32 images as 8×8 maps."""
    widths = (16, 32, 64)
    return RQVAEModel(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        mid_block_add_attention=False,
        norm_num_groups=8,
        latent_channels=64,
        codebook_dim=64,
        sample_size=32,
        **overrides,
    )
