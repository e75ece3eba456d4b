"""Evaluate a text-to-emoji pipeline of either method: reconstruction, codebook usage, and retrieval.

    python examples/emoji/evaluate.py --data data/emoji --output runs/emoji-figures.json
    python examples/emoji/evaluate.py --model src/rq_hf/mar_emoji_model --data data/emoji --guidance_scale 3

Reconstruction: mean over the images of the PSNR of each reconstruction.
Retrieval: one image is sampled for each caption, and all real images are ranked by their L2 distance to it in pixels.
Rank 1 means that no real image is closer than that of the caption (a few captions share one image). Evaluated on 300
training captions and on all held-out captions, whose combinations of words are not in the training split.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from rq_hf import EMOJI_MODEL, MARPipeline, RQPipeline
from rq_hf.data import ImageCollator, load_image_dataset
from rq_hf.evaluation.reconstruction import ReconstructionMeter
from rq_hf.evaluation.retrieval import retrieval_ranks


def load_split(path: Path, resolution: int) -> tuple[list[str], torch.Tensor]:
    """Captions and images `(N, 3, resolution, resolution)` in [0, 1] of a parquet file."""
    dataset = load_image_dataset(data_files=str(path), required_columns=("text",))
    return list(dataset["text"]), ImageCollator("image", resolution)(list(dataset))["pixels"] / 2 + 0.5


def reconstruction(pipe: RQPipeline | MARPipeline, images: torch.Tensor) -> dict:
    """Means of `psnr` in dB and `ssim`, and of an RQ-VAE, `usage` and `perplexity` at each depth."""
    meter = ReconstructionMeter(pipe.vae)
    for batch in images.split(64):
        meter.add(meter.measure(batch * 2 - 1))
    result = meter.result()
    (quality,) = result["depths"].values()
    return quality | {name: result[name] for name in ("usage", "perplexity") if name in result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMOJI_MODEL, help="folder or Hub id of the pipeline")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="folder written by make_dataset.py")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--captions", type=int, default=300, help="number of training captions")
    parser.add_argument("--seed", type=int, default=0, help="seed for the choice of captions and for sampling")
    settings = {"temperature": float, "top_k": int, "top_p": float, "guidance_scale": float, "num_iterations": int}
    for name, kind in settings.items():
        parser.add_argument(f"--{name}", type=kind, help="default: the model's own")
    parser.add_argument(
        "--num_inference_steps", type=int, nargs="+", help="denoising steps: a number, or the first and the last"
    )
    parser.add_argument("--greedy", action="store_true", help="always take the most likely code")
    args = parser.parse_args()
    sampling = {name: getattr(args, name) for name in settings if getattr(args, name) is not None}
    if args.num_inference_steps is not None:
        steps = args.num_inference_steps
        sampling["num_inference_steps"] = steps[0] if len(steps) == 1 else tuple(steps)
    if args.greedy:
        sampling["do_sample"] = False

    pipe = DiffusionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    train_captions, train_images = load_split(args.data / "train.parquet", pipe.vae.config.sample_size)
    held_captions, held_images = load_split(args.data / "held_out.parquet", pipe.vae.config.sample_size)
    candidates = torch.cat([train_images, held_images])

    chosen = torch.randperm(len(train_captions), generator=torch.Generator().manual_seed(args.seed))[: args.captions]
    train_ranks = retrieval_ranks(
        pipe, [train_captions[i] for i in chosen], train_images[chosen], candidates, seed=args.seed, **sampling
    )
    held_ranks = retrieval_ranks(pipe, held_captions, held_images, candidates, seed=args.seed, **sampling)
    reconstructions = {"train": reconstruction(pipe, train_images), "held_out": reconstruction(pipe, held_images)}

    figures = {
        "sampling": sampling,
        "seed": args.seed,
        **{f"{name}_{split}": result[name] for split, result in reconstructions.items() for name in ("psnr", "ssim")},
        **{f"{n}_per_depth": v for n, v in reconstructions["train"].items() if n in ("usage", "perplexity")},
        "candidates": len(candidates),
        "train_captions": len(train_ranks),
        "train_top1": (train_ranks <= 1).float().mean().item(),
        "train_top5": (train_ranks <= 5).float().mean().item(),
        "held_out_captions": len(held_ranks),
        "held_out_top1": (held_ranks <= 1).float().mean().item(),
        "held_out_top5": (held_ranks <= 5).float().mean().item(),
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
