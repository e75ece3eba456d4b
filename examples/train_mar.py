"""Train a MAR transformer on captioned images, on labelled images, or on images alone.

Captions:
    accelerate launch examples/train_mar.py --vae runs/vae/vae --dataset_name user/captioned-images \\
        --text_column text --output_dir runs/mar
Classes; the authors repeat them 64 times in front of the image:
    accelerate launch examples/train_mar.py --vae runs/vae/vae --dataset_name uoft-cs/cifar10 --image_column img \\
        --label_column label --cond_repeats 64 --output_dir runs/mar
Neither: leave out --text_column and --label_column.
Eight GPUs, bf16:
    accelerate launch --multi_gpu --num_processes 8 examples/train_mar.py --mixed_precision bf16 ...
Latents that extract_latents.py wrote, instead of images:
    accelerate launch examples/train_mar.py --vae runs/vae/vae --latents data/latents ...
Resume after an interruption:
    ... --resume_from_checkpoint latest

The autoencoder is an AutoencoderKL, such as train_autoencoder_kl.py trains, or an RQ-VAE, whose latents are used
without quantizing them. The finished pipeline is OUTPUT_DIR/pipeline:
MARPipeline.from_pretrained("OUTPUT_DIR/pipeline")("a prompt").
The defaults are the authors' recipe for ImageNet with 2048 images per step; their learning rate is 1e-4 · batch / 256.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from rq_hf import MARPipeline, MARTransformerModel, RQVAEModel
from rq_hf.data import first_batches
from rq_hf.models.continuous_latents import Autoencoder, encode_moments, load_autoencoder, measure_scaling_factor
from rq_hf.models.mar_transformer.denoising import default_scheduler
from rq_hf.text import with_bpe_dropout
from rq_hf.training import (
    ClassArguments,
    LatentsArguments,
    MARLoss,
    RunArguments,
    TextArguments,
    TrainingDataArguments,
    ValidationArguments,
    check_numbers,
    create_mar_transformer,
    example_prompts,
    find_classes,
    flat_configuration,
    load_mar_transformer,
    parse_arguments,
    prepare_tokenizer,
    save_pipeline,
    set_class_names,
    train_pipeline,
)

SCALING_FACTOR_IMAGES = 256


@dataclass(kw_only=True)
class MARArguments(LatentsArguments):
    _argument_group_name = "transformer"

    vae: str = field(metadata={"help": "Trained autoencoder, an AutoencoderKL or an RQ-VAE: a folder or a Hub id."})
    transformer: str | None = field(
        default=None,
        metadata={"help": "Trained transformer to continue from: a folder or a Hub id (default: a new one)."},
    )
    hidden_size: int = field(default=768, metadata={"help": "Width of encoder and decoder."})
    encoder_layers: int = field(default=12, metadata={"help": "Blocks of the encoder."})
    decoder_layers: int = field(default=12, metadata={"help": "Blocks of the decoder."})
    num_attention_heads: int = field(default=12, metadata={"help": "Attention heads."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout in the blocks."})
    head_hidden_size: int = field(default=1024, metadata={"help": "Width of the diffusion head."})
    head_layers: int = field(default=3, metadata={"help": "Blocks of the diffusion head."})
    patch_size: int = field(default=1, metadata={"help": "Rows and columns of latents in a token."})
    cond_repeats: int = field(
        default=1,
        metadata={"help": "How often the condition stands in front of the image: 64 in the authors' models."},
    )
    mask_ratio_min: float = field(default=0.7, metadata={"help": "Smallest share of hidden tokens."})
    diffusion_batch_mul: int = field(default=4, metadata={"help": "Noised copies of every token in the loss."})
    timestep_spacing: str = field(
        default="linspace",
        metadata={
            "help": "Where the finished pipeline begins to denoise: linspace, the authors', at t = 999, where small "
            "errors of the head are multiplied by 20,000; leading begins lower, for short runs.",
            "choices": ["linspace", "leading"],
        },
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "Attention kernel.", "choices": ["eager", "sdpa", "flash_attention_2"]}
    )
    cond_dropout: float = field(
        default=0.1, metadata={"help": "Share of conditions replaced by none, for classifier-free guidance."}
    )

    def __post_init__(self):
        check_numbers(self, "be at least 1", "hidden_size", "encoder_layers", "decoder_layers", "num_attention_heads")
        check_numbers(self, "be at least 1", "head_hidden_size", "patch_size", "cond_repeats", "diffusion_batch_mul")
        check_numbers(self, "be at least 0", "head_layers")
        check_numbers(self, "lie in [0, 1)", "dropout", "cond_dropout")
        check_numbers(self, "lie in (0, 1]", "mask_ratio_min")

    def create_model(self, vae: Autoencoder, **conditions) -> MARTransformerModel:
        """A new or a trained transformer; `conditions` are `cond_vocab_size`, `cond_length` and `null_cond_id`."""
        if self.transformer is not None:
            model = load_mar_transformer(self.transformer, vae, **conditions)
        else:
            model = create_mar_transformer(
                vae,
                hidden_size=self.hidden_size,
                encoder_layers=self.encoder_layers,
                decoder_layers=self.decoder_layers,
                num_attention_heads=self.num_attention_heads,
                dropout=self.dropout,
                head_hidden_size=self.head_hidden_size,
                head_layers=self.head_layers,
                patch_size=self.patch_size,
                cond_repeats=self.cond_repeats,
                mask_ratio_min=self.mask_ratio_min,
                diffusion_batch_mul=self.diffusion_batch_mul,
                **conditions,
            )
        model.set_attn_implementation(self.attn_implementation)
        return model


@torch.no_grad()
def scale_latents(vae: RQVAEModel, dataset, collate) -> None:
    """Sets the scaling factor of an RQ-VAE that has none yet, from its latents of some images."""
    batches = first_batches(dataset.shuffle(seed=0), collate, SCALING_FACTOR_IMAGES, batch_size=32)
    factor = measure_scaling_factor(
        batch["latents"] if "latents" in batch else encode_moments(vae, batch["pixels"].to(vae.device))
        for batch in batches
    )
    vae.register_to_config(scaling_factor=factor)


def main() -> None:
    run, data, args, validation, text, classes = parse_arguments(
        RunArguments,
        TrainingDataArguments,
        MARArguments,
        ValidationArguments,
        TextArguments,
        ClassArguments,
        description=__doc__,
        sections=("mar", "text"),
        text_column=None,
        train_batch_size=64,
        max_train_steps=250_000,
        learning_rate=8e-4,
        lr_scheduler="constant",
        lr_warmup_steps=62_500,
        weight_decay=0.02,
        max_grad_norm=3.0,
        ema_decay=0.9999,
    )
    if text.text_column is not None and classes.label_column is not None:
        raise ValueError(
            f"give --text_column or --label_column, not both, got {text.text_column!r} and {classes.label_column!r}"
        )
    if args.transformer is not None and text.text_column is not None and text.tokenizer is None:
        raise ValueError("--transformer needs the --tokenizer that it was trained with")
    configuration = flat_configuration(run, data, args, validation, text, classes)
    accelerator = run.create_accelerator(configuration)

    vae = load_autoencoder(args.vae).to(accelerator.device).requires_grad_(False)
    required_columns = tuple(filter(None, (text.text_column, classes.label_column)))
    dataset = args.load_dataset(vae, data, required_columns)
    tokenizer, samples = None, {"batch_size": classes.num_samples}
    if text.text_column is not None:
        tokenizer = prepare_tokenizer(accelerator, text, run, dataset)
        model = args.create_model(
            vae, cond_vocab_size=len(tokenizer), cond_length=text.text_length, null_cond_id=tokenizer.pad_token_id
        )
        conditions = {"text_column": text.text_column, "tokenizer": tokenizer}
        samples = {"prompt": text.validation_prompts} if text.validation_prompts else None
    elif classes.label_column is not None:
        num_classes, class_names = find_classes(classes, dataset)
        model = args.create_model(vae, cond_vocab_size=num_classes + 1, null_cond_id=num_classes)
        set_class_names(model, num_classes, class_names)
        conditions = {"label_column": classes.label_column, "num_classes": num_classes, "class_names": class_names}
        samples = {"class_labels": [i % num_classes for i in range(classes.num_samples)]}
    else:
        model, conditions = args.create_model(vae), {}
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    pipeline = MARPipeline(vae, model, default_scheduler(args.timestep_spacing), tokenizer)
    if text.validation_prompts:
        pipeline.encode_prompt(text.validation_prompts)  # refuses prompts that are too long before the training

    tokenize = {} if tokenizer is None else {"tokenizer": with_bpe_dropout(tokenizer, text.bpe_dropout)}
    collate = args.create_collator(vae, data, **conditions | tokenize)
    if isinstance(vae, RQVAEModel) and vae.config.scaling_factor == 1:
        scale_latents(vae, dataset, collate)
    held_out = args.load_validation(validation, vae, data, run.train_batch_size, **conditions)
    optimizer = run.create_optimizer(model)
    state_dict = train_pipeline(
        accelerator,
        pipeline,
        optimizer,
        run.create_scheduler(optimizer),
        data.create_stream(accelerator, dataset, collate, run),
        MARLoss(
            vae,
            null_cond_id=model.config.null_cond_id,
            cond_dropout=args.cond_dropout,
            autocast=accelerator.autocast,
        ),
        samples=samples,
        held_out=held_out,
        units_per_image={"tokens": model.config.num_tokens},
        configuration=configuration,
        **run.training_options(),
    )
    if text.text_column is not None and samples is None:
        prompts = example_prompts(pipeline, dataset, text.text_column)
        samples = {"prompt": prompts} if prompts else None
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
