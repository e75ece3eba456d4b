"""
What do fewer denoising steps of a MAR pipeline cost? Samples of a trained text or class model with several settings.

    python benchmarks/mar_steps.py --model src/rq_hf/mar_emoji_model --data_files 'data/emoji/train.parquet' \\
        [--guidance_scale 3] [--num_iterations 16] [--samples 512] [--seeds 3] [--settings '100 steps' '10 steps']

Prompts are those of --samples images, drawn at random; with every seed the same ones for all settings. Printed are,
per image, how many tokens the head denoises, once for each step and, with guidance, for each half; and seconds. And
the Fréchet distance of the samples to all real images, as mean ± standard deviation over the seeds, and relative to
that of the first setting. Its features are latents of the pipeline's own autoencoder, averaged over each quarter of
the image: samples are decoded and encoded again.
"""

import argparse
import time
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from rq_hf import MARPipeline
from rq_hf.data import ImageCollator, load_image_dataset
from rq_hf.metrics import FeatureMoments, frechet_distance

# Below, the first steps of a cosine schedule are all noise.
CLIPPED = {"variance_type": None, "lambda_min_clipped": -5.1}
DPM_SOLVER = partial(DPMSolverMultistepScheduler.from_config, **CLIPPED)
LU = partial(DPM_SOLVER, use_lu_lambdas=True)
UNIPC = UniPCMultistepScheduler.from_config
DDIM = DDIMScheduler.from_config
SETTINGS = {  # name: (scheduler made of the config of the pipeline's, or the pipeline's own; num_inference_steps)
    **{f"{steps} steps": (None, steps) for steps in (100, 50, 25, 15, 10)},
    **{f"{first} to {last} steps": (None, (first, last)) for first, last in ((50, 5), (25, 5), (50, 10))},
    **{f"DPM-Solver++, {steps} steps": (DPM_SOLVER, steps) for steps in (20, 15, 10)},
    **{f"DPM-Solver++ by Lu's spacing, {steps} steps": (LU, steps) for steps in (20, 10)},
    **{f"UniPC, {steps} steps": (UNIPC, steps) for steps in (20, 10)},
    **{f"DDIM, {steps} steps": (DDIM, steps) for steps in (20, 10)},
}


def load(pipe, data_files, text_column, label_column):
    """All images `(N, 3, height, width)` in [0, 1], and their prompts or classes."""
    column = text_column if pipe.is_text_conditional else label_column
    dataset = load_image_dataset(data_files=data_files, required_columns=(column,))
    pixels = ImageCollator("image", pipe.vae.config.sample_size)(list(dataset))["pixels"]
    return pixels / 2 + 0.5, list(dataset[column])


def features(pipe, images):
    """Images `(N, 3, height, width)` in [0, 1] -> `(N, 4·channels)`."""
    latents = torch.cat([pipe.encode_image(part) for part in images.split(64)])
    return F.adaptive_avg_pool2d(latents, 2).flatten(1)


def sample(pipe, conditions, seed, **call):
    """Images `(N, 3, height, width)`, the seconds they took, and the tokens that the head denoised."""
    tokens, denoise = 0, pipe.transformer.head.denoise

    def counting(inputs, modulations):
        nonlocal tokens
        tokens += modulations[0][..., 0].numel()
        return denoise(inputs, modulations)

    name = "prompt" if pipe.is_text_conditional else "class_labels"
    seeds = [seed * len(conditions) + i for i in range(len(conditions))]
    started = time.perf_counter()
    with patch.object(pipe.transformer.head, "denoise", counting):
        images = pipe(**{name: conditions}, generator=seeds, max_batch_size=64, output_type="pt", **call).images
    return images, time.perf_counter() - started, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a MAR pipeline")
    parser.add_argument("--data_files", required=True, help="files of real images with their captions or classes")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--num_iterations", type=int, default=16)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    args = parser.parse_args()

    pipe = MARPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.compile()
    own_scheduler = pipe.scheduler
    images, conditions = load(pipe, args.data_files, args.text_column, args.label_column)
    real, reference = FeatureMoments.of(features(pipe, images)), None
    call = {"guidance_scale": args.guidance_scale, "num_iterations": args.num_iterations}
    print("| setting | tokens × steps | s/image | Fréchet distance | relative |\n" + "|---" * 5 + "|")
    for name in args.settings:
        make_scheduler, steps = SETTINGS[name]
        pipe.scheduler = make_scheduler(own_scheduler.config) if make_scheduler else own_scheduler
        distances, seconds, tokens = [], [], []
        for seed in range(args.seeds):
            generator = torch.Generator().manual_seed(seed)
            rows = torch.randint(len(conditions), (args.samples,), generator=generator).tolist()
            drawn = [conditions[row] for row in rows]
            sampled, took, count = sample(pipe, drawn, seed, num_inference_steps=steps, **call)
            distances.append(frechet_distance(real, FeatureMoments.of(features(pipe, sampled))))
            seconds.append(took)
            tokens.append(count)
        distance, spread = torch.tensor(distances).mean().item(), torch.tensor(distances).std().item()
        reference = reference or distance
        print(
            f"| {name} | {tokens[0] / args.samples:.0f} | {min(seconds) / args.samples:.3f} "
            f"| {distance:.3f} ± {spread:.3f} | {distance / reference:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
