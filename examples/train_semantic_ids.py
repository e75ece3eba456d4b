"""Semantic IDs of items from their embedding vectors: train an RQEmbeddingModel and encode all items.

A parquet file with a vector per item:
    accelerate launch examples/train_semantic_ids.py --data_files vectors.parquet --vector_column embedding \\
        --item_column id --output_dir runs/ids
Residual k-means of the vectors themselves, in seconds and without training:
    accelerate launch examples/train_semantic_ids.py --no_encoder ...
Three levels of different sizes, found by beam search, and IDs of their own for all items without a suffix:
    ... --codebook_sizes 256 512 1024 --beam_size 8 --resolve next_nearest
Two processes on a CPU:
    torchrun --nproc_per_node 2 examples/train_semantic_ids.py --cpu ...
Resume after an interruption:
    ... --resume_from_checkpoint latest

OUTPUT_DIR/semantic_ids has the model, the IDs (semantic_ids.parquet), and figures about them (report.json), which are
also printed: rq_hf.SemanticIds.from_pretrained("OUTPUT_DIR/semantic_ids").
Vectors may have any scale: they are standardised, and both losses are relative to variances. The codebooks start as
k-means of the new encoder's latents; then they follow as moving averages.
"""

import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator

from rq_hf import RQEmbeddingModel, SemanticIds
from rq_hf.data import TrainingStream, VectorCollator, load_vector_dataset, read_items, read_vectors
from rq_hf.training import (
    RQEmbeddingLoss,
    RunArguments,
    check_numbers,
    check_unsharded,
    evaluate_semantic_ids,
    flat_configuration,
    initialize_embedding_model,
    parse_arguments,
    save_finished,
    train,
    training_sections,
)

HIDDEN_DIMS = (512, 256, 128)
FIRST_VECTORS = 256  # per codeword, that k-means of the new encoder's latents is given


@dataclass
class VectorRunArguments(RunArguments):
    """Without options of large models."""

    preset: str | None = field(default=None, init=False)
    gradient_checkpointing: bool = field(default=False, init=False)


@dataclass
class VectorArguments:
    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub, or a local folder of parquet files."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of the data set."})
    data_files: str | None = field(
        default=None,
        metadata={"help": "Instead of --dataset_name: local parquet, arrow or JSON files, globs allowed."},
    )
    split: str = field(default="train", metadata={"help": "Split to read."})
    vector_column: str = field(default="vector", metadata={"help": "Column with the vectors, lists of numbers."})
    item_column: str | None = field(
        default=None, metadata={"help": "Column that names the items (default: the numbers of the rows)."}
    )
    validation_files: str | None = field(
        default=None,
        metadata={"help": "Files with held-out vectors, like --data_files, for metrics every --image_logging_steps."},
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that read vectors; 0 reads in the main process."}
    )

    def __post_init__(self):
        check_numbers(self, "be at least 0", "dataloader_num_workers")

    def load(self) -> datasets.Dataset:
        return load_vector_dataset(
            self.dataset_name,
            self.dataset_config,
            self.data_files,
            self.split,
            vector_column=self.vector_column,
            item_column=self.item_column,
        )

    def read(self, dataset: datasets.Dataset) -> torch.Tensor:
        return read_vectors(dataset, self.vector_column)

    def read_validation(self, channels: int) -> torch.Tensor | None:
        """Raises `ValueError` for vectors of other `channels`."""
        if self.validation_files is None:
            return None
        vectors = self.read(load_vector_dataset(data_files=self.validation_files, vector_column=self.vector_column))
        if vectors.shape[1] != channels:
            raise ValueError(
                f"--validation_files must have vectors of {channels} numbers like the data, got {vectors.shape[1]}"
            )
        return vectors

    def create_stream(self, accelerator: Accelerator, dataset: datasets.Dataset, run: RunArguments) -> TrainingStream:
        """This rank's share of the vectors."""
        return TrainingStream(
            dataset.select_columns(self.vector_column).with_format("numpy"),
            VectorCollator(self.vector_column),
            batch_size=run.train_batch_size,
            seed=run.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=self.dataloader_num_workers,
        )


@dataclass
class EmbeddingArguments:
    _argument_group_name = "model"

    encoder: bool = field(
        default=True, metadata={"help": "Without, the vectors themselves are quantized, by k-means alone."}
    )
    hidden_dims: list[int] | None = field(
        default=None,
        metadata={
            "help": "Widths of the encoder's hidden layers, and in reverse of the decoder's (default: 512 256 128)."
        },
    )
    latent_dim: int | None = field(default=None, metadata={"help": "Channels of the encoder's output (default: 32)."})
    codebook_sizes: list[int] = field(
        default_factory=lambda: [256], metadata={"help": "Number of codewords, of all levels or of each."}
    )
    depth: int | None = field(
        default=None, metadata={"help": "Codes per item (default: one for each of several --codebook_sizes, or 3)."}
    )
    codebook_ema_decay: float = field(default=0.99, metadata={"help": "Decay of the codebooks' moving averages."})
    commitment_weight: float = field(default=0.1, metadata={"help": "Weight β of the commitment loss."})

    def __post_init__(self):
        check_numbers(self, "be at least 1", "hidden_dims", "latent_dim", "codebook_sizes", "depth")
        check_numbers(self, "lie in [0, 1)", "codebook_ema_decay")
        check_numbers(self, "be at least 0", "commitment_weight")
        if not self.encoder and (self.hidden_dims or self.latent_dim):
            raise ValueError("--hidden_dims and --latent_dim are of the encoder: leave them out with --no_encoder")
        sizes = len(self.codebook_sizes)
        if self.depth is None:
            self.depth = 3 if sizes == 1 else sizes
        if sizes not in (1, self.depth):
            raise ValueError(f"--codebook_sizes must be one number or --depth {self.depth} of them, got {sizes}")

    def create_model(self, input_dim: int) -> RQEmbeddingModel:
        return RQEmbeddingModel(
            input_dim,
            hidden_dims=tuple(self.hidden_dims or HIDDEN_DIMS) if self.encoder else (),
            latent_dim=self.latent_dim,
            codebook_size=self.codebook_sizes[0] if len(self.codebook_sizes) == 1 else tuple(self.codebook_sizes),
            depth=self.depth,
            ema_decay=self.codebook_ema_decay,
        )


@dataclass
class IdArguments:
    _argument_group_name = "IDs"

    beam_size: int = field(
        default=1, metadata={"help": "Partial sums of codewords that are kept when items are encoded; 1 is greedy."}
    )
    balanced: bool = field(default=False, metadata={"help": "Give no last code to more than its share of all items."})
    resolve: str = field(
        default="suffix",
        metadata={
            "help": "Items with the same codes: a further code for everyone, other codes for all but one, or nothing.",
            "choices": ["suffix", "next_nearest", "keep"],
        },
    )

    def __post_init__(self):
        check_numbers(self, "be at least 1", "beam_size")


def check_sizes(model: RQEmbeddingModel, count: int, resolve: str) -> None:
    """Raises `ValueError` for fewer vectors than codewords, and for fewer IDs than items where each needs its own."""
    sizes = model.codebook_sizes
    if max(sizes) > count:
        raise ValueError(f"--codebook_sizes must be at most the number of vectors, {count}, got {max(sizes)}")
    if resolve == "next_nearest" and math.prod(sizes) < count:
        raise ValueError(
            f"--resolve next_nearest needs as many IDs as items, {count}, got {'×'.join(map(str, sizes))}"
        )


def describe_damage(damage: dict) -> str:
    """What [`SemanticIds.resolve`] did, in a sentence."""
    before, after = damage["collision_rate"]
    text = f"{damage['method']}: items that share their ID {before:.2%} → {after:.2%}"
    if damage["suffix_size"]:
        text += f"; one more code, a suffix in [0, {damage['suffix_size']})"
    if damage["items_changed"]:
        errors = ("–" if error is None else f"{error:.4f}" for error in damage["relative_error"])
        text += f"; other codes for {damage['items_changed']:,} items, relative error {' → '.join(errors)}"
    return f"{text}."


def main() -> None:
    run, data, args, coding = parse_arguments(
        VectorRunArguments,
        VectorArguments,
        EmbeddingArguments,
        IdArguments,
        description=__doc__,
        sections=(),
        max_train_steps=10_000,
        train_batch_size=1024,
        learning_rate=3e-3,
        lr_warmup_steps=100,
        weight_decay=0.0,
        ema_decay=0.0,
    )
    configuration = flat_configuration(run, data, args, coding)
    accelerator = run.create_accelerator(configuration)
    check_unsharded(accelerator)

    dataset = data.load()
    items = list(range(len(dataset))) if data.item_column is None else read_items(dataset, data.item_column)
    model = args.create_model(len(dataset[0][data.vector_column]))
    check_sizes(model, len(dataset), coding.resolve)
    held_out = data.read_validation(model.config.input_dim)

    if args.encoder:
        rows = np.random.default_rng(run.seed).permutation(len(dataset))
        first = dataset.select(rows[: FIRST_VECTORS * max(model.codebook_sizes)])
        batch_size = min(run.train_batch_size * accelerator.num_processes, len(dataset))
        initialize_embedding_model(model.to(accelerator.device), data.read(first).to(accelerator.device), batch_size)
        optimizer = run.create_optimizer(model)
        train(
            accelerator,
            model,
            optimizer,
            run.create_scheduler(optimizer),
            data.create_stream(accelerator, dataset, run),
            RQEmbeddingLoss(model, commitment_weight=args.commitment_weight),
            evaluate=None if held_out is None else lambda step: evaluate_semantic_ids(model, held_out),
            examples="vectors",
            configuration=configuration,
            **run.training_options(),
        )
    else:
        accelerator.init_trackers("logs", config=configuration)

    destination = Path(run.output_dir) / "semantic_ids"
    ids, card, files = None, "", {}
    if accelerator.is_main_process:
        vectors = data.read(dataset)
        if not args.encoder:
            model.to(accelerator.device).fit(vectors.to(accelerator.device))
        encoded = SemanticIds.encode(model, items, vectors, coding.beam_size, coding.balanced)
        report = encoded.report(vectors)
        ids, damage = encoded.resolve(coding.resolve, vectors)
        summary = f"{report}\n\n{describe_damage(damage)}"
        accelerator.print(summary)
        sections = training_sections(accelerator, configuration, dataset, "feature-extraction")
        sections["details"] = f"## Codes of the model\n\n{summary}\n\n{sections['details']}"
        card = ids.card(run.upload_to or str(destination), **sections)
        figures = json.dumps({"report": report, "resolved": damage}, indent=2) + "\n"
        files["report.json"] = functools.partial(Path.write_text, data=figures)
    save_finished(accelerator, ids, destination, card, run.upload_to, files)
    accelerator.end_training()


if __name__ == "__main__":
    main()
