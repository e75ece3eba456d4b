"""
What are soft labels and stochastic codes worth? The ablation of section 3.2.3 on a small scale, on CIFAR-10.

    python benchmarks/rate_distortion.py --data_files 'cifar10/train-*.parquet' --output_dir runs/rate-distortion
    python benchmarks/labels.py --data_files 'cifar10/train-*.parquet' \\
        --vae runs/rate-distortion/D=4-K=512/seed-0/model --output_dir runs/labels

Class-conditional RQ-Transformers on the 8×8×4 codes of the RQ-VAE `D=4 K=512`, equal but for their targets: the
nearest code; soft labels softmax(−‖r − e‖²/τ) along the nearest codes; soft labels along codes sampled from them.
Equal steps; each of the --seeds decides the initial weights and the order of the images. Reported is, on 10,000
held-out images, the negative log-likelihood of their nearest codes in nats per code. Every finished run leaves a
pipeline with its results, `results.json`, and is not repeated; the Fréchet distance of generated images is that of
`examples/evaluate_generation.py`, see `docs/rate-distortion.md`.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from cifar10 import fit, load_pixels

from rq_hf import RQPipeline, RQTransformerModel, RQVAEModel
from rq_hf.training import RQTransformerLoss, create_transformer
from rq_hf.training.pipelines import validation_losses

RUNS = {  # name: (soft labels, codes sampled from them)
    "hard labels": (False, False),
    "soft labels": (True, False),
    "soft labels, stochastic codes": (True, True),
}
CLASSES = 10


def create_model(vae: RQVAEModel) -> RQTransformerModel:
    model = create_transformer(
        vae,
        hidden_size=192,
        spatial_layers=4,
        depth_layers=1,
        num_attention_heads=4,
        cond_vocab_size=CLASSES + 1,
        null_cond_id=CLASSES,
    )
    model.set_attn_implementation("eager")  # the fastest in bf16 on a CPU for maps this short
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_files", required=True, help="parquet files with the columns img and label")
    parser.add_argument("--vae", type=Path, required=True, help="an RQ-VAE of rate_distortion.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help=f"of {list(RUNS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--temperature", type=float, default=0.002, help="τ of the soft labels; distances are small here"
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()

    train, validation = load_pixels(args.data_files)
    held_out = [
        {"pixels": pixels.float() / 127.5 - 1, "cond_ids": classes[:, None]}
        for pixels, classes in zip(*(tensor.split(500) for tensor in validation))
    ]
    vae = RQVAEModel.from_pretrained(args.vae).eval()
    recipe = {"epochs": args.epochs, "batch_size": args.batch_size, "learning_rate": args.learning_rate}
    for seed, name in itertools.product(args.seeds, args.runs):
        soft, stochastic = RUNS[name]
        folder = args.output_dir / name.replace(", ", "-").replace(" ", "-") / f"seed-{seed}"
        if not (folder / "results.json").exists():
            print(name, "seed", seed, flush=True)
            loss = RQTransformerLoss(
                vae,
                null_cond_id=CLASSES,
                soft_label_temperature=args.temperature if soft else None,
                stochastic_codes=stochastic,
            )
            if not folder.exists():
                torch.manual_seed(seed)
                model = create_model(vae)
                fit(
                    model,
                    lambda model, x, y, loss=loss: loss(model, {"pixels": x, "cond_ids": y[:, None]}).loss,
                    *train,
                    **recipe,
                    seed=seed,
                )
                RQPipeline(vae, model).save_pretrained(folder)
            model = RQPipeline.from_pretrained(folder).transformer
            results = {"name": name, "seed": seed, "temperature": args.temperature, **recipe}
            with torch.no_grad():
                results |= validation_losses(loss, model, held_out)
            (folder / "results.json").write_text(json.dumps(results, indent=2))
        print((folder / "results.json").read_text(), flush=True)


if __name__ == "__main__":
    main()
