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

import datasets
import numpy as np
import torch
from diffusers import DiffusionPipeline

from rq_hf import EMOJI_MODEL, MARPipeline, RQPipeline
from rq_hf.metrics import codebook_usage, count_codes, psnr


def load_split(path: Path) -> tuple[list[str], torch.Tensor]:
    """Captions and images `(N, 3, 64, 64)` in [0, 1] of a parquet file."""
    data = datasets.load_dataset("parquet", data_files=str(path), split="train")
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in data["image"]])
    return list(data["text"]), torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def reconstruction(pipe: RQPipeline | MARPipeline, images: torch.Tensor) -> float:
    """Mean PSNR in dB."""
    quality = [psnr(batch * 2 - 1, pipe.reconstruct(batch, output_type="pt") * 2 - 1) for batch in images.split(64)]
    return torch.cat(quality).mean().item()


def usage(pipe: RQPipeline, images: torch.Tensor) -> dict[str, list[float]]:
    """Usage and perplexity of the codebook at each depth."""
    counts = sum(count_codes(pipe.encode_image(batch), pipe.vae.config.codebook_size) for batch in images.split(64))
    return {f"{name}_per_depth": value.tolist() for name, value in codebook_usage(counts).items()}


def retrieval_ranks(
    pipe: RQPipeline | MARPipeline,
    captions: list[str],
    expected: torch.Tensor,
    candidates: torch.Tensor,
    seed: int,
    **sampling,
) -> torch.Tensor:
    """Ranks `(len(captions),)` from 1 of the expected images among the candidates, by distance to the sampled ones."""
    generator = torch.Generator().manual_seed(seed)
    ranks = []
    for start in range(0, len(captions), 64):
        rows = slice(start, start + 64)
        sampled = pipe(captions[rows], generator=generator, output_type="pt", **sampling).images
        distances = torch.cdist(sampled.flatten(1), candidates.flatten(1))
        expected_distance = torch.linalg.vector_norm((sampled - expected[rows]).flatten(1), dim=1)
        # With a tolerance, because cdist and vector_norm round differently.
        ranks.append(1 + (distances < expected_distance[:, None] * (1 - 1e-4)).sum(dim=1))
    return torch.cat(ranks)


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
    train_captions, train_images = load_split(args.data / "train.parquet")
    held_captions, held_images = load_split(args.data / "held_out.parquet")
    candidates = torch.cat([train_images, held_images])

    chosen = torch.randperm(len(train_captions), generator=torch.Generator().manual_seed(args.seed))[: args.captions]
    train_ranks = retrieval_ranks(
        pipe, [train_captions[i] for i in chosen], train_images[chosen], candidates, args.seed, **sampling
    )
    held_ranks = retrieval_ranks(pipe, held_captions, held_images, candidates, args.seed, **sampling)

    figures = {
        "sampling": sampling,
        "seed": args.seed,
        "psnr_train": reconstruction(pipe, train_images),
        "psnr_held_out": reconstruction(pipe, held_images),
        **(usage(pipe, train_images) if isinstance(pipe, RQPipeline) else {}),
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
