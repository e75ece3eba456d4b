"""
Does residual quantization keep its promise? The paper's claim on a small scale, on CIFAR-10 (section 3.1, figure 3).

    python benchmarks/rate_distortion.py --data_files 'cifar10/train-*.parquet' --output_dir runs/rate-distortion

One encoder and decoder, 32×32 images as 8×8 maps, equal epochs. K = 512 codewords at depth D = 1, 2, 4, 8; D = 1
with ever more codewords; D = 4 with a codebook per depth; and D = 4 with quantizer dropout, whose first codes alone
are decoded as well. The last 10,000 images are for validation. Every finished run leaves a folder with its
results and is not repeated.

Distortion is PSNR, and the Fréchet distance (cifar10-small) between the images and their reconstructions, as by
`examples/evaluate_reconstruction.py --all_depths`. The plot needs matplotlib (`pip install 'rq_hf[benchmarks]'`).
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar10 import create_rqvae, fit, load_pixels

from rq_hf import RQVAEModel
from rq_hf.evaluation.reconstruction import ReconstructionMeter
from rq_hf.metrics.feature_networks import FeatureNetwork, load_feature_network

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


def rqvae_loss(model: RQVAEModel, pixels: torch.Tensor, _) -> torch.Tensor:
    output = model(pixels)
    return F.mse_loss(output.sample.float(), pixels) + 0.25 * output.commitment_loss


def evaluate(model: RQVAEModel, network: FeatureNetwork, images: torch.Tensor) -> dict:
    """PSNR and Fréchet distance of the reconstructions from the first d codes, and usage, of every depth."""
    meter = ReconstructionMeter(model, network, depths=range(1, model.config.depth + 1))
    for batch in images.split(500):
        meter.add(meter.measure(batch.float() / 127.5 - 1))
    result = meter.result()
    return {
        "network": network.identity(),
        "psnr": [quality["psnr"] for quality in result["depths"].values()],
        "frechet_distance": [quality["frechet_distance"] for quality in result["depths"].values()],
        "usage": result["usage"],
        "perplexity": result["perplexity"],
    }


def plot(results: list[dict], positions: int, path: Path) -> None:
    """PSNR and Fréchet distance over the bits of an image's code map."""
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
        axis.set_xlabel("bits per image")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("PSNR (dB)")
    axes[1].set_ylabel("Fréchet distance (cifar10-small)")
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
    network = load_feature_network("cifar10-small")
    finished = []
    for name in args.runs:
        overrides = RUNS[name]
        folder = args.output_dir / name.replace(" ", "-")
        if not (folder / "results.json").exists():
            print(name, flush=True)
            torch.manual_seed(0)
            model = create_rqvae(**overrides)
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
