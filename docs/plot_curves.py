"""Draw the curves of docs/first-training.md: PSNR of stage 1 and cross-entropy of stage 2, from their logs.

python docs/plot_curves.py --rqvae runs/rqvae/log.jsonl --transformer runs/t2i/log.jsonl --output curves.png
"""

import argparse
import json
from pathlib import Path


def read_curves(log: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of every logged number."""
    curves = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        for name in values.keys() - {"step", "arguments"}:
            steps, numbers = curves.setdefault(name, ([], []))
            steps.append(values["step"])
            numbers.append(values[name])
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rqvae", type=Path, required=True, help="log.jsonl of train_rqvae.py")
    parser.add_argument("--transformer", type=Path, required=True, help="log.jsonl of train_t2i.py")
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    args = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    curves = read_curves(args.rqvae)
    left.plot(*curves["psnr"], label="training")
    if "validation/psnr" in curves:
        left.plot(*curves["validation/psnr"], "o-", label="held out")
    left.set(title="stage 1", ylabel="PSNR (dB)", xlabel="step")
    curves = read_curves(args.transformer)
    for name in sorted(name for name in curves if name.startswith("loss_depth_")):
        right.plot(*curves[name], label=f"training, depth {name.removeprefix('loss_depth_')}")
    right.plot(*curves["validation/loss"], "ko-", label="held out, all depths")
    right.set(title="stage 2", ylabel="cross-entropy (nats per code)", xlabel="step", ylim=(0, None))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(args.output, dpi=100)


if __name__ == "__main__":
    main()
