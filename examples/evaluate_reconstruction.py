"""Evaluate the reconstructions of a tokenizer, an RQ-VAE or a KL autoencoder, on any image data set.

PSNR, SSIM and codebook usage on the validation images, and rFID by the Inception network of pytorch-fid:
    accelerate launch examples/evaluate_reconstruction.py --vae runs/rqvae/rqvae --dataset_name user/images \\
        --split validation --network pytorch-fid --network_weights pt_inception-2015-12-05-6726825d.pth \\
        --output_dir runs/rqvae/reconstruction
And LPIPS, and all of it for reconstructions from the first code only, the first two, and so on:
    ... --lpips_vgg vgg16-397923af.pth --lpips_heads vgg.pth --all_depths
Without anything to download, for 32×32 images:
    ... --network cifar10-small
Eight GPUs:
    accelerate launch --multi_gpu --num_processes 8 examples/evaluate_reconstruction.py ...

OUTPUT_DIR/report.json holds every figure with what it depends on, and --model_card adds them to a card. The Fréchet
distance is that between all images and their reconstructions; it is called rFID for the Inception network only.
Results do not depend on the number of processes. All images have 8 bits, the reconstructions by --uint8_rule.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm

from rq_hf.data import ImageCollator
from rq_hf.evaluation.reconstruction import ReconstructionMeter
from rq_hf.evaluation.report import Report
from rq_hf.files import checksum, weight_checksums
from rq_hf.images import UINT8_RULES
from rq_hf.metrics import LPIPS
from rq_hf.metrics.feature_networks import FeatureNetwork, load_feature_network
from rq_hf.metrics.statistics import FeatureStatistics
from rq_hf.metrics.weights import find_weights
from rq_hf.models import RQVAEModel
from rq_hf.models.continuous_latents import load_autoencoder
from rq_hf.training import DatasetArguments, check_launch, check_numbers, parse_arguments
from rq_hf.training.checkpoints import failing_together


@dataclass
class ReconstructionArguments:
    _argument_group_name = "evaluation"

    vae: str = field(metadata={"help": "RQ-VAE or AutoencoderKL: a folder or a Hub id."})
    output_dir: str = field(metadata={"help": "Folder for report.json."})
    network: str | None = field(
        default=None,
        metadata={
            "help": "Features for a Fréchet distance: a protocol of Inception, cifar10-small, or CLIP or DINOv2, a "
            "folder or a Hub id (default: no Fréchet distance)."
        },
    )
    network_weights: str | None = field(
        default=None, metadata={"help": "Weights of Inception: a file, or user/repository/file on the Hub."}
    )
    lpips_vgg: str | None = field(
        default=None, metadata={"help": "Weights of LPIPS's VGG16: a file, or user/repository/file on the Hub."}
    )
    lpips_heads: str | None = field(default=None, metadata={"help": "Weights of LPIPS's linear heads, likewise."})
    all_depths: bool = field(
        default=False, metadata={"help": "Also reconstruct from the first codes of an RQ-VAE, 1, 2, ... of them."}
    )
    name: str | None = field(
        default=None, metadata={"help": "Name of the data in the report (default: of the data set or files)."}
    )
    num_images: int | None = field(default=None, metadata={"help": "Only the first N images (default: all)."})
    resolution: int | None = field(default=None, metadata={"help": "Height and width (default: the tokenizer's)."})
    uint8_rule: str = field(default="round", metadata={"help": "From floats to 8 bits.", "choices": list(UINT8_RULES)})
    batch_size: int = field(default=64, metadata={"help": "Images that each process reconstructs at a time."})
    mixed_precision: str | None = field(
        default=None,
        metadata={
            "help": "Arithmetic of the tokenizer (default: as accelerate is configured).",
            "choices": ["no", "fp16", "bf16"],
        },
    )
    cpu: bool = field(default=False, metadata={"help": "Evaluate on the CPU even where there is an accelerator."})
    model_card: str | None = field(
        default=None, metadata={"help": "A README.md whose figures are updated; needs --dataset_type."}
    )
    dataset_type: str | None = field(
        default=None, metadata={"help": "Hub id of the data set, or a name like one, for the card."}
    )

    def __post_init__(self):
        check_numbers(self, "be at least 1", "num_images", "resolution", "batch_size")
        if (self.lpips_vgg is None) != (self.lpips_heads is None):
            raise ValueError("LPIPS needs both --lpips_vgg and --lpips_heads")
        if (self.model_card is None) != (self.dataset_type is None):
            raise ValueError("--model_card and --dataset_type go together")
        if self.model_card is not None and not os.path.isfile(self.model_card):
            raise ValueError(f"--model_card must be a file, got {self.model_card!r}")


def own_batches(
    dataset: datasets.Dataset | datasets.IterableDataset,
    num_images: int | None,
    batch_size: int,
    rank: int,
    world: int,
) -> Iterator[list[dict]]:
    """Every `world`-th batch of the data set from batch `rank` on; they are the same for any number of processes."""
    if isinstance(dataset, datasets.Dataset):
        count = len(dataset) if num_images is None else min(num_images, len(dataset))
        for start in range(rank * batch_size, count, world * batch_size):
            yield list(dataset.select(range(start, min(start + batch_size, count))))
        return
    examples = itertools.islice(dataset, num_images)
    batches = iter(lambda: list(itertools.islice(examples, batch_size)), [])
    yield from itertools.islice(batches, rank, None, world)


def measure(
    accelerator: Accelerator, meter: ReconstructionMeter, batches: Iterable[list[dict]], collate: ImageCollator
) -> int:
    """Adds the batches of all processes to the meter, on every process, in the order of the data set. Returns the
    number of images that could not be decoded."""
    batches, skipped = iter(batches), 0
    progress = tqdm(desc="reconstructing", unit="image", disable=not accelerator.is_local_main_process)
    while True:
        measured = None
        with failing_together(ValueError):
            examples = next(batches, None)
            if examples is not None:
                pixels, decoded = collate.decode(examples)
                measured = {"skipped": len(examples) - len(decoded)}
                measured |= meter.measure(pixels) if decoded else {"count": 0}
        gathered = [one for one in gather_object([measured]) if one is not None]
        if not gathered:
            progress.close()
            return skipped
        for one in gathered:
            skipped += one["skipped"]
            progress.update(one["count"])
            if one["count"]:
                meter.add(one)


def create_report(
    data: DatasetArguments,
    args: ReconstructionArguments,
    resolution: int,
    meter: ReconstructionMeter,
    network: FeatureNetwork | None,
    mixed_precision: str,
) -> Report:
    """The figures of a meter, with what they depend on."""
    folder = args.vae if os.path.isdir(args.vae) else snapshot_download(args.vae)
    images = data.describe(resolution, args.num_images)
    images["dataset"] = args.name or images["dataset"]
    report = Report(
        model=args.vae, weights=weight_checksums(folder), uint8_rule=args.uint8_rule, sampler={}, seeds=[], **images
    )
    if args.lpips_vgg is not None:
        vgg, heads = (checksum(find_weights(source)) for source in (args.lpips_vgg, args.lpips_heads))
        perceptual = {"network": "vgg16", "protocol": "LPIPS", "network_sha256": vgg}
    result = meter.result()
    count = result["count"]
    for depth, figures in result["depths"].items():
        settings = {"mixed_precision": mixed_precision} | ({} if depth is None else {"depth": depth})
        for name in ("psnr", "ssim"):
            report.add(name, figures[name], count, **settings)
        if args.lpips_vgg is not None:
            report.add("lpips", figures["lpips"], count, network=perceptual, heads_sha256=heads, **settings)
        if network is not None:
            provenance = {**images, "count": count, **network.identity(), "uint8_rule": "stored"}
            report.add(
                network.distance_metric,
                figures["frechet_distance"],
                count,
                reference=FeatureStatistics(meter.moments["images"], provenance),
                **settings,
            )
    for name in ("usage", "perplexity"):
        for depth, value in enumerate(result.get(name, []), start=1):
            report.add(f"codebook_{name}", value, count, depth=depth)
    return report


def main() -> None:
    data, args = parse_arguments(DatasetArguments, ReconstructionArguments, description=__doc__, sections=())
    path = Path(args.output_dir) / "report.json"
    if path.exists():
        raise ValueError(f"{path} exists; choose another --output_dir")
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.mixed_precision)
    check_launch(accelerator)
    vae = load_autoencoder(args.vae).to(accelerator.device)
    network = perceptual = None
    if args.network is not None:
        network = load_feature_network(args.network, args.network_weights).to(accelerator.device)
    if args.lpips_vgg is not None:
        perceptual = LPIPS.from_pretrained(args.lpips_vgg, args.lpips_heads).to(accelerator.device)
    depths = None
    if args.all_depths:
        if not isinstance(vae, RQVAEModel):
            raise ValueError("--all_depths needs an RQ-VAE, got an AutoencoderKL")
        depths = list(range(1, vae.config.depth + 1))
    meter = ReconstructionMeter(vae, network, perceptual, depths, args.uint8_rule, accelerator.autocast)

    resolution = args.resolution or vae.config.sample_size
    dataset = data.load()
    batches = own_batches(
        dataset, args.num_images, args.batch_size, accelerator.process_index, accelerator.num_processes
    )
    collate = data.create_collator(resolution, in_channels=vae.config.in_channels)
    skipped = measure(accelerator, meter, batches, collate)
    if accelerator.is_main_process:
        report = create_report(data, args, resolution, meter, network, accelerator.mixed_precision)
        path.parent.mkdir(parents=True, exist_ok=True)
        report.save(path)
        if args.model_card is not None:
            report.update_card(args.model_card, task_type="image-to-image", dataset_type=args.dataset_type)
        print(f"{report.table()}\n\nsaved {path}; {skipped:,} images could not be decoded")
    accelerator.end_training()


if __name__ == "__main__":
    main()
