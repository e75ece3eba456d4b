"""
Does residual quantization hold what the paper promises? Its claim in small, on CIFAR-10 (section 3.1, figure 3).

    python benchmarks/rate_distortion.py --data_files 'cifar10/train-*.parquet' --output_dir runs/rate-distortion

One encoder and decoder, 32×32 pictures as 8×8 maps, equal epochs. K = 512 codewords at depth D = 1, 2, 4, 8; D = 1
with ever more codewords; D = 4 with a codebook per depth; and D = 4 with quantizer dropout, of which the first codes
alone are decoded, too. The last 10,000 pictures are for validation. Every finished run leaves a folder with its
results and is not repeated.

Distortion is PSNR, and the Fréchet distance between features of the pictures and of their reconstructions: the 128
pooled features of a small convolutional network, trained here to tell the ten classes. The plot needs matplotlib
(`pip install 'rq_hf[benchmarks]'`).
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import load_dataset
from torch import nn

from rq_hf import RQVAEModel
from rq_hf.metrics import codebook_health, count_codes, frechet_distance, psnr

VALIDATION = 10_000
RUNS = {  # name: arguments of the model
    "D=1 K=512": {"depth": 1, "codebook_size": 512},
    "D=2 K=512": {"depth": 2, "codebook_size": 512},
    "D=4 K=512": {"depth": 4, "codebook_size": 512},
    "D=8 K=512": {"depth": 8, "codebook_size": 512},
    "D=1 K=4096": {"depth": 1, "codebook_size": 4096},
    "D=1 K=32768": {"depth": 1, "codebook_size": 32768},
    "D=4 K=512 per depth": {"depth": 4, "codebook_size": 512, "shared_codebook": False},
    "D=4 K=512 quantizer dropout": {"depth": 4, "codebook_size": 512, "quantizer_dropout": 1.0},
}


def load_pixels(pattern: str) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Pictures `(N, 3, 32, 32)` uint8 and their classes `(N,)`, for training and for validation."""
    dataset = load_dataset("parquet", data_files=pattern, split="train")
    images = np.stack([np.asarray(image.convert("RGB")) for image in dataset["img"]])
    pictures, labels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset["label"])
    return (pictures[:-VALIDATION], labels[:-VALIDATION]), (pictures[-VALIDATION:], labels[-VALIDATION:])


def batches(pictures: torch.Tensor, labels: torch.Tensor, batch_size: int, epoch: int):
    """Shuffled, half of them mirrored, in [-1, 1]."""
    generator = torch.Generator().manual_seed(epoch)
    for rows in torch.randperm(len(pictures), generator=generator).split(batch_size):
        pixels = pictures[rows].float() / 127.5 - 1
        mirrored = torch.rand(len(rows), generator=generator) < 0.5
        pixels[mirrored] = pixels[mirrored].flip(-1)
        yield pixels, labels[rows]


def fit(model: nn.Module, loss_of, pictures, labels, epochs: int, batch_size: int, learning_rate: float) -> float:
    """AdamW, warm-up of 100 steps, cosine to zero, bf16 arithmetic. Returns the seconds it took."""
    steps = epochs * math.ceil(len(pictures) / batch_size)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    started = time.perf_counter()
    model.train()
    for epoch in range(epochs):
        for pixels, classes in batches(pictures, labels, batch_size, epoch):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, pixels, classes)
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


class FeatureNetwork(nn.Module):
    """Pictures `(B, 3, 32, 32)` in [-1, 1] -> 128 pooled features -> logits of ten classes."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=1 + (i > 0), padding=1), nn.BatchNorm2d(b), nn.ReLU())
                for i, (a, b) in enumerate(zip(widths, widths[1:]))
            )
        )
        self.classifier = nn.Linear(widths[-1], 10)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.blocks(pixels).mean(dim=(2, 3))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(pixels))


def feature_network(path: Path, train, validation) -> FeatureNetwork:
    """The trained network; trains it on the first call."""
    network = FeatureNetwork()
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval()
    torch.manual_seed(0)
    fit(
        network,
        lambda model, x, y: F.cross_entropy(model(x).float(), y),
        *train,
        epochs=8,
        batch_size=128,
        learning_rate=2e-3,
    )
    pictures, labels = validation
    right = sum((network(x / 127.5 - 1).argmax(-1) == y).sum() for x, y in zip(pictures.split(500), labels.split(500)))
    print(f"feature network: {right / len(labels):.1%} of the validation pictures classified right", flush=True)
    torch.save(network.state_dict(), path)
    return network


def create_model(**overrides) -> RQVAEModel:
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


def rqvae_loss(model: RQVAEModel, pixels: torch.Tensor, _) -> torch.Tensor:
    output = model(pixels)
    return F.mse_loss(output.sample.float(), pixels) + 0.25 * output.commitment_loss


@torch.no_grad()
def evaluate(model: RQVAEModel, network: FeatureNetwork, pictures: torch.Tensor) -> dict:
    """PSNR and Fréchet distance of the reconstructions from the first d codes, and usage, of every depth."""
    depths = range(1, model.config.depth + 1)
    quality, features, real, counts = {d: [] for d in depths}, {d: [] for d in depths}, [], 0
    for pixels in pictures.split(500):
        pixels = pixels.float() / 127.5 - 1
        codes = model.get_codes(pixels)
        counts = counts + count_codes(codes, model.config.codebook_size)
        real.append(network.features(pixels))
        for d in depths:
            sample = model.decode_codes(codes, depth=d).sample.clamp(-1, 1)
            quality[d].append(psnr(pixels, sample))
            features[d].append(network.features(sample))
    health = codebook_health(counts)
    return {
        "psnr": [torch.cat(quality[d]).mean().item() for d in depths],
        "frechet_distance": [frechet_distance(torch.cat(real), torch.cat(features[d])) for d in depths],
        "usage": health["usage"].tolist(),
        "perplexity": health["perplexity"].tolist(),
    }


def plot(results: list[dict], positions: int, path: Path) -> None:
    """PSNR and Fréchet distance over the bits of a picture's code map."""
    import matplotlib.pyplot as plt

    found = {result["name"]: result for result in results}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    curves = {
        "D = 1, 2, 4, 8 codes of 512": [found[f"D={depth} K=512"] for depth in (1, 2, 4, 8)],
        "1 code of 512, 4096, 32768": [found[f"D=1 K={size}"] for size in (512, 4096, 32768)],
    }
    for axis, measure in zip(axes, ("psnr", "frechet_distance")):
        for label, runs in curves.items():
            bits = [positions * run["depth"] * math.log2(run["codebook_size"]) for run in runs]
            axis.plot(bits, [run[measure][-1] for run in runs], "o-", label=label)
        dropout = found["D=4 K=512 quantizer dropout"]
        bits = [positions * d * math.log2(dropout["codebook_size"]) for d in range(1, dropout["depth"] + 1)]
        axis.plot(bits, dropout[measure], "x--", label="first codes of one model with quantizer dropout")
        axis.set_xlabel("bits per picture")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("PSNR (dB)")
    axes[1].set_ylabel("Fréchet distance")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_files", required=True, help="parquet files with the columns img and label")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help=f"of {list(RUNS)}")
    parser.add_argument("--plot", type=Path, help="PNG file to plot to, when all runs are finished")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    train, validation = load_pixels(args.data_files)
    network = feature_network(args.output_dir / "features.pt", train, validation)
    finished = []
    for name in args.runs:
        overrides = RUNS[name]
        folder = args.output_dir / name.replace(" ", "-")
        if not (folder / "results.json").exists():
            print(name, flush=True)
            torch.manual_seed(0)
            model = create_model(**overrides)
            seconds = fit(model, rqvae_loss, *train, args.epochs, args.batch_size, args.learning_rate)
            model.save_pretrained(folder)
            results = {"name": name, **overrides, "epochs": args.epochs, "seconds": seconds}
            results |= evaluate(model, network, validation[0])
            (folder / "results.json").write_text(json.dumps(results, indent=2))
        finished.append(json.loads((folder / "results.json").read_text()))
        print(finished[-1], flush=True)
    if args.plot:
        plot(finished, positions=8 * 8, path=args.plot)


if __name__ == "__main__":
    main()
