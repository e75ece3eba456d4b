"""Train an RQ-Transformer (stage 2) on labelled pictures, or on pictures alone.

Classes:
    accelerate launch examples/train_class_conditional.py --rqvae runs/rqvae/rqvae --dataset_name uoft-cs/cifar10 \\
        --image_column img --label_column label --output_dir runs/classes
No classes: leave out --label_column.
Eight GPUs, bf16:
    accelerate launch --multi_gpu --num_processes 8 examples/train_class_conditional.py --mixed_precision bf16 ...
Two processes on a CPU:
    torchrun --nproc_per_node 2 examples/train_class_conditional.py --cpu ...
Latents, once written by extract_latents.py, instead of pictures:
    accelerate launch examples/train_class_conditional.py --rqvae runs/rqvae/rqvae --latents data/latents ...
Go on after an interruption:
    ... --resume_from_checkpoint latest

The finished pipeline is OUTPUT_DIR/pipeline: RQPipeline.from_pretrained("OUTPUT_DIR/pipeline")(class_labels=[0, 1]).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rq_hf import RQPipeline, RQVAEModel
from rq_hf.data import DataArguments
from rq_hf.training import (
    OptimizationArguments,
    create_accelerator,
    create_stream,
    flat_configuration,
    parse_arguments,
    save_finished,
    train,
)
from rq_hf.training.rq_transformer import (
    TransformerArguments,
    TransformerLoss,
    create_collator,
    create_transformer,
    load_examples,
    model_card,
)


@dataclass
class ClassArguments:
    _argument_group_name = "classes"

    label_column: str | None = field(default=None, metadata={"help": "Column with the classes; none: unconditional."})
    num_classes: int | None = field(
        default=None, metadata={"help": "Number of classes (default: what the data set declares)."}
    )
    validation_images: int = field(default=16, metadata={"help": "Pictures to draw every --image_logging_steps."})


def count_classes(args: ClassArguments, dataset) -> int:
    """Number of classes given or declared; 0 without labels. Raises `ValueError` when it is neither."""
    if args.label_column is None:
        return 0
    declared = getattr((dataset.features or {}).get(args.label_column), "num_classes", None)
    num_classes = args.num_classes or declared
    if num_classes is None:
        raise ValueError(f"the data set does not declare the classes of {args.label_column!r}: pass --num_classes")
    return num_classes


def main() -> None:
    optimization, data, args, classes = parse_arguments(
        OptimizationArguments, DataArguments, TransformerArguments, ClassArguments, description=__doc__
    )
    accelerator = create_accelerator(optimization)
    vae = RQVAEModel.from_pretrained(args.rqvae).to(accelerator.device)
    dataset = load_examples(vae, args, data, (classes.label_column,) if classes.label_column else ())
    num_classes = count_classes(classes, dataset)
    # One more class stands for "no class" in classifier-free guidance.
    condition = {"cond_vocab_size": num_classes + 1, "null_cond_id": num_classes} if num_classes else {}
    model = create_transformer(vae, args, **condition)
    if optimization.gradient_checkpointing:
        model.activation_checkpointing_enable()
    pipeline = RQPipeline(vae, model)
    pipeline.set_progress_bar_config(disable=True)

    collate = create_collator(vae, args, data, label_column=classes.label_column)

    def samples() -> dict[str, torch.Tensor]:
        generator = torch.Generator(accelerator.device).manual_seed(0)
        count = classes.validation_images
        which = (
            {"class_labels": [i % num_classes for i in range(count)]}
            if num_classes
            else {"num_images_per_prompt": count}
        )
        with accelerator.autocast():
            return {"samples": pipeline(**which, generator=generator, output_type="pt").images}

    train(
        accelerator,
        optimization,
        model,
        create_stream(accelerator, dataset, collate, optimization, data),
        compute_loss=TransformerLoss(vae, model.config, args, accelerator.autocast),
        make_images=samples,
        configuration=flat_configuration(optimization, data, args, classes),
        codes_per_image=math.prod(model.config.code_shape),
    )
    destination = Path(optimization.output_dir) / "pipeline"
    usage = "pipe(class_labels=[0, 1])" if num_classes else "pipe(num_images_per_prompt=4)"
    save_finished(accelerator, pipeline, destination, optimization, model_card(model, usage))
    accelerator.print(f"saved {destination}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
