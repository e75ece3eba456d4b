"""
What share of the time do metrics take while images are generated?

    python benchmarks/evaluation.py [--preset ffhq-355m] [--images 32] [--batch_size 16]

The pipeline of a preset and the Inception network, both with random weights, as in `examples/evaluate_generation.py`
with `--network pytorch-fid`. Seconds are CPU time. Speed on a GPU differs.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from rq_hf import RQPipeline, RQTransformerConfig, RQTransformerModel, RQVAEModel
from rq_hf.evaluation.generation import GenerationFolder, GenerationPlan, generate_shard
from rq_hf.files import checksum
from rq_hf.metrics import load_feature_network
from rq_hf.metrics.inception import FIDInception


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="ffhq-355m", help="of an unconditional model")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()

    torch.manual_seed(0)
    vae = RQVAEModel.from_preset(args.preset)
    transformer = RQTransformerModel(RQTransformerConfig.from_preset(args.preset))
    transformer.set_codebook(vae.quantizer.codebook)
    pipe = RQPipeline(vae, transformer)
    pipe.set_progress_bar_config(disable=True)
    plan = GenerationPlan(args.images, shard_size=args.batch_size)
    with tempfile.TemporaryDirectory() as directory:
        weights = Path(directory, "inception.pth")
        torch.save(FIDInception().state_dict(), weights)
        network = load_feature_network("pytorch-fid", str(weights), checksum(weights))
        folder = GenerationFolder(Path(directory, "generation"), plan)
        folder.open()
        seconds = 0.0

        def observe(images: torch.Tensor, _) -> dict[str, torch.Tensor]:
            nonlocal seconds
            started = time.process_time()
            features = network(images).features
            seconds += time.process_time() - started
            return {"features": features}

        started = time.process_time()
        for shard in plan.shards(0):
            generate_shard(pipe, folder, shard, [observe], batch_size=args.batch_size)
        total = time.process_time() - started
    each, metrics = total / args.images, seconds / args.images
    print(f"{each:.2f} s per image, {metrics:.2f} s of them for metrics: {metrics / each:.1%}")


if __name__ == "__main__":
    main()
