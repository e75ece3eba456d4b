"""Encode every image of a data set once, so that training on latents neither decodes nor encodes images.

Captioned images, and the training on them:
    accelerate launch examples/extract_latents.py --vae runs/rqvae/rqvae --dataset_name user/captioned-images \\
        --text_column text --mixed_precision bf16 --output_dir data/latents
    accelerate launch examples/train_t2i.py --rqvae runs/rqvae/rqvae --latents data/latents ...
Labelled images, each one also mirrored:
    accelerate launch examples/extract_latents.py --vae runs/rqvae/rqvae --dataset_name uoft-cs/cifar10 \\
        --image_column img --label_column label --mirror --output_dir data/latents
    accelerate launch examples/train_class_conditional.py --rqvae runs/rqvae/rqvae --latents data/latents ...
Those of a KL autoencoder, for MAR:
    accelerate launch examples/extract_latents.py --vae runs/kl/vae --dtype float32 ...
Eight GPUs:
    accelerate launch --multi_gpu --num_processes 8 examples/extract_latents.py ...

OUTPUT_DIR appears when everything is written: parquet files with the captions or classes and a column `latents`, the
bytes of arrays (H, W, C) in bfloat16 or float32; and latents.json with H, W, C, this type and a fingerprint of the
encoder, so that another one is refused. The arrays of an RQ-VAE are the vectors before they are quantized, those of a
KL autoencoder the means and log-variances. Codes and latents are not stored: training samples them in every epoch.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from rq_hf.data import (
    ImageCollator,
    caption_of,
    find_features,
    label_of,
    latents_to_bytes,
    write_description,
    write_latents,
)
from rq_hf.data.latents import DTYPES
from rq_hf.models.continuous_latents import Autoencoder, encode_moments, load_autoencoder
from rq_hf.training import DatasetArguments, check_launch, check_numbers, parse_arguments


@dataclass
class ExtractionArguments:
    _argument_group_name = "extraction"

    vae: str = field(
        metadata={"help": "Trained RQ-VAE or AutoencoderKL: a folder or a Hub id.", "aliases": ["--rqvae"]}
    )
    output_dir: str = field(metadata={"help": "New folder for the latents."})
    text_column: str | None = field(default=None, metadata={"help": "Column with captions to keep."})
    label_column: str | None = field(default=None, metadata={"help": "Column with classes, or their names, to keep."})
    mirror: bool = field(
        default=False,
        metadata={"help": "Store every image a second time, mirrored; replaces --random_flip in training."},
    )
    dtype: str = field(default="bfloat16", metadata={"help": "Type of the stored numbers.", "choices": list(DTYPES)})
    batch_size: int = field(default=64, metadata={"help": "Images that each process encodes at a time."})
    rows_per_file: int = field(default=10_000, metadata={"help": "Rows per parquet file, held in memory until then."})
    mixed_precision: str | None = field(
        default=None,
        metadata={
            "help": "Arithmetic of the encoder (default: as accelerate is configured).",
            "choices": ["no", "fp16", "bf16"],
        },
    )
    cpu: bool = field(default=False, metadata={"help": "Encode on the CPU even where there is an accelerator."})

    def __post_init__(self):
        check_numbers(self, "be at least 1", "batch_size", "rows_per_file")

    @property
    def kept_columns(self) -> tuple[str, ...]:
        return tuple(column for column in (self.text_column, self.label_column) if column is not None)


def collate(examples: list[dict], collator: ImageCollator, args: ExtractionArguments) -> dict:
    """
    Examples -> `pixels` `(B, channels, height, width)`, `rows` of the columns to keep, and the number of
    `skipped_images`.

    Raises `ValueError` for a caption that is not a string and for a label that is neither a string nor an integer.
    """
    pixels, decoded = collator.decode(examples)
    for example in decoded:
        if args.text_column is not None:
            caption_of(example, args.text_column)
        if args.label_column is not None and not isinstance(example[args.label_column], str):
            label_of(example, args.label_column)
    rows = [{column: example[column] for column in args.kept_columns} for example in decoded]
    return {"pixels": pixels, "rows": rows, "skipped_images": len(examples) - len(rows)}


def create_loader(
    accelerator: Accelerator, data: DatasetArguments, args: ExtractionArguments, dataset, vae: Autoencoder
) -> DataLoader:
    """This rank's share of the data set, in batches of [`collate`]."""
    collator = data.create_collator(vae.config.sample_size, in_channels=vae.config.in_channels)
    return DataLoader(
        split_dataset_by_node(dataset, accelerator.process_index, accelerator.num_processes),
        batch_size=args.batch_size,
        collate_fn=partial(collate, collator=collator, args=args),
        num_workers=data.dataloader_num_workers,
    )


def stored_features(args: ExtractionArguments, dataset) -> datasets.Features:
    """Types of the columns to write."""
    features = find_features(dataset)
    return datasets.Features(
        {"latents": datasets.Value("binary")} | {name: features[name] for name in args.kept_columns}
    )


def encode(
    batches: Iterable[dict], vae: Autoencoder, accelerator: Accelerator, args: ExtractionArguments, counts: Counter
) -> Iterator[dict]:
    """Batches of [`collate`] -> rows with latents; counts them and the skipped images."""
    for batch in batches:
        pixels, rows = batch["pixels"], batch["rows"]
        counts["skipped_images"] += batch["skipped_images"]
        if not rows:
            continue
        if args.mirror:
            pixels, rows = torch.cat([pixels, pixels.flip(-1)]), rows * 2
        with torch.no_grad(), accelerator.autocast():
            moments = encode_moments(vae, pixels.to(accelerator.device))  # (B, C, H, W)
        counts["rows"] += len(rows)
        for latents, row in zip(latents_to_bytes(moments.permute(0, 2, 3, 1), DTYPES[args.dtype]), rows):
            yield {"latents": latents, **row}


def main() -> None:
    data, args = parse_arguments(DatasetArguments, ExtractionArguments, description=__doc__, sections=())
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir must be a new or an empty folder; {output_dir} is a file")
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"--output_dir must be a new or an empty folder; there are files in {output_dir}")
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.mixed_precision)
    check_launch(accelerator)
    vae = load_autoencoder(args.vae).to(accelerator.device)
    dataset = data.load(required_columns=args.kept_columns)
    loader = create_loader(accelerator, data, args, dataset, vae)

    unfinished = output_dir.with_name(f"unfinished-{output_dir.name}")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    counts = Counter()
    datasets.disable_progress_bars()  # those of writing the files; there is one of all batches
    batches = tqdm(loader, desc="encoding", unit="batch", disable=not accelerator.is_local_main_process)
    rows = encode(batches, vae, accelerator, args, counts)
    prefix = f"latents-{accelerator.process_index:03d}"
    write_latents(rows, stored_features(args, dataset), unfinished, prefix, args.rows_per_file)

    own = torch.tensor([counts["rows"], counts["skipped_images"]], device=accelerator.device)
    written, skipped = accelerator.reduce(own, "sum").tolist()  # waits for the files of all processes
    if not written:
        raise ValueError(f"the data set has no images to encode ({skipped} could not be decoded)")
    if accelerator.is_main_process:
        write_description(unfinished, vae, DTYPES[args.dtype])
        os.rename(unfinished, output_dir)
    accelerator.print(f"saved {written:,} rows in {output_dir}; {skipped:,} images could not be decoded")
    accelerator.end_training()


if __name__ == "__main__":
    main()
