"""
What are soft labels and stochastic codes worth? The ablation of section 3.2.3 on a small scale, on CIFAR-10.

    python benchmarks/rate_distortion.py --data_files 'cifar10/train-*.parquet' --output_dir runs/rate-distortion
    python benchmarks/labels.py --data_files 'cifar10/train-*.parquet' --stage1 runs/rate-distortion \\
        --output_dir runs/labels

Class-conditional RQ-Transformers on the 8×8×4 codes of the RQ-VAE `D=4 K=512`, equal but for their targets: the
nearest code; soft labels softmax(−‖r − e‖²/τ) along the nearest codes; soft labels along codes sampled from them.
Equal steps, the same seed. Reported are, on 10,000 held-out images, the negative log-likelihood of their nearest codes
in nats per code, and the Fréchet distance (features as in `rate_distortion.py`) of 5,000 generated images, 500 of each
class, with and without classifier-free guidance. Every finished run leaves a folder with its results and is not
repeated.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from cifar10 import feature_network, fit, load_pixels

from rq_hf import RQPipeline, RQTransformerModel, RQVAEModel
from rq_hf.images import image_grid
from rq_hf.metrics import frechet_distance
from rq_hf.training import RQTransformerLoss, create_transformer

RUNS = {  # name: (soft labels, codes sampled from them)
    "hard labels": (False, False),
    "soft labels": (True, False),
    "soft labels, stochastic codes": (True, True),
}
GUIDANCE_SCALES = (1.0, 1.5, 2.0)
CLASSES = 10
SAMPLES = 5000


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


def create_loss(vae: RQVAEModel, temperature: float | None, stochastic: bool) -> Callable:
    """(model, pixels, classes) -> loss; soft labels with a temperature, hard ones without."""
    compute_loss = RQTransformerLoss(
        vae, null_cond_id=CLASSES, soft_label_temperature=temperature, stochastic_codes=stochastic
    )
    return lambda model, pixels, classes: compute_loss(model, {"pixels": pixels, "cond_ids": classes[:, None]}).loss


@torch.no_grad()
def evaluate(pipe: RQPipeline, network, images, labels, folder: Path) -> dict:
    vae, model = pipe.vae, pipe.transformer
    losses, real = 0, []
    for pixels, classes in zip(images.split(500), labels.split(500)):
        pixels = pixels.float() / 127.5 - 1
        codes = vae.get_codes(pixels)
        losses = losses + model(codes, classes, labels=codes, return_logits=False).depth_losses * len(pixels)
        real.append(network.features(pixels))
    results = {"nll_per_depth": (losses / len(images)).tolist(), "frechet_distance": {}}
    results["nll"] = sum(results["nll_per_depth"]) / len(results["nll_per_depth"])
    pipe.compile()
    classes = torch.arange(CLASSES).repeat(SAMPLES // CLASSES)
    for scale in GUIDANCE_SCALES:
        generator, samples = torch.Generator().manual_seed(0), []
        for cond_ids in classes.split(500):
            codes = model.generate(cond_ids, guidance_scale=scale, generator=generator)
            samples.append(vae.decode_codes(codes).sample.clamp(-1, 1))
        image_grid(samples[0][:100] / 2 + 0.5, columns=CLASSES).save(folder / f"guidance-{scale}.png")
        distance = frechet_distance(torch.cat(real), torch.cat([network.features(pixels) for pixels in samples]))
        results["frechet_distance"][str(scale)] = distance
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_files", required=True, help="parquet files with the columns img and label")
    parser.add_argument("--stage1", type=Path, required=True, help="output folder of rate_distortion.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help=f"of {list(RUNS)}")
    parser.add_argument(
        "--temperature", type=float, default=0.002, help="τ of the soft labels; distances are small here"
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()

    train, validation = load_pixels(args.data_files)
    network = feature_network(args.stage1 / "features.pt", train, validation)
    vae = RQVAEModel.from_pretrained(args.stage1 / "D=4-K=512").eval()
    for name in args.runs:
        soft, stochastic = RUNS[name]
        folder = args.output_dir / name.replace(", ", "-").replace(" ", "-")
        if not (folder / "results.json").exists():
            print(name, flush=True)
            if not folder.exists():
                torch.manual_seed(0)
                model = create_model(vae)
                compute_loss = create_loss(vae, args.temperature if soft else None, stochastic)
                fit(model, compute_loss, *train, args.epochs, args.batch_size, args.learning_rate)
                RQPipeline(vae, model).save_pretrained(folder)
            results = {"name": name, "temperature": args.temperature, "epochs": args.epochs}
            results |= evaluate(RQPipeline.from_pretrained(folder), network, *validation, folder)
            (folder / "results.json").write_text(json.dumps(results, indent=2))
        print(json.loads((folder / "results.json").read_text()), flush=True)


if __name__ == "__main__":
    main()
