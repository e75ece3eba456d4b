"""Train an RQ-Transformer (stage 2) on captioned pictures: text to image.

One process:
    accelerate launch examples/train_t2i.py --rqvae runs/rqvae/rqvae --dataset_name user/captioned-pictures \\
        --text_column text --output_dir runs/t2i
Eight GPUs, bf16:
    accelerate launch --multi_gpu --num_processes 8 examples/train_t2i.py --mixed_precision bf16 ...
Two processes on a CPU:
    torchrun --nproc_per_node 2 examples/train_t2i.py --cpu ...
Local files, read as a stream:
    accelerate launch examples/train_t2i.py --data_files 'data/*.parquet' --streaming ...
Latents, once written by extract_latents.py, instead of pictures:
    accelerate launch examples/train_t2i.py --rqvae runs/rqvae/rqvae --latents data/latents ...
Go on after an interruption:
    ... --resume_from_checkpoint latest

The finished pipeline is OUTPUT_DIR/pipeline: RQPipeline.from_pretrained("OUTPUT_DIR/pipeline")("a prompt").
Text goes through any tokenizer (--tokenizer), or through one trained on the captions. Captions of more than
--text_length tokens are cut on the right; how many were is logged.
"""

import copy
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase

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
    written_whole,
)
from rq_hf.training.rq_transformer import (
    TransformerArguments,
    TransformerLoss,
    create_collator,
    create_transformer,
    load_examples,
    model_card,
)
from rq_hf.text import train_tokenizer


@dataclass
class TextArguments:
    _argument_group_name = "text"

    text_column: str = field(default="text", metadata={"help": "Column with the captions."})
    text_length: int = field(default=32, metadata={"help": "Tokens of a caption, padded or cut to this length."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer: a folder or a Hub id (default: train one on the captions)."}
    )
    tokenizer_vocab_size: int = field(default=8192, metadata={"help": "Vocabulary of a tokenizer trained here."})
    tokenizer_captions: int = field(default=1_000_000, metadata={"help": "Captions a tokenizer is trained on."})
    bpe_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Share of the tokenizer's merges left out at random, so that words are seen in several spellings. "
            "Drawn outside of --seed: runs differ, and a resumed one from the unbroken one."
        },
    )
    validation_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Prompts to draw every --image_logging_steps."}
    )

    def __post_init__(self):
        if not 0 <= self.bpe_dropout < 1:
            raise ValueError(f"--bpe_dropout must lie in [0, 1), got {self.bpe_dropout}")


def save_new_tokenizer(args: TextArguments, dataset, folder: Path) -> None:
    """Trains a tokenizer on the captions."""
    examples = itertools.islice(dataset.select_columns([args.text_column]), args.tokenizer_captions)
    texts = (example[args.text_column] for example in examples)
    with written_whole(folder) as unfinished:
        train_tokenizer(texts, args.tokenizer_vocab_size, args.text_length).save_pretrained(unfinished)


def load_tokenizer(name: str | Path, text_length: int) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer {name} has no padding token, which stands for 'no text'")
    tokenizer.model_max_length = text_length
    return tokenizer


def with_bpe_dropout(tokenizer: PreTrainedTokenizerBase, dropout: float) -> PreTrainedTokenizerBase:
    """A copy that leaves out merges (Provilkov et al., 2020), for training alone; itself where `dropout` is 0."""
    if not dropout:
        return tokenizer
    found = tokenizer.backend_tokenizer.model if tokenizer.is_fast else tokenizer
    if not isinstance(found, BPE):
        raise ValueError(f"--bpe_dropout needs a BPE tokenizer of the tokenizers library, got {type(found).__name__}")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.model.dropout = dropout
    return tokenizer


def main() -> None:
    optimization, data, args, text = parse_arguments(
        OptimizationArguments, DataArguments, TransformerArguments, TextArguments, description=__doc__
    )
    if args.transformer is not None and text.tokenizer is None:
        raise ValueError("--transformer needs the --tokenizer that it was trained with")
    accelerator = create_accelerator(optimization)
    vae = RQVAEModel.from_pretrained(args.rqvae).to(accelerator.device)
    dataset = load_examples(vae, args, data, required_columns=(text.text_column,))
    own_tokenizer = Path(optimization.output_dir) / "tokenizer"
    resumed = optimization.resume_from_checkpoint is not None and own_tokenizer.exists()
    if text.tokenizer is None and not resumed and accelerator.is_main_process:
        save_new_tokenizer(text, dataset, own_tokenizer)
    accelerator.wait_for_everyone()
    tokenizer = load_tokenizer(text.tokenizer or own_tokenizer, text.text_length)
    model = create_transformer(
        vae, args, cond_vocab_size=len(tokenizer), cond_length=text.text_length, null_cond_id=tokenizer.pad_token_id
    )
    if optimization.gradient_checkpointing:
        model.activation_checkpointing_enable()
    pipeline = RQPipeline(vae, model, tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    if text.validation_prompts:
        pipeline.encode_prompt(text.validation_prompts)  # refuses prompts that are too long before the training

    collate = create_collator(
        vae,
        args,
        data,
        text_column=text.text_column,
        tokenizer=with_bpe_dropout(tokenizer, text.bpe_dropout),
    )

    def samples() -> dict[str, torch.Tensor]:
        if not text.validation_prompts:
            return {}
        generator = torch.Generator(accelerator.device).manual_seed(0)
        with accelerator.autocast():
            return {"samples": pipeline(text.validation_prompts, generator=generator, output_type="pt").images}

    train(
        accelerator,
        optimization,
        model,
        create_stream(accelerator, dataset, collate, optimization, data),
        compute_loss=TransformerLoss(vae, model.config, args, accelerator.autocast),
        make_images=samples,
        configuration=flat_configuration(optimization, data, args, text),
        codes_per_image=math.prod(model.config.code_shape),
    )
    destination = Path(optimization.output_dir) / "pipeline"
    save_finished(accelerator, pipeline, destination, optimization, model_card(model, 'pipe("a prompt")'))
    accelerator.print(f"saved {destination}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
