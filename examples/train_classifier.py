"""Train the small classifier whose features and class accuracies measure generated 32×32 images.

The one that comes with the package, rq_hf.CIFAR10_CLASSIFIER:
    accelerate launch --cpu examples/train_classifier.py --data_files 'cifar10/train-0000[0-3]*.parquet' \\
        --validation_files 'cifar10/train-00004*.parquet' --image_column img --mixed_precision bf16 \\
        --output_dir runs/classifier
Any images with classes that the data set declares or names, resized to 32×32:
    accelerate launch examples/train_classifier.py --dataset_name user/images --label_column class --output_dir ...
Resume after an interruption:
    ... --resume_from_checkpoint latest

The finished model is OUTPUT_DIR/classifier, in half precision:
rq_hf.metrics.SmallClassifier.from_pretrained("OUTPUT_DIR/classifier").
Images are mirrored, shifted by up to four pixels and a square of them is erased (DeVries and Taylor, "Cutout", 2017).
SGD with Nesterov momentum; the learning rate rises linearly for --lr_warmup_steps, then falls as a cosine to zero.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from rq_hf.data import find_class_names, first_batches
from rq_hf.metrics import SmallClassifier
from rq_hf.metrics.small_classifier import SIDE
from rq_hf.model_cards import model_card, quoted
from rq_hf.training import (
    LossOutput,
    RunArguments,
    TrainingDataArguments,
    ValidationArguments,
    check_numbers,
    flat_configuration,
    parse_arguments,
    save_finished,
    train,
    training_sections,
)

USAGE = """import torch
from rq_hf.metrics import SmallClassifier

classifier = SmallClassifier.from_pretrained({model})
pixels = torch.rand(4, 3, 32, 32) * 2 - 1  # images in [-1, 1], here of noise
features = classifier.features(pixels)  # (4, 224)
logits = classifier(pixels)  # (4, {classes})"""


@dataclass
class SGDArguments(RunArguments):
    """SGD instead of AdamW."""

    adam_beta1: float = field(default=0.0, init=False)
    adam_beta2: float = field(default=0.0, init=False)
    momentum: float = field(default=0.9, metadata={"help": "Nesterov momentum."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight of the squared norm of all weights."})

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "lie in (0, 1]", "momentum")

    def create_optimizer(self, model: torch.nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(
            model.parameters(), self.learning_rate, self.momentum, weight_decay=self.weight_decay, nesterov=True
        )


@dataclass
class ClassifierArguments:
    _argument_group_name = "classifier"

    label_column: str = field(default="label", metadata={"help": "Column with the classes, numbers or names."})
    max_shift: int = field(default=4, metadata={"help": "Images are shifted by up to N pixels in both directions."})
    cutout: int = field(default=8, metadata={"help": "Side of the square that is erased, in pixels; 0 for none."})
    label_smoothing: float = field(
        default=0.1, metadata={"help": "Share of the target probability that is spread evenly over all classes."}
    )

    def __post_init__(self):
        check_numbers(self, "be at least 0", "max_shift", "cutout")
        check_numbers(self, "lie in [0, 1)", "label_smoothing")
        for name in ("max_shift", "cutout"):
            if getattr(self, name) > SIDE:
                raise ValueError(f"--{name} must be at most {SIDE}, got {getattr(self, name)}")


def augment(pixels: torch.Tensor, max_shift: int, cutout: int) -> torch.Tensor:
    """
    Pixels `(B, 3, height, width)`, each image shifted at random and a random square of it erased; new pixels are 0,
    the middle of [-1, 1].
    """
    batch_size, _, height, width = pixels.shape
    padded = F.pad(pixels, [max_shift] * 4)
    rows, columns = (
        torch.randint(2 * max_shift + 1, (batch_size, 1)) + torch.arange(side) for side in (height, width)
    )
    images = torch.arange(batch_size)
    # Indices on both sides of a slice put its dimension last.
    shifted = padded[images[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    inside = []
    for side in (height, width):
        offset = torch.arange(side) - torch.randint(side - cutout + 1, (batch_size, 1))
        inside.append((offset >= 0) & (offset < cutout))
    return shifted.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


def collate_augmented(examples: list[dict], collate: Callable[[list[dict]], dict], **options) -> dict:
    """`options` are those of [`augment`]."""
    batch = collate(examples)
    return batch | {"pixels": augment(batch["pixels"], **options)} if batch["counts"]["images"] else batch


class ClassifierLoss:
    """(model, batch with `pixels` and `cond_ids`) -> [`LossOutput`], the cross-entropy."""

    def __init__(self, label_smoothing: float):
        self.label_smoothing = label_smoothing

    def __call__(self, model: torch.nn.Module, batch: dict) -> LossOutput:
        labels = batch["cond_ids"].squeeze(1)
        # Convolutions of CPUs and GPUs are faster with the channels last.
        logits = model(batch["pixels"].contiguous(memory_format=torch.channels_last)).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return LossOutput(loss, {"accuracy": (logits.argmax(dim=-1) == labels).float().mean()})


@torch.no_grad()
def evaluate(model: SmallClassifier, batches: Sequence[dict], device: torch.device) -> dict[str, float]:
    """Accuracy, also with the probabilities of mirrored images averaged in, and cross-entropy: `validation/...`."""
    logits, mirrored = [], []
    for batch in batches:
        pixels = batch["pixels"].to(device)
        logits.append(model(pixels).float().cpu())
        mirrored.append(model(pixels.flip(-1)).float().cpu())
    labels = torch.cat([batch["cond_ids"].squeeze(1) for batch in batches])
    logits, mirrored = torch.cat(logits), torch.cat(mirrored)
    both = logits.softmax(dim=-1) + mirrored.softmax(dim=-1)
    return {
        "validation/accuracy": (logits.argmax(dim=-1) == labels).float().mean().item(),
        "validation/accuracy_with_mirrored": (both.argmax(dim=-1) == labels).float().mean().item(),
        "validation/loss": F.cross_entropy(logits, labels).item(),
    }


def main() -> None:
    run, data, args, validation = parse_arguments(
        SGDArguments,
        TrainingDataArguments,
        ClassifierArguments,
        ValidationArguments,
        description=__doc__,
        sections=(),
        random_flip=True,
        train_batch_size=128,
        max_train_steps=3130,
        learning_rate=0.15,
        lr_warmup_steps=600,
        max_grad_norm=0.0,
        ema_decay=0.995,
        image_logging_steps=939,
        checkpointing_steps=313,
        validation_images=10_000,
    )
    configuration = flat_configuration(run, data, args, validation)
    accelerator = run.create_accelerator(configuration)

    dataset = data.load(required_columns=(args.label_column,))
    names = find_class_names(dataset, args.label_column)
    if names is None:
        raise ValueError(
            f"the data set must declare or name the classes of {args.label_column!r}; it has only numbers"
        )
    options = {"label_column": args.label_column, "num_classes": len(names), "class_names": names}
    collate = functools.partial(
        collate_augmented,
        collate=data.create_collator(SIDE, random_flip=data.random_flip, **options),
        max_shift=args.max_shift,
        cutout=args.cutout,
    )
    held_out = []
    if validation.is_given:
        others = validation.select_from(data)
        examples = others.load(required_columns=(args.label_column,))
        count = validation.validation_images
        held_out = list(first_batches(examples, others.create_collator(SIDE, **options), count, batch_size=500))

    model = SmallClassifier(len(names)).to(memory_format=torch.channels_last)
    optimizer = run.create_optimizer(model)
    train(
        accelerator,
        model,
        optimizer,
        run.create_scheduler(optimizer),
        data.create_stream(accelerator, dataset, collate, run),
        ClassifierLoss(args.label_smoothing),
        evaluate=(lambda step: evaluate(model, held_out, accelerator.device)) if held_out else None,
        configuration=configuration,
        **run.training_options(),
    )
    # As saved, and not under autocast.
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False).half().float()
    figures = evaluate(model, held_out, accelerator.device) if held_out else {}
    for name, value in figures.items():
        accelerator.print(f"{name} in half precision: {value:.4f}")
    rows = ["", "| held-out images | |", "|---|---|"] if figures else []
    for name, value in figures.items():
        rows.append(f"| {name.removeprefix('validation/').replace('_', ' ')} | {value:.4f} |")
    destination = Path(run.output_dir) / "classifier"
    card = model_card(
        "Small classifier of 32×32 images",
        USAGE.format(model=quoted(run.upload_to or str(destination)), classes=len(names)),
        introduction="\n".join([f"Classes: {', '.join(names)}.", *rows]),
        pipeline_tag="image-classification",
        tags=["resnet-9"],
        **training_sections(accelerator, configuration, dataset, "image-classification"),
    )
    save_finished(accelerator, model.half(), destination, card, run.upload_to)
    accelerator.end_training()


if __name__ == "__main__":
    main()
