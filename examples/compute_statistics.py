"""Compute the mean and covariance of the features of real images, which FID and other distances compare with.

The training images of a data set, cropped and resized as for training:
    accelerate launch examples/compute_statistics.py --dataset_name ILSVRC/imagenet-1k --streaming --resolution 256 \\
        --network pytorch-fid --network_weights pt_inception-2015-12-05-6726825d.pth --output_file imagenet.safetensors
A folder of images as they are; images of ADM, (N, height, width, 3) in arr_0:
    ... --dataset_name photos --network clean-fid ...
    ... --images VIRTUAL_imagenet256_labeled.npz --network torch-fidelity --keep_features ...
Statistics of another program, mu and sigma, of which everything that the file does not say must be given:
    ... --moments imagenet_256_train.npz --name ILSVRC/imagenet-1k --split train --count 1281167 \\
        --transform "centre crop and bilinear resize to 256×256" --uint8_rule stored --network pytorch-fid ...
Eight GPUs; two processes on a CPU:
    accelerate launch --multi_gpu --num_processes 8 examples/compute_statistics.py ...
    torchrun --nproc_per_node 2 examples/compute_statistics.py --cpu ...

OUTPUT_FILE holds what the statistics were computed from, besides them: the data set and its split, how many images and
how they were cropped and resized, the network with the SHA-256 of its weights, and how the images got 8 bits. It
appears when everything is computed, and it is the same for any number of processes, to the last bit. With
--keep_features it also holds the features of every image, which KID, precision, recall and CMMD need.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from rq_hf.data.collators import decode_image
from rq_hf.images import UINT8_RULES, to_pixels, to_uint8
from rq_hf.metrics.feature_networks import FeatureNetwork, load_feature_network
from rq_hf.metrics.moments import FeatureMoments
from rq_hf.metrics.statistics import FLOATS, STORED, FeatureStatistics
from rq_hf.training import DatasetArguments, check_launch, check_numbers, parse_arguments
from rq_hf.training.checkpoints import failing_together
from rq_hf.untrusted_files import NumpyArchive

SHARD = 128  # images that a process takes at a time
CHUNK = 32  # images that the network sees together: rounding depends on their number
BLOCK = 4096  # features that are added to the moments together: likewise


@dataclass
class ImageArguments(DatasetArguments):
    split: str = field(default="train", metadata={"help": "Split to read; of an .npz file, the one to note."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Further threads that decode images."})
    images: str | None = field(
        default=None, metadata={"help": "Instead of a data set: .npz file with 8-bit RGB images in arr_0."}
    )
    moments: str | None = field(
        default=None,
        metadata={"help": "Or .npz file with a mean mu and covariance sigma, to note what they are of."},
    )
    resolution: int | None = field(
        default=None,
        metadata={"help": "Crop and resize the images of a data set to this height and width (default: as they are)."},
    )
    num_images: int | None = field(default=None, metadata={"help": "Use only the first images (default: all)."})
    name: str | None = field(
        default=None, metadata={"help": "Name of the data in reports (default: of the data set or file)."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "be at least 1", "resolution")
        check_numbers(self, "be at least 2", "num_images")
        sources = {name: getattr(self, name) for name in ("dataset_name", "data_files", "images", "moments")}
        given = [name for name, value in sources.items() if value is not None]
        if len(given) != 1:
            options = ", ".join(f"--{name}" for name in sources)
            raise ValueError(f"expected one of {options}, got {' and '.join(f'--{n}' for n in given) or 'none'}")
        applies = {"images": ("num_images",), "moments": ()}.get(given[0], ("num_images", "resolution"))
        for name in ("num_images", "resolution"):
            if getattr(self, name) is not None and name not in applies:
                raise ValueError(f"--{name} does not apply to --{given[0]}")

    def describe_images(self) -> dict[str, str]:
        """Provenance of the images, as far as it is known before they are read."""
        described = self.describe(self.resolution, self.num_images)
        return described | {"dataset": self.name or described["dataset"] or Path(self.images or self.moments).name}


@dataclass
class StatisticsArguments:
    _argument_group_name = "statistics"

    output_file: str = field(metadata={"help": "New .safetensors file."})
    network: str = field(
        metadata={
            "help": "pytorch-fid, torch-fidelity or clean-fid with --network_weights; cifar10-small; or the folder or "
            "Hub id of a CLIP or DINOv2 model."
        }
    )
    network_weights: str | None = field(
        default=None, metadata={"help": "Weights of Inception: a file, or user/repository/file on the Hub."}
    )
    network_sha256: str | None = field(
        default=None, metadata={"help": "Of other weights than those that everyone uses for FID: their SHA-256."}
    )
    keep_features: bool = field(default=False, metadata={"help": "Save the features of every image, too."})
    count: int | None = field(default=None, metadata={"help": "Of --moments: number of images."})
    transform: str | None = field(default=None, metadata={"help": "Of --moments: how they were cropped and resized."})
    uint8_rule: str | None = field(
        default=None,
        metadata={
            "help": "Of --moments: how they got 8 bits; stored if they had them from the start, none if they stayed "
            "floats.",
            "choices": [*UINT8_RULES, STORED, FLOATS],
        },
    )
    cpu: bool = field(default=False, metadata={"help": "Compute on the CPU even where there is an accelerator."})

    def __post_init__(self):
        check_numbers(self, "be at least 1", "count")
        if Path(self.output_file).suffix != ".safetensors":
            raise ValueError(f"--output_file must end in .safetensors, got {self.output_file}")
        if Path(self.output_file).exists():
            raise ValueError(f"--output_file must be new; {self.output_file} exists")

    def describe_moments(self, has_moments: bool) -> dict[str, str | int]:
        """What the options say of `--moments`. Raises `ValueError` where one is missing, or given without it."""
        options = {name: getattr(self, name) for name in ("count", "transform", "uint8_rule")}
        for name, value in options.items():
            if (value is not None) != has_moments:
                raise ValueError(f"--moments and --{name} go together, got {value!r}")
        if has_moments and self.keep_features:
            raise ValueError("--keep_features does not apply to --moments")
        return options


class Decoder:
    """Examples of a data set -> images `(3, height, width)` in uint8, or `None` for those to leave out."""

    def __init__(self, data: ImageArguments):
        self.data = data

    def __call__(self, example: dict) -> torch.Tensor | None:
        data = self.data
        try:
            image = decode_image(example[data.image_column])
            if data.resolution is None:
                return torch.from_numpy(np.array(image)).permute(2, 0, 1)
            pixels = to_pixels(image, data.resolution, data.center_crop)
        except Exception as error:
            if data.skip_corrupt_images:
                return None
            raise ValueError(
                f"the image of example {example['example_index']} cannot be decoded ({error}); "
                "--skip_corrupt_images leaves such images out and counts them"
            ) from error
        return to_uint8((pixels[None] + 1) / 2, "round")[0]  # the 8 bits that it was resized to


def shards_of_dataset(dataset: datasets.Dataset | datasets.IterableDataset) -> Iterator[Sequence[dict]]:
    """Undecoded examples in order, [`SHARD`] at a time."""
    if isinstance(dataset, datasets.Dataset):
        for start in range(0, len(dataset), SHARD):
            yield dataset.select(range(start, min(start + SHARD, len(dataset))))
    else:
        examples = iter(dataset)
        while shard := list(itertools.islice(examples, SHARD)):
            yield shard


def shards_of_archive(archive: NumpyArchive, num_images: int | None) -> Iterator[Sequence[torch.Tensor]]:
    """Images `(3, height, width)` of an `.npz` file in order, [`SHARD`] at a time. Raises `ValueError` for one without
    8-bit RGB images."""
    shape, dtype = archive.headers.get("arr_0", ((), None))
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        found = f"{dtype} {shape}" if shape else "no arr_0"
        raise ValueError(f"--images must have uint8 images (N, height, width, 3) in arr_0, got {found}")
    left = shape[0] if num_images is None else num_images
    for part in archive.read_in_parts("arr_0", SHARD):
        yield torch.from_numpy(part[:left].copy()).permute(0, 3, 1, 2)
        left -= len(part)
        if left <= 0:
            return


def own_shards(shards: Iterable[Sequence], rank: int, world_size: int) -> Iterator[Sequence]:
    """This process's shard of every round; an empty one where the last round has fewer."""
    shards = iter(shards)
    while taken := list(itertools.islice(shards, world_size)):
        yield taken[rank] if rank < len(taken) else []


@torch.no_grad()
def extract(network: FeatureNetwork, images: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Features `(N, F)` of images in order, at most [`CHUNK`] of one size at a time."""
    features = [torch.empty(0, network.num_features)]
    for _, group in itertools.groupby(images, key=lambda image: image.shape):
        while chunk := list(itertools.islice(group, CHUNK)):
            features.append(network(torch.stack(chunk).to(device)).features.cpu())
    return torch.cat(features)


def gather_features(
    accelerator: Accelerator,
    network: FeatureNetwork,
    shards: Iterable[Sequence],
    decode: Callable[[object], torch.Tensor | None],
    counts: Counter,
    *,
    num_threads: int,
    total: int | None,
) -> Iterator[torch.Tensor]:
    """The features of all shards in order, on all processes; counts the images that could not be decoded."""
    progress = tqdm(desc="features", unit="image", total=total, disable=not accelerator.is_main_process)
    with progress, ThreadPoolExecutor(num_threads + 1) as pool:
        for shard in own_shards(shards, accelerator.process_index, accelerator.num_processes):
            with failing_together(ValueError):
                images = (image for image in pool.map(decode, shard) if image is not None)
                own = extract(network, images, accelerator.device)
            for features, size in gather_object([(own, len(shard))]):
                counts["skipped_images"] += size - len(features)
                progress.update(len(features))
                yield features


def in_blocks(parts: Iterable[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """Features of any numbers of images -> the same, `size` at a time; the last block may be smaller."""
    pending = []
    for part in parts:
        pending.append(part)
        if sum(map(len, pending)) >= size:
            *blocks, last = torch.cat(pending).split(size)
            yield from blocks
            pending = [last]
    if pending and len(rest := torch.cat(pending)):
        yield rest


def main() -> None:
    data, args = parse_arguments(
        ImageArguments,
        StatisticsArguments,
        description=__doc__,
        sections=(),
        usage="%(prog)s --network NETWORK --output_file FILE [options]",
    )
    of_moments = args.describe_moments(data.moments is not None)
    accelerator = Accelerator(cpu=args.cpu)
    check_launch(accelerator)
    with accelerator.local_main_process_first():
        network = load_feature_network(args.network, args.network_weights, args.network_sha256)
    network = network.to(accelerator.device)
    provenance = data.describe_images() | network.identity()
    if data.moments is not None:
        with failing_together(ValueError):
            if accelerator.is_main_process:
                statistics = FeatureStatistics.load(data.moments, **provenance | of_moments)
                if statistics.moments.num_features != network.num_features:
                    raise ValueError(
                        f"{data.moments} has {statistics.moments.num_features} features, {network.name} has "
                        f"{network.num_features}"
                    )
                statistics.save(args.output_file)
        accelerator.print(f"saved the statistics of {of_moments['count']:,} images in {args.output_file}")
        accelerator.end_training()
        return

    decode, total = Decoder(data), data.num_images
    if data.images is not None:
        archive = NumpyArchive(data.images)
        shards, decode = shards_of_archive(archive, data.num_images), torch.Tensor.contiguous
    else:
        dataset = data.load()
        if data.num_images is not None:
            dataset = dataset.take(data.num_images)
        if isinstance(dataset, datasets.Dataset):
            total = len(dataset)
        shards = shards_of_dataset(dataset)
    counts, moments, kept = Counter(), FeatureMoments(network.num_features), []
    features = gather_features(
        accelerator, network, shards, decode, counts, num_threads=data.dataloader_num_workers, total=total
    )
    for block in in_blocks(features, BLOCK):
        if accelerator.is_main_process:
            moments.update(block)
            kept += [block] if args.keep_features else []
    skipped = counts["skipped_images"]
    with failing_together(ValueError):
        if accelerator.is_main_process:
            if moments.count < 2:
                raise ValueError(f"expected at least 2 images, got {moments.count} ({skipped} could not be decoded)")
            provenance |= {"count": moments.count, "uint8_rule": STORED}
            statistics = FeatureStatistics(moments, provenance, torch.cat(kept) if kept else None)
            statistics.save(args.output_file)
            print(
                f"saved the statistics of {moments.count:,} images in {args.output_file} (SHA-256 "
                f"{statistics.sha256}); {skipped:,} images could not be decoded"
            )
    accelerator.end_training()


if __name__ == "__main__":
    main()
