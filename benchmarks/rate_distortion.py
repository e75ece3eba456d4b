"""
Does residual quantization keep its promise? The paper's claim on a small scale, on CIFAR-10 (section 3.1, figure 3).

    python benchmarks/rate_distortion.py --data_files 'cifar10/train-*.parquet' --output_dir runs/rate-distortion

One encoder and decoder, 32×32 images as 8×8 maps, equal epochs. K = 512 codewords at depth D = 1, 2, 4, 8; D = 1
with ever more codewords; D = 4 with a codebook per depth; and D = 4 with quantizer dropout, whose first codes alone
are decoded as well. The last 10,000 images are for validation. Each of the --seeds decides the initial weights and the
order of the images. Every finished run leaves a folder with its results and is not repeated; the table has means and
sample deviations over the seeds.

Distortion is PSNR, and the Fréchet distance (cifar10-small) between the images and their reconstructions, as by
`examples/evaluate_reconstruction.py --all_depths`. The plot needs matplotlib (`pip install 'rq_hf[benchmarks]'`).
"""

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar10 import create_rqvae, fit, load_pixels

from rq_hf import RQVAEModel
from rq_hf.evaluation.reconstruction import ReconstructionMeter
from rq_hf.files import atomic_file, atomic_folder
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

POSITIONS = 8 * 8


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


def mean_and_deviation(runs: list[dict], measure: str, depth: int) -> tuple[float, float]:
    """Over the seeds, of the reconstructions from the first `depth` codes."""
    values = [run[measure][depth - 1] for run in runs]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def table(results: dict[str, list[dict]]) -> str:
    columns = ["run", "first codes", "bits per image", "PSNR (dB)", "Fréchet distance", "usage per depth (%)"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, runs in results.items():
        depth = runs[0]["depth"]
        for d in range(1, depth + 1) if "quantizer_dropout" in runs[0] else [depth]:
            figures = (
                "{:.2f} ± {:.2f}".format(*mean_and_deviation(runs, measure, d))
                for measure in ("psnr", "frechet_distance")
            )
            usages = zip(*(run["usage"] for run in runs))
            usage = " / ".join(f"{100 * statistics.mean(values):.0f}" for values in usages)
            lines.append(f"| {name} | {d} | {bits(runs[0], d):.0f} | {' | '.join(figures)} | {usage} |")
    return "\n".join(lines)


def bits(run: dict, depth: int) -> float:
    """Of an image's code map of the first `depth` codes."""
    return POSITIONS * depth * math.log2(run["codebook_size"])


def plot(results: dict[str, list[dict]], path: Path) -> None:
    """PSNR and Fréchet distance over the bits of an image's code map, with deviations over the seeds."""
    import matplotlib.pyplot as plt

    dropout = "D=4 K=512 quantizer dropout"
    curves = {  # label: (run, first codes)
        "D = 1, 2, 4, 8 codes of 512": [(f"D={depth} K=512", depth) for depth in (1, 2, 4, 8)],
        "1 code of 512, 4096, 32768": [(f"D=1 K={size}", 1) for size in (512, 4096, 32768)],
        "first codes of one model with quantizer dropout": [(dropout, depth) for depth in (1, 2, 3, 4)],
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, measure in zip(axes, ("psnr", "frechet_distance")):
        for (label, points), style in zip(curves.items(), ("o-", "o-", "x--")):
            means, deviations = zip(*(mean_and_deviation(results[name], measure, depth) for name, depth in points))
            x = [bits(results[name][0], depth) for name, depth in points]
            axis.errorbar(x, means, deviations, fmt=style, capsize=3, label=label)
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plot", type=Path, help="PNG file to plot to, when all runs are finished")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()

    train, validation = load_pixels(args.data_files)
    network = load_feature_network("cifar10-small")
    recipe = {"epochs": args.epochs, "batch_size": args.batch_size, "learning_rate": args.learning_rate}
    results = {name: [] for name in args.runs}
    for seed, name in itertools.product(args.seeds, args.runs):
        folder = args.output_dir / name.replace(" ", "-") / f"seed-{seed}"
        if not (folder / "model").exists():
            print(name, "seed", seed, flush=True)
            torch.manual_seed(seed)
            model = create_rqvae(**RUNS[name])
            seconds = fit(model, rqvae_loss, *train, **recipe, seed=seed)
            with atomic_folder(folder / "model") as new:
                model.save_pretrained(new)
                (new / "training.json").write_text(json.dumps({**RUNS[name], **recipe, "seconds": seconds}))
        if not (folder / "results.json").exists():
            model = RQVAEModel.from_pretrained(folder / "model")
            found = json.loads((folder / "model" / "training.json").read_text())
            found |= evaluate(model, network, validation[0])
            with atomic_file(folder / "results.json") as file:
                file.write_text(json.dumps(found, indent=2))
        results[name].append(json.loads((folder / "results.json").read_text()))
    print(table(results))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
