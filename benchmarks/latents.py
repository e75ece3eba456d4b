"""
Training stage 2 on latents against training it on pictures, with CIFAR-10 (a few minutes, on a CPU).

    python benchmarks/latents.py --data_files 'cifar10/train-00000-*.parquet'

Whole training steps of a small transformer: read a batch of 64, decode and encode it or not, draw codes, loss with
soft labels, backward, AdamW; in float32, on one thread. The RQ-VAE is that of rate_distortion.py (4×4×4, K = 512)
with random weights: speed does not depend on them. Time is the least of interleaved repeats. What is saved is decoding
and encoding; how much of a step that is depends on the sizes of RQ-VAE and transformer.
"""

import argparse
import contextlib
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from measure import least_seconds
from rate_distortion import create_model

from rq_hf import RQVAEModel
from rq_hf.data import DataArguments, TrainingStream
from rq_hf.training.rq_transformer import (
    TransformerArguments,
    TransformerLoss,
    create_collator,
    create_transformer,
    load_examples,
)

EXTRACT = Path(__file__).parents[1] / "examples" / "extract_latents.py"
BATCH_SIZE = 64
TRANSFORMER = {"hidden_size": 128, "spatial_layers": 4, "depth_layers": 2, "num_attention_heads": 4}


def make_steps(vae: RQVAEModel, data: DataArguments, steps: int, **arguments) -> Callable:
    """A function that makes `steps` training steps of a new transformer, going on where it stopped."""
    args = TransformerArguments("vae", **TRANSFORMER, **arguments)
    collate = create_collator(vae, args, data, label_column="label")
    dataset = load_examples(vae, args, data, required_columns=("label",))
    batches = iter(TrainingStream(dataset, collate, BATCH_SIZE, seed=0))
    torch.manual_seed(0)
    transformer = create_transformer(vae, args, cond_vocab_size=11, null_cond_id=10).train()
    compute_loss = TransformerLoss(vae, transformer.config, args, contextlib.nullcontext)
    optimizer = torch.optim.AdamW(transformer.parameters())

    def run():
        for batch in itertools.islice(batches, steps):
            compute_loss(transformer, batch)[0].backward()
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
        create_model(codebook_size=512, depth=4).save_pretrained(Path(folder, "rqvae"))
        source = ["--data_files", args.data_files, "--image_column", "img", "--label_column", "label"]
        output = ["--rqvae", str(Path(folder, "rqvae")), "--output_dir", str(Path(folder, "latents")), "--cpu"]
        subprocess.run([sys.executable, EXTRACT, *source, *output], check=True)

        vae = RQVAEModel.from_pretrained(Path(folder, "rqvae"))
        pictures = DataArguments(data_files=args.data_files, image_column="img")
        seconds = least_seconds(
            {
                "pictures": make_steps(vae, pictures, args.steps),
                "latents": make_steps(vae, DataArguments(), args.steps, latents=str(Path(folder, "latents"))),
            },
            args.repeats,
        )
    for name, value in seconds.items():
        print(f"{name}: {args.steps * BATCH_SIZE / value:.0f} images/s")
    print(f"latents / pictures: {seconds['pictures'] / seconds['latents']:.2f} times the images/s")


if __name__ == "__main__":
    main()
