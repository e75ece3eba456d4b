"""Train an RQ-Transformer (stage 2) on labelled images, or on images alone.

Classes:
    accelerate launch examples/train_class_conditional.py --rqvae runs/rqvae/rqvae --dataset_name uoft-cs/cifar10 \\
        --image_column img --label_column label --output_dir runs/classes
No classes: leave out --label_column.
Labels may be numbers or names. Names are sorted, and become numbers; config.json of the transformer keeps them, as
id2label.
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

import math
from pathlib import Path

from rq_hf import RQPipeline, RQVAEModel
from rq_hf.training import (
    ClassArguments,
    RunArguments,
    TrainingDataArguments,
    TransformerArguments,
    ValidationArguments,
    find_classes,
    flat_configuration,
    parse_arguments,
    save_pipeline,
    set_class_names,
    train_pipeline,
)


def main() -> None:
    run, data, args, validation, classes = parse_arguments(
        RunArguments,
        TrainingDataArguments,
        TransformerArguments,
        ValidationArguments,
        ClassArguments,
        description=__doc__,
        sections=("transformer",),
    )
    configuration = flat_configuration(run, data, args, validation, classes)
    accelerator = run.create_accelerator(configuration)

    vae = RQVAEModel.from_pretrained(args.rqvae).to(accelerator.device)
    dataset = args.load_dataset(vae, data, required_columns=(classes.label_column,) if classes.label_column else ())
    num_classes, class_names = find_classes(classes, dataset)
    if num_classes:
        # One more class stands for "no class" in classifier-free guidance.
        model = args.create_model(vae, cond_vocab_size=num_classes + 1, null_cond_id=num_classes)
        set_class_names(model, num_classes, class_names)
        samples = {"class_labels": [i % num_classes for i in range(classes.num_samples)]}
    else:
        model = args.create_model(vae)
        samples = {"batch_size": classes.num_samples}
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    pipeline = RQPipeline(vae, model)

    conditions = {
        "label_column": classes.label_column,
        "num_classes": num_classes or None,
        "class_names": class_names,
    }
    collate = args.create_collator(vae, data, **conditions)
    held_out = args.load_validation(validation, vae, data, run.train_batch_size, **conditions)
    optimizer = run.create_optimizer(model)
    state_dict = train_pipeline(
        accelerator,
        pipeline,
        optimizer,
        run.create_scheduler(optimizer),
        data.create_stream(accelerator, dataset, collate, run),
        args.create_loss(accelerator, vae, model, dataset, collate),
        samples=samples,
        held_out=held_out,
        units_per_image={"codes": math.prod(model.config.code_shape)},
        configuration=configuration,
        **run.training_options(),
    )
    save_pipeline(
        accelerator,
        pipeline,
        state_dict,
        Path(run.output_dir) / "pipeline",
        samples,
        configuration=configuration,
        dataset=dataset,
        upload_to=run.upload_to,
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
