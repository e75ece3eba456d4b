"""
Training stage 2 on latents against training it on images, with CIFAR-10 (a few minutes, on a CPU).

    python benchmarks/latents.py --data_files 'cifar10/train-00000-*.parquet'

Whole training steps of a small transformer: read a batch of 64, decode and encode it or not, sample codes, loss with
soft labels, backward, AdamW; in float32, on one thread. The RQ-VAE is that of rate_distortion.py (4×4×4, K = 512)
with random weights: speed does not depend on them. Time is the least of interleaved repeats. What is saved is decoding
and encoding; how much of a step that is depends on the sizes of RQ-VAE and transformer.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from cifar10 import create_rqvae
from measure import least_seconds

from rq_hf import RQVAEModel
from rq_hf.data import (
    ImageCollator,
    LatentCollator,
    TrainingStream,
    load_image_dataset,
    load_latents,
    stored_shape,
)
from rq_hf.training import RQTransformerLoss, create_transformer

EXTRACT = Path(__file__).parents[1] / "examples" / "extract_latents.py"
BATCH_SIZE = 64
TRANSFORMER = {
    "hidden_size": 128,
    "spatial_layers": 4,
    "depth_layers": 2,
    "num_attention_heads": 4,
    "cond_vocab_size": 11,
    "null_cond_id": 10,
}


def make_steps(vae: RQVAEModel, dataset, collate: Callable, steps: int) -> Callable:
    """A function that makes `steps` training steps of a new transformer, continuing where it stopped."""
    batches = iter(TrainingStream(dataset, collate, BATCH_SIZE, seed=0))
    torch.manual_seed(0)
    transformer = create_transformer(vae, **TRANSFORMER).train()
    compute_loss = RQTransformerLoss(vae, null_cond_id=transformer.config.null_cond_id)
    optimizer = torch.optim.AdamW(transformer.parameters())

    def run():
        for batch in itertools.islice(batches, steps):
            compute_loss(transformer, batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_files", required=True, help="parquet files with the columns img and label")
    parser.add_argument("--steps", type=int, default=3, help="training steps per repeat")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        create_rqvae(codebook_size=512, depth=4).save_pretrained(Path(folder, "rqvae"))
        source = ["--data_files", args.data_files, "--image_column", "img", "--label_column", "label"]
        output = ["--rqvae", str(Path(folder, "rqvae")), "--output_dir", str(Path(folder, "latents")), "--cpu"]
        subprocess.run([sys.executable, EXTRACT, *source, *output], check=True)

        vae = RQVAEModel.from_pretrained(Path(folder, "rqvae"))
        images = load_image_dataset(data_files=args.data_files, image_column="img", required_columns=("label",))
        latents = load_latents(str(Path(folder, "latents")), vae, required_columns=("label",))
        collate_images = ImageCollator("img", vae.config.sample_size, label_column="label")
        collate_latents = LatentCollator(stored_shape(vae), label_column="label")
        seconds = least_seconds(
            {
                "images": make_steps(vae, images, collate_images, args.steps),
                "latents": make_steps(vae, latents, collate_latents, args.steps),
            },
            args.repeats,
        )
    for name, value in seconds.items():
        print(f"{name}: {args.steps * BATCH_SIZE / value:.0f} images/s")
    print(f"latents / images: {seconds['images'] / seconds['latents']:.2f} times the images/s")


if __name__ == "__main__":
    main()
