"""
What are soft labels and stochastic codes worth? The ablation of section 3.2.3 in small, on CIFAR-10.

    python benchmarks/rate_distortion.py --data_files 'cifar10/train-*.parquet' --output_dir runs/rate-distortion
    python benchmarks/labels.py --data_files 'cifar10/train-*.parquet' --stage1 runs/rate-distortion \\
        --output_dir runs/labels

Class-conditional RQ-Transformers on the 8×8×4 codes of the RQ-VAE `D=4 K=512`, equal but for their targets: the
nearest code; soft labels softmax(−‖r − e‖²/τ) along the nearest codes; soft labels along codes drawn from them. Equal
steps, the same seed. Reported are, on 10,000 held-out pictures, the negative log-likelihood of their nearest codes in
nats per code, and the Fréchet distance (features as of `rate_distortion.py`) of 5,000 drawn pictures, 500 of each
class, with and without classifier-free guidance. Every finished run leaves a folder with its results and is not
repeated.
"""

import argparse
import json
from pathlib import Path

import torch
from rate_distortion import feature_network, fit, load_pixels

from rq_hf import RQPipeline, RQTransformerConfig, RQTransformerModel, RQVAEModel
from rq_hf.images import image_grid
from rq_hf.metrics import frechet_distance

RUNS = {  # name: (soft labels, codes drawn from them)
    "hard labels": (False, False),
    "soft labels": (True, False),
    "soft labels, stochastic codes": (True, True),
}
GUIDANCE_SCALES = (1.0, 1.5, 2.0)
CLASSES = 10
DRAWN = 5000


def create_model(vae: RQVAEModel) -> RQTransformerModel:
    height, width = (vae.config.sample_size // pixels for pixels in vae.pixels_per_code)
    stack = {"hidden_size": 192, "num_attention_heads": 4, "hidden_dropout": 0.1}
    model = RQTransformerModel(
        RQTransformerConfig(
            code_shape=(height, width, vae.config.depth),
            codebook_size=vae.config.codebook_size,
            codebook_dim=vae.config.codebook_dim,
            cond_vocab_size=CLASSES + 1,
            null_cond_id=CLASSES,
            spatial_config={**stack, "num_hidden_layers": 4},
            depth_config={**stack, "num_hidden_layers": 1},
        )
    )
    model.set_codebook(vae.quantizer.codebook)
    model.set_attn_implementation("eager")  # in bf16 on a CPU the fastest for maps so short
    return model


class Loss:
    """(model, pixels, classes) -> loss, with a tenth of the classes dropped for guidance."""

    def __init__(self, vae: RQVAEModel, soft: bool, stochastic: bool, temperature: float):
        self.vae = vae
        self.soft = soft
        self.stochastic = stochastic
        self.temperature = temperature

    def __call__(self, model, pixels, classes):
        with torch.no_grad():
            vectors = self.vae.latents_to_vectors(self.vae.encode(pixels).latents)
            codes, residuals = self.vae.quantizer.get_codes(vectors, self.temperature if self.stochastic else None)
        targets = {"residuals": residuals} if self.soft else {"labels": codes}
        cond_ids = classes.masked_fill(torch.rand(len(classes)) < 0.1, CLASSES)
        return model(codes, cond_ids, soft_label_temperature=self.temperature, return_logits=False, **targets).loss


@torch.no_grad()
def evaluate(pipe: RQPipeline, network, pictures, labels, folder: Path) -> dict:
    vae, model = pipe.vae, pipe.transformer
    losses, real = 0, []
    for pixels, classes in zip(pictures.split(500), labels.split(500)):
        pixels = pixels.float() / 127.5 - 1
        codes = vae.get_codes(pixels)
        losses = losses + model(codes, classes, labels=codes, return_logits=False).depth_losses * len(pixels)
        real.append(network.features(pixels))
    results = {"nll_per_depth": (losses / len(pictures)).tolist(), "frechet_distance": {}}
    results["nll"] = sum(results["nll_per_depth"]) / len(results["nll_per_depth"])
    pipe.compile()
    classes = torch.arange(CLASSES).repeat(DRAWN // CLASSES)
    for scale in GUIDANCE_SCALES:
        generator, drawn = torch.Generator().manual_seed(0), []
        for cond_ids in classes.split(500):
            codes = model.generate(cond_ids, guidance_scale=scale, generator=generator)
            drawn.append(vae.decode_codes(codes).sample.clamp(-1, 1))
        image_grid(drawn[0][:100] / 2 + 0.5, columns=CLASSES).save(folder / f"guidance-{scale}.png")
        distance = frechet_distance(torch.cat(real), torch.cat([network.features(pixels) for pixels in drawn]))
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
                loss = Loss(vae, soft, stochastic, args.temperature)
                fit(model, loss, *train, args.epochs, args.batch_size, args.learning_rate)
                RQPipeline(vae, model).save_pretrained(folder)
            results = {"name": name, "temperature": args.temperature, "epochs": args.epochs}
            results |= evaluate(RQPipeline.from_pretrained(folder), network, *validation, folder)
            (folder / "results.json").write_text(json.dumps(results, indent=2))
        print(json.loads((folder / "results.json").read_text()), flush=True)


if __name__ == "__main__":
    main()
