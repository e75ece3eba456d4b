"""Train an RQ-Transformer (stage 2) on captioned images: text to image.

One process:
    accelerate launch examples/train_t2i.py --rqvae runs/rqvae/rqvae --dataset_name user/captioned-images \\
        --text_column text --output_dir runs/t2i
Eight GPUs, bf16:
    accelerate launch --multi_gpu --num_processes 8 examples/train_t2i.py --mixed_precision bf16 ...
Two processes on a CPU:
    torchrun --nproc_per_node 2 examples/train_t2i.py --cpu ...
Local files, read as a stream:
    accelerate launch examples/train_t2i.py --data_files 'data/*.parquet' --streaming ...
Latents that extract_latents.py wrote, instead of images:
    accelerate launch examples/train_t2i.py --rqvae runs/rqvae/rqvae --latents data/latents ...
Resume after an interruption:
    ... --resume_from_checkpoint latest

The finished pipeline is OUTPUT_DIR/pipeline: RQPipeline.from_pretrained("OUTPUT_DIR/pipeline")("a prompt").
Text goes through any tokenizer (--tokenizer), or through one trained on the captions. Captions of more than
--text_length tokens are truncated on the right; their number is logged.
"""

import math
from pathlib import Path

from rq_hf import RQPipeline, RQVAEModel
from rq_hf.text import with_bpe_dropout
from rq_hf.training import (
    RunArguments,
    TextArguments,
    TrainingDataArguments,
    TransformerArguments,
    ValidationArguments,
    example_prompts,
    flat_configuration,
    parse_arguments,
    prepare_tokenizer,
    save_pipeline,
    train_pipeline,
)


def main() -> None:
    run, data, args, validation, text = parse_arguments(
        RunArguments,
        TrainingDataArguments,
        TransformerArguments,
        ValidationArguments,
        TextArguments,
        description=__doc__,
        sections=("transformer", "text"),
    )
    if args.transformer is not None and text.tokenizer is None:
        raise ValueError("--transformer needs the --tokenizer that it was trained with")
    configuration = flat_configuration(run, data, args, validation, text)
    accelerator = run.create_accelerator(configuration)

    vae = RQVAEModel.from_pretrained(args.rqvae).to(accelerator.device)
    dataset = args.load_dataset(vae, data, required_columns=(text.text_column,))
    tokenizer = prepare_tokenizer(accelerator, text, run, dataset)
    model = args.create_model(
        vae, cond_vocab_size=len(tokenizer), cond_length=text.text_length, null_cond_id=tokenizer.pad_token_id
    )
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    pipeline = RQPipeline(vae, model, tokenizer)
    if text.validation_prompts:
        pipeline.encode_prompt(text.validation_prompts)  # refuses prompts that are too long before the training

    tokenize = with_bpe_dropout(tokenizer, text.bpe_dropout)
    collate = args.create_collator(vae, data, text_column=text.text_column, tokenizer=tokenize)
    held_out = args.load_validation(
        validation, vae, data, run.train_batch_size, text_column=text.text_column, tokenizer=tokenizer
    )
    optimizer = run.create_optimizer(model)
    state_dict = train_pipeline(
        accelerator,
        pipeline,
        optimizer,
        run.create_scheduler(optimizer),
        data.create_stream(accelerator, dataset, collate, run),
        args.create_loss(accelerator, vae, model, dataset, collate),
        samples={"prompt": text.validation_prompts} if text.validation_prompts else None,
        held_out=held_out,
        units_per_image={"codes": math.prod(model.config.code_shape)},
        configuration=configuration,
        **run.training_options(),
    )
    prompts = text.validation_prompts or example_prompts(pipeline, dataset, text.text_column)
    save_pipeline(
        accelerator,
        pipeline,
        state_dict,
        Path(run.output_dir) / "pipeline",
        {"prompt": prompts} if prompts else None,
        configuration=configuration,
        dataset=dataset,
        upload_to=run.upload_to,
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
