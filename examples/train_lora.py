"""Teach a text-to-image pipeline a few new words with a LoRA adapter: a minute on a CPU (pip install 'rq_hf[lora]').

    python examples/train_lora.py images --keep "sunflower" "fire engine" --output_dir runs/lora

`images` is a folder of PNG files; the file name is the caption, so `blue sunflower.png` has the caption "blue
sunflower". Images are resized to the resolution of the model. Training on these few images alone would make the model
forget other prompts. Therefore every batch also contains samples for some of the --keep prompts, taken before the
training.

OUTPUT_DIR must be new. It receives the `adapter`, for `pipe.load_lora_weights`, the `pipeline` with the adapter
merged, and `samples.png`: the training images, and below them one sample of the new pipeline for each prompt. Adapter
and pipeline have model cards, so that `hf upload user/name OUTPUT_DIR/adapter` publishes them.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from rq_hf import EMOJI_MODEL, RQPipeline
from rq_hf.images import captioned_grid, to_rgb
from rq_hf.model_cards import CARD_FILE, model_card, pipeline_usage, quoted
from rq_hf.training.cards import SAMPLES_FILE, command, is_hub_id, table
from rq_hf.training.pipelines import sample_call


def load_images(folder: Path, pipe: RQPipeline) -> dict[str, Image.Image]:
    """The images in `folder` by caption, resized to the resolution of `pipe`."""
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise ValueError(f"there are no PNG files in {folder}")
    height, width = (n * f for n, f in zip(pipe.transformer.config.code_shape, pipe.vae.pixels_per_code))
    return {path.stem: to_rgb(Image.open(path)).resize((width, height), Image.Resampling.LANCZOS) for path in paths}


def train(model, new, kept, steps: int, batch_size: int, learning_rate: float) -> None:
    """`new` and `kept` are codes `(N, H, W, D)` and condition ids `(N, L)`; each provides up to half of a batch."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), learning_rate)
    model.train()
    for step in range(1, steps + 1):
        halves = [(torch.randperm(len(part[0]))[: batch_size // 2], part) for part in (new, kept)]
        codes, cond_ids = (torch.cat([part[i][rows] for rows, part in halves]) for i in (0, 1))
        loss = model(codes, cond_ids, labels=codes, return_logits=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps:
            print(f"step {step}/{steps}: loss {loss.item():.3f}", flush=True)
    model.eval()


def sample(pipe: RQPipeline, prompts: list[str]) -> list[Image.Image]:
    """Images of `sample_call({"prompt": prompts})`."""
    return pipe(prompts, generator=torch.Generator().manual_seed(0)).images


def card_sections(args: argparse.Namespace, captions: list[str], relation: str) -> dict:
    """
    Arguments of [`model_card`]: training data, command and hyper-parameters as `details`, and a `base_model` that is
    on the Hub.

    Args:
        relation: of this model to the base model, as the Hub names it.
    """
    details = f"""## Training data

{len(captions)} images, the PNG files in `{args.images}`: {", ".join(captions)}.

Every batch also had samples of the base model for other prompts, lest it forget them: {", ".join(args.keep)}.

## Training

```
{command()}
```

<details><summary>All hyper-parameters</summary>

{table(vars(args))}

</details>"""
    metadata = {"base_model": args.model, "base_model_relation": relation} if is_hub_id(args.model) else {}
    return {"details": details.replace(EMOJI_MODEL, "rq_hf.EMOJI_MODEL"), **metadata}


def save_card(folder: Path, card: str, samples: Image.Image) -> None:
    """Saves a model card and the samples that it shows in the folder of a model."""
    samples.save(folder / SAMPLES_FILE)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of PNG files named by their captions")
    parser.add_argument("--keep", nargs="+", required=True, metavar="PROMPT", help="prompts to rehearse in training")
    parser.add_argument("--model", default=EMOJI_MODEL, help="any text-to-image pipeline: a folder or a Hub id")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    args = parser.parse_args()

    from peft import LoraConfig

    if args.output_dir.exists():
        raise ValueError(f"--output_dir must be new, but {args.output_dir} exists")
    if args.batch_size < 2:
        raise ValueError(f"--batch_size must be at least 2, half of it for new images, got {args.batch_size}")
    torch.manual_seed(0)
    pipe = RQPipeline.from_pretrained(args.model)
    if not pipe.is_text_conditional:
        raise ValueError(f"--model must be a text-to-image pipeline, got {args.model}")
    images = load_images(args.images, pipe)
    captions, prompts = list(images), [*images, *args.keep]
    new = pipe.encode_image(list(images.values())), pipe.encode_prompt(captions)
    kept = pipe(args.keep, output_type="latent").codes, pipe.encode_prompt(args.keep)
    before = sample(pipe, captions)

    targets = ["qkv_proj", "o_proj", "up_proj", "down_proj"]
    model = pipe.transformer
    model.add_adapter(LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=targets))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"training {trained:,} of {model.num_parameters():,} parameters")
    train(model, new, kept, args.steps, args.batch_size, args.learning_rate)

    adapter, merged = args.output_dir / "adapter", args.output_dir / "pipeline"
    settings = model.peft_config["default"].to_dict()
    pipe.save_lora_weights(adapter, model.get_adapter_state_dict(), settings)
    call = f"pipe.load_lora_weights({quoted(str(adapter))})\n{sample_call({'prompt': captions})}"
    base = "the emoji model of the package" if args.model == EMOJI_MODEL else f"`{args.model}`"
    card = model_card(
        "LoRA adapter for new words",
        pipeline_usage(call, args.model).replace(quoted(EMOJI_MODEL), "rq_hf.EMOJI_MODEL"),
        about=f"It has {trained:,} weights, for {base}, and needs `pip install 'rq_hf[lora]'`.",
        introduction=f"![Samples]({SAMPLES_FILE})\n\n*The given images, what the model made of their captions before "
        "the training, and what it makes of them with the adapter, by the code below.*",
        pipeline_tag=pipe.task,
        tags=["rq-transformer", "lora"],
        citation=model.card_sections["citation"],
        **card_sections(args, captions, "adapter"),
    )
    shown = [*images.values(), *before, *sample(pipe, captions)]
    cells = [f"{name}: {caption}" for name in ("given", "before", "after") for caption in captions]
    save_card(adapter, card, captioned_grid(shown, cells, columns=len(images)))

    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(merged)
    samples = sample(pipe, prompts)
    card = pipe.card(
        str(merged),
        sample_call({"prompt": prompts}),
        introduction=f"This is {base} with a LoRA adapter merged, which taught it new words.\n\n"
        f"![Samples]({SAMPLES_FILE})\n\n*Samples of this model, by the code below.*",
        **card_sections(args, captions, "finetune"),
    )
    save_card(merged, card, captioned_grid(samples, prompts))
    given = [f"given: {caption}" for caption in captions]
    grid = captioned_grid([*images.values(), *samples], [*given, *prompts], columns=len(images))
    grid.save(args.output_dir / "samples.png")
    print(f"{args.output_dir / 'samples.png'}, {adapter}, {merged}")


if __name__ == "__main__":
    main()
