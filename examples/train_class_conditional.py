"""Train an RQ-Transformer (stage 2) on labelled images, or on images alone.

Classes:
    accelerate launch examples/train_class_conditional.py --rqvae runs/rqvae/rqvae --dataset_name uoft-cs/cifar10 \\
        --image_column img --label_column label --output_dir runs/classes
No classes: leave out --label_column.
Eight GPUs, bf16:
    accelerate launch --multi_gpu --num_processes 8 examples/train_class_conditional.py --mixed_precision bf16 ...
Two processes on a CPU:
    torchrun --nproc_per_node 2 examples/train_class_conditional.py --cpu ...
Latents that extract_latents.py wrote, instead of images:
    accelerate launch examples/train_class_conditional.py --rqvae runs/rqvae/rqvae --latents data/latents ...
Resume after an interruption:
    ... --resume_from_checkpoint latest

The finished pipeline is OUTPUT_DIR/pipeline: RQPipeline.from_pretrained("OUTPUT_DIR/pipeline")(class_labels=[0, 1]).
"""

from dataclasses import dataclass, field
from pathlib import Path

from rq_hf import RQPipeline, RQVAEModel
from rq_hf.training import (
    RunArguments,
    TrainingDataArguments,
    TransformerArguments,
    check_numbers,
    flat_configuration,
    parse_arguments,
    save_pipeline,
    train_pipeline,
)


@dataclass
class ClassArguments:
    _argument_group_name = "classes"

    label_column: str | None = field(
        default=None, metadata={"help": "Column with the classes (default: no condition)."}
    )
    num_classes: int | None = field(
        default=None, metadata={"help": "Number of classes (default: what the data set declares)."}
    )
    num_samples: int = field(
        default=16, metadata={"help": "Number of images to generate, every --image_logging_steps steps."}
    )

    def __post_init__(self):
        check_numbers(self, "be at least 1", "num_classes", "num_samples")


def count_classes(args: ClassArguments, dataset) -> int:
    """Number of classes, given or declared by the data set; 0 without labels. Raises `ValueError` if unknown."""
    if args.label_column is None:
        return 0
    declared = getattr((dataset.features or {}).get(args.label_column), "num_classes", None)
    num_classes = declared if args.num_classes is None else args.num_classes
    if num_classes is None:
        raise ValueError(f"the data set does not declare the classes of {args.label_column!r}: pass --num_classes")
    return num_classes


def main() -> None:
    run, data, args, classes = parse_arguments(
        RunArguments, TrainingDataArguments, TransformerArguments, ClassArguments, description=__doc__
    )
    accelerator = run.create_accelerator()

    vae = RQVAEModel.from_pretrained(args.rqvae).to(accelerator.device)
    dataset = args.load_dataset(vae, data, required_columns=(classes.label_column,) if classes.label_column else ())
    num_classes = count_classes(classes, dataset)
    if num_classes:
        # One more class stands for "no class" in classifier-free guidance.
        model = args.create_model(vae, cond_vocab_size=num_classes + 1, null_cond_id=num_classes)
        samples = {"class_labels": [i % num_classes for i in range(classes.num_samples)]}
        call = "pipe(class_labels=[0, 1])"
    else:
        model = args.create_model(vae)
        samples = {"num_images_per_prompt": classes.num_samples}
        call = "pipe(num_images_per_prompt=4)"
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    pipeline = RQPipeline(vae, model)

    collate = args.create_collator(vae, data, label_column=classes.label_column, num_classes=num_classes or None)
    optimizer = run.create_optimizer(model)
    state_dict = train_pipeline(
        accelerator,
        pipeline,
        optimizer,
        run.create_scheduler(optimizer),
        data.create_stream(accelerator, dataset, collate, run),
        args.create_loss(vae, model.config.null_cond_id, accelerator.autocast),
        samples=samples,
        configuration=flat_configuration(run, data, args, classes),
        **run.training_options(),
    )
    destination = Path(run.output_dir) / "pipeline"
    save_pipeline(accelerator, pipeline, state_dict, destination, call, run.upload_to)
    accelerator.print(f"saved {destination}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
