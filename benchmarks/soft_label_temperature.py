"""
Which temperature of soft labels? RQ-Transformers on emoji of 32×32, equal but for their targets.

    python examples/emoji/make_dataset.py --image_size 32 --output_dir data/emoji-32
    python benchmarks/soft_label_temperature.py --data data/emoji-32 --effective_codewords 1 1.5 3 10

The codes, 4×4×4 with K = 512, are those of the RQ-VAE that comes with the package. Each run has soft labels of the
temperature at which they spread over the given number of codewords, and codes sampled from them; 1 means hard labels.
Reported are the cross-entropy of the nearest codes of training and of held-out captions, in nats per code, and
retrieval: an image is sampled for each caption, at temperature 0.2, and all real images are ranked by their L2
distance to it in pixels.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from rq_hf import EMOJI_MODEL, RQPipeline, RQVAEModel
from rq_hf.data import ImageCollator, load_image_dataset
from rq_hf.evaluation.retrieval import retrieval_ranks
from rq_hf.text import encode_captions, train_tokenizer
from rq_hf.training import EMA, RQTransformerLoss, choose_soft_label_temperature, create_transformer
from rq_hf.training.pipelines import validation_losses

RESOLUTION, TEXT_LENGTH, BATCH_SIZE, WARMUP_STEPS = 32, 24, 32, 100
TEMPERATURE = 0.2
EVALUATED = 150  # training captions


def load_split(path: Path) -> tuple[list[str], torch.Tensor]:
    """Captions and pixels `(N, 3, 32, 32)` in [-1, 1] of a parquet file."""
    dataset = load_image_dataset(data_files=str(path), required_columns=("text",))
    return list(dataset["text"]), ImageCollator("image", RESOLUTION)(list(dataset))["pixels"]


def fit(model: torch.nn.Module, compute_loss: RQTransformerLoss, batch: dict[str, torch.Tensor], steps: int) -> None:
    """Trains on random rows of `batch` in bf16, and leaves the averaged weights in the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    ema, count, rows = EMA(model, 0.99), len(batch["cond_ids"]), torch.empty(0, dtype=torch.long)
    model.train()
    for _ in range(steps):
        if len(rows) < BATCH_SIZE:
            rows = torch.randperm(count)
        chosen, rows = rows[:BATCH_SIZE], rows[BATCH_SIZE:]
        with torch.autocast("cpu", torch.bfloat16):
            loss = compute_loss(model, {name: values[chosen] for name, values in batch.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update()
    model.load_state_dict(ema.average)
    model.eval()


def retrieval(
    pipe: RQPipeline, captions: list[str], pixels: torch.Tensor, candidates: torch.Tensor
) -> dict[str, float]:
    """Share of captions whose own image is the nearest of all to the sampled one, and among the nearest five."""
    images, candidates = pixels / 2 + 0.5, candidates / 2 + 0.5
    ranks = retrieval_ranks(pipe, captions, images, candidates, batch_size=50, temperature=TEMPERATURE)
    return {f"top_{k}": (ranks <= k).float().mean().item() for k in (1, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/emoji-32"), help="folder written by make_dataset.py")
    parser.add_argument("--effective_codewords", type=float, nargs="+", default=[1, 1.5, 3, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/tau"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    vae = RQVAEModel.from_pretrained(EMOJI_MODEL, subfolder="vae")
    captions, pixels = load_split(args.data / "train.parquet")
    held_captions, held_pixels = load_split(args.data / "held_out.parquet")
    vae.register_to_config(sample_size=RESOLUTION)
    tokenizer = train_tokenizer(captions, 1024, TEXT_LENGTH)

    @torch.no_grad()
    def encode(texts, images):
        latents = torch.cat([vae.encode_to_vectors(chunk) for chunk in images.split(64)])
        return {"latents": latents, "cond_ids": encode_captions(tokenizer, texts, TEXT_LENGTH)[0]}

    batch, held_batch = encode(captions, pixels), encode(held_captions, held_pixels)
    chosen = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0))[:EVALUATED]
    chosen_captions, candidates = [captions[i] for i in chosen], torch.cat([pixels, held_pixels])
    for effective in args.effective_codewords:
        temperature = None
        if effective > 1:
            temperature = choose_soft_label_temperature(vae.quantizer, batch["latents"][::14], effective)
        for seed in args.seeds:
            torch.manual_seed(seed)
            model = create_transformer(
                vae,
                hidden_size=192,
                spatial_layers=4,
                depth_layers=1,
                num_attention_heads=4,
                hidden_dropout=0.0,
                cond_vocab_size=len(tokenizer),
                cond_length=TEXT_LENGTH,
                null_cond_id=tokenizer.pad_token_id,
            )
            model.set_attn_implementation("eager")
            loss = RQTransformerLoss(vae, null_cond_id=tokenizer.pad_token_id, soft_label_temperature=temperature)
            fit(model, loss, batch, args.steps)
            pipe = RQPipeline(vae, model, tokenizer)
            pipe.set_progress_bar_config(disable=True)
            some = {name: values[chosen] for name, values in batch.items()}
            result = {
                "effective_codewords": effective,
                "temperature": temperature,
                "seed": seed,
                "train_loss": validation_losses(loss, model, [some])["validation/loss"],
                "held_out_loss": validation_losses(loss, model, [held_batch])["validation/loss"],
                "train": retrieval(pipe, chosen_captions, pixels[chosen], candidates),
                "held_out": retrieval(pipe, held_captions, held_pixels, candidates),
            }
            (args.output_dir / f"{effective}-{seed}.json").write_text(json.dumps(result, indent=2) + "\n")
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
