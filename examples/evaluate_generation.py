"""Sample images from a pipeline and measure them: FID and others, each with everything that it depends on.

Class-balanced images, compared with statistics that compute_statistics.py wrote:
    accelerate launch examples/evaluate_generation.py --model runs/classes/pipeline --num_images 50000 \\
        --network pytorch-fid --network_weights pt_inception-2015-12-05-6726825d.pth \\
        --reference imagenet-train.safetensors --metrics fid inception_score --output_dir runs/classes/evaluation
One image per caption, best of 16 by CLIP:
    accelerate launch examples/evaluate_generation.py --model runs/t2i/pipeline --data_files "val/*.parquet" \\
        --acceptance_rate 0.0625 --scorer openai/clip-vit-base-patch32 \\
        --metrics clip_score --clip_model openai/clip-vit-base-patch32 --output_dir runs/t2i/evaluation
The settings of a published protocol; options given as well override them:
    ... --protocol NAME
Eight GPUs; two processes on a CPU:
    accelerate launch --multi_gpu --num_processes 8 examples/evaluate_generation.py ...
    torchrun --nproc_per_node 2 examples/evaluate_generation.py --cpu ...
Resume after an interruption, or add metrics and repeats to a finished run: the same command again.

Every image has a seed of its own: image j is sampled with --seed + j. Images belong to shards of --shard_size, each
made by one process: OUTPUT_DIR/shards keeps what the networks say of every image, 8 KB for the features of Inception.
What is finished is kept, and the result does not depend on the number of processes or on interruptions. The batch
size, the device and the number of threads change no seed, only rounding. OUTPUT_DIR/plan.json says which images these
are; a folder takes no others.
OUTPUT_DIR/report.json has the figures of the last call, and report-TIME.json those of earlier ones.

Class c has every C-th image of C classes; where C does not divide --num_images, the first classes have one more.
Captions that occur twice are used twice. More images than captions are refused; see --images_per_caption.
--repeats R samples R times --num_images, with further seeds, and reports mean and deviation.
"""

import os
import statistics
import time
from argparse import ArgumentParser
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm
from transformers import AutoTokenizer, CLIPModel

from rq_hf import MARPipeline, RQPipeline
from rq_hf.argument_checks import check_source
from rq_hf.evaluation.captions import choose_captions, load_captions, read_captions, truncated_cond_ids
from rq_hf.evaluation.generation import (
    SAMPLE_TYPES,
    GenerationFolder,
    GenerationPlan,
    generate_shard,
    image_size,
    resolve_sampling,
)
from rq_hf.evaluation.protocols import Protocol, load_protocol, read_protocols
from rq_hf.evaluation.report import Report
from rq_hf.evaluation.sample_metrics import NEEDS, SampleMetrics, network_scorer
from rq_hf.files import checksum, weight_checksums
from rq_hf.images import UINT8_RULES
from rq_hf.metrics import ClassifierScorer, CLIPScorer, load_feature_network
from rq_hf.metrics.feature_networks import SMALL_CLASSIFIER, FeatureNetwork, find_model_file
from rq_hf.metrics.statistics import FeatureStatistics
from rq_hf.pipelines.rejection_sampling import Scorer
from rq_hf.training import check_launch, check_numbers, parse_arguments
from rq_hf.training.checkpoints import failing_together

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class GenerationArguments:
    _argument_group_name = "images"

    model: str = field(metadata={"help": "Pipeline to evaluate: a folder or a Hub id."})
    output_dir: str = field(metadata={"help": "New folder for the shards and the report, or that of an earlier run."})
    protocol: str | None = field(
        default=None,
        metadata={
            "help": "Published protocol, whose settings are the defaults of all options; docs/evaluation.md.",
            "choices": sorted(read_protocols()),
        },
    )
    num_images: int | None = field(
        default=None, metadata={"help": "Images of one repeat (default of a text-to-image model: one per caption)."}
    )
    repeats: int = field(default=1, metadata={"help": "Sets of so many images, each with further seeds."})
    seed: int = field(default=0, metadata={"help": "Seed of the first image."})
    batch_size: int = field(default=32, metadata={"help": "Images or candidates that each process samples at a time."})
    shard_size: int = field(default=256, metadata={"help": "Images per shard, which are lost if it is interrupted."})
    acceptance_rate: float = field(
        default=1.0, metadata={"help": "Rejection sampling: keep the best of 1 / this many candidates for each image."}
    )
    scorer: str | None = field(
        default=None,
        metadata={
            "help": "What tells the best candidate: a classifier or, for captions, a CLIP model of transformers, a "
            "folder or a Hub id; or cifar10-small."
        },
    )
    dtype: str = field(default="float32", metadata={"help": "Arithmetic of the pipeline.", "choices": list(DTYPES)})
    compile: bool = field(default=False, metadata={"help": "Sample faster; see the pipeline's compile()."})
    uint8_rule: str = field(
        default="round",
        metadata={"help": "How pixels are rounded to 8 bits; docs/evaluation.md.", "choices": list(UINT8_RULES)},
    )
    save_samples: str | None = field(
        default=None,
        metadata={
            "help": "Keep the images in OUTPUT_DIR/samples, as one file per image or one of NumPy per shard.",
            "choices": list(SAMPLE_TYPES),
        },
    )
    model_card: str | None = field(
        default=None, metadata={"help": "README.md of a model, whose metadata the figures are merged into."}
    )
    cpu: bool = field(default=False, metadata={"help": "Sample on the CPU even where there is an accelerator."})

    def __post_init__(self):
        check_numbers(self, "be at least 1", "num_images", "repeats", "batch_size", "shard_size")
        check_numbers(self, "be at least 0", "seed")
        check_numbers(self, "lie in (0, 1]", "acceptance_rate")
        if abs(1 / self.acceptance_rate - self.num_candidates) > 1e-3:
            raise ValueError(
                f"--acceptance_rate must be 1 divided by a number of candidates, got {self.acceptance_rate}"
            )
        if (self.num_candidates > 1) != (self.scorer is not None):
            raise ValueError(
                f"--acceptance_rate below 1 and --scorer go together, got {self.acceptance_rate} and {self.scorer}"
            )

    @property
    def num_candidates(self) -> int:
        return round(1 / self.acceptance_rate)


@dataclass
class SamplingArguments:
    _argument_group_name = "sampling (default: the model's own)"

    temperature: list[float] | None = field(default=None, metadata={"help": "A number, or one per depth."})
    top_k: list[int] | None = field(default=None, metadata={"help": "A number, or one per depth."})
    top_p: list[float] | None = field(default=None, metadata={"help": "A number, or one per depth."})
    greedy: bool = field(default=False, metadata={"help": "Always take the most likely code."})
    guidance_scale: list[float] | None = field(default=None, metadata={"help": "A number, or one per depth."})
    guidance_schedule: str | None = field(default=None, metadata={"help": "constant, linear or cosine."})
    num_iterations: int | None = field(default=None, metadata={"help": "Of MAR: steps of the mask."})
    num_inference_steps: list[int] | None = field(
        default=None, metadata={"help": "Of MAR: denoising steps of a token: a number, or the first and the last."}
    )

    def given(self) -> dict:
        """Those that are not left to the model, as arguments of a pipeline."""
        values = {name: value for name, value in asdict(self).items() if value is not None and name != "greedy"}
        values = {name: v[0] if isinstance(v, list) and len(v) == 1 else v for name, v in values.items()}
        return values | ({"do_sample": False} if self.greedy else {})


@dataclass
class CaptionArguments:
    _argument_group_name = "captions (of a text-to-image model)"

    captions: str | None = field(default=None, metadata={"help": "Text file with one caption per line."})
    dataset_name: str | None = field(default=None, metadata={"help": "Or a data set on the Hub, or a local folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of the data set."})
    data_files: str | None = field(default=None, metadata={"help": "Or local files of a data set, globs allowed."})
    split: str = field(default="train", metadata={"help": "Split to read."})
    text_column: str = field(default="text", metadata={"help": "Column with the captions."})
    images_per_caption: int = field(
        default=1, metadata={"help": "How often a caption may be used, each time with another seed."}
    )
    caption_seed: int | None = field(
        default=None,
        metadata={"help": "Choose --num_images of the captions at random, with this seed (default: the first ones)."},
    )
    truncate_captions: bool = field(
        default=False,
        metadata={"help": "Cut off captions of more tokens than the model takes, as in training (default: refuse)."},
    )

    def __post_init__(self):
        check_numbers(self, "be at least 1", "images_per_caption")
        check_numbers(self, "be at least 0", "caption_seed")

    @property
    def sources(self) -> list[str]:
        return [name for name in ("captions", "dataset_name", "data_files") if getattr(self, name) is not None]

    def load(self) -> list[str]:
        if self.captions is not None:
            return read_captions(self.captions)
        return load_captions(self.dataset_name, self.dataset_config, self.data_files, self.split, self.text_column)


@dataclass
class MetricArguments:
    _argument_group_name = "metrics"

    metrics: list[str] = field(
        default_factory=lambda: ["fid"], metadata={"help": "What to measure.", "choices": list(NEEDS)}
    )
    network: str | None = field(
        default=None,
        metadata={
            "help": "Network of FID, KID, FD∞, precision, recall and the Inception Score: pytorch-fid, torch-fidelity "
            "or clean-fid with --network_weights, cifar10-small, or a CLIP or DINOv2 model."
        },
    )
    network_weights: str | None = field(
        default=None, metadata={"help": "Weights of Inception: a file, or user/repository/file on the Hub."}
    )
    reference: str | None = field(
        default=None,
        metadata={
            "help": "Statistics of real images, by compute_statistics.py; with --protocol also the authors' .npz."
        },
    )
    classifier: str | None = field(
        default=None, metadata={"help": "Network of class_accuracy, with the classes of the model; like --network."}
    )
    clip_model: str | None = field(default=None, metadata={"help": "CLIP model of clip_score: folder or Hub id."})
    cmmd_network: str | None = field(default=None, metadata={"help": "CLIP model of CMMD: folder or Hub id."})
    cmmd_reference: str | None = field(
        default=None, metadata={"help": "Statistics of real images under it, with features."}
    )

    def __post_init__(self):
        options = {"clip": "clip_model"}
        for metric in self.metrics:
            needed = [options.get(name, name) for name in NEEDS[metric]]
            missing = [f"--{name}" for name in needed if getattr(self, name) is None]
            if missing:
                raise ValueError(f"--metrics {metric} needs {' and '.join(missing)}")
        used = {options.get(name, name) for metric in self.metrics for name in NEEDS[metric]}
        for name in ("reference", "classifier", "clip_model", "cmmd_network", "cmmd_reference", "network"):
            if getattr(self, name) is not None and name not in used:
                raise ValueError(f"--{name} is given, but none of --metrics {' '.join(self.metrics)} uses it")


def load_pipeline(args: GenerationArguments, accelerator: Accelerator) -> tuple[Path, RQPipeline | MARPipeline]:
    """The folder of its files, and the pipeline. Raises `ValueError` for one of another class."""
    check_source("--model", args.model)
    with accelerator.local_main_process_first():
        folder = args.model if os.path.isdir(args.model) else DiffusionPipeline.download(args.model)
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, args.dtype))
    if not isinstance(pipe, RQPipeline | MARPipeline):
        raise ValueError(f"--model must be an RQPipeline or a MARPipeline, got a {type(pipe).__name__}")
    pipe.set_progress_bar_config(disable=True)
    pipe.to(accelerator.device)
    if args.compile:
        pipe.compile()
    return Path(folder), pipe


def create_plan(
    pipe: RQPipeline | MARPipeline, args: GenerationArguments, captions: CaptionArguments, settings: dict
) -> GenerationPlan:
    """Which images to sample. Raises `ValueError` for captions that do not fit the model, or no number of images."""
    num_images, conditions, cond_ids = args.num_images, None, None
    if pipe.is_text_conditional:
        if len(captions.sources) != 1:
            raise ValueError(
                "a text-to-image model needs one of --captions, --dataset_name and --data_files, got "
                f"{' and '.join(captions.sources) or 'none'}"
            )
        conditions = captions.load()
        available = len(conditions) * captions.images_per_caption
        num_images = num_images or available
        if num_images > available:
            raise ValueError(
                f"--num_images {num_images} is more than the {len(conditions):,} captions at --images_per_caption "
                f"{captions.images_per_caption}"
            )
        conditions = choose_captions(conditions, min(num_images, len(conditions)), captions.caption_seed)
        cond_ids = truncated_cond_ids(
            pipe.tokenizer, conditions, pipe.transformer.config.cond_length, captions.truncate_captions
        )
        if cond_ids is not None and args.num_candidates > 1:
            raise ValueError("--acceptance_rate below 1 needs captions that fit the model, got --truncate_captions")
    elif captions.sources:
        raise ValueError(f"this model takes no captions, got --{captions.sources[0]}")
    elif pipe.is_class_conditional:
        config = pipe.transformer.config
        conditions = [label for label in range(config.cond_vocab_size) if label != config.null_cond_id]
    if num_images is None:
        raise ValueError("--num_images is needed for a model without captions")
    return GenerationPlan(
        num_images=num_images,
        conditions=conditions,
        cond_ids=cond_ids,
        seed=args.seed,
        num_candidates=args.num_candidates,
        shard_size=args.shard_size,
        uint8_rule=args.uint8_rule,
        settings=settings,
    )


def load_scorer(
    args: GenerationArguments, pipe: RQPipeline | MARPipeline, device: torch.device
) -> tuple[Scorer | None, dict | None]:
    """The scorer of rejection sampling, and what it depends on. Raises `ValueError` for a model without conditions."""
    if args.scorer is None:
        return None, None
    if args.scorer == SMALL_CLASSIFIER:
        network = load_feature_network(args.scorer).to(device)
        return network_scorer(network, args.uint8_rule), network.identity()
    if pipe.is_text_conditional:
        return load_clip(args.scorer, device)
    if not pipe.is_class_conditional:
        raise ValueError(f"--scorer needs a model of classes or captions, {args.model} is unconditional")
    scorer = ClassifierScorer.from_pretrained(args.scorer)
    scorer.model.to(device)
    return scorer, scorer_identity(args.scorer, scorer.image_size)


def load_clip(name: str, device: torch.device) -> tuple[CLIPScorer, dict[str, str]]:
    """The similarity of images and captions, and what it depends on."""
    scorer = CLIPScorer(CLIPModel.from_pretrained(name).to(device), AutoTokenizer.from_pretrained(name))
    return scorer, scorer_identity(name, scorer.model.config.vision_config.image_size)


def scorer_identity(name: str, size: int) -> dict[str, str]:
    """Like [`FeatureNetwork.identity`]."""
    return {
        "network": os.path.basename(os.path.abspath(name)),
        "protocol": f"bicubic {size}",
        "network_sha256": checksum(find_model_file(name)),
    }


def load_metrics(args: MetricArguments, protocol: Protocol | None, device: torch.device) -> SampleMetrics:
    def load_network(name, weights=None):
        return None if name is None else load_feature_network(name, weights).to(device)

    clip, clip_identity = (None, None) if args.clip_model is None else load_clip(args.clip_model, device)
    network = load_network(args.network, args.network_weights)
    return SampleMetrics(
        names=args.metrics,
        network=network,
        reference=None if args.reference is None else load_reference(args.reference, protocol, network),
        cmmd_network=load_network(args.cmmd_network),
        cmmd_reference=None if args.cmmd_reference is None else FeatureStatistics.load(args.cmmd_reference),
        classifier=network if args.classifier == args.network else load_network(args.classifier),
        clip=clip,
        clip_identity=clip_identity,
    )


def load_reference(path: str, protocol: Protocol | None, network: FeatureNetwork) -> FeatureStatistics:
    """Statistics of real images. What an `.npz` file does not say is as the protocol says, and of this network."""
    if Path(path).suffix != ".npz":
        return FeatureStatistics.load(path)
    if protocol is None:
        raise ValueError(
            f"{path} does not say what it was computed from: pass --protocol, or note it by "
            "compute_statistics.py --moments"
        )
    said = {name: value for name, value in protocol.reference.items() if name != "file" and value is not None}
    return FeatureStatistics.load(path, **said, **network.identity())


def generate(
    accelerator: Accelerator,
    pipe: RQPipeline | MARPipeline,
    folder: GenerationFolder,
    args: GenerationArguments,
    metrics: SampleMetrics,
    scorer: Scorer | None,
    sampling: dict,
) -> None:
    """Makes the shards that are missing, each in one process; prints progress and speed of all processes together."""
    shards = [shard for repeat in range(args.repeats) for shard in folder.plan.shards(repeat)]
    with failing_together(ValueError):
        missing = None
        if accelerator.is_main_process:
            folder.open()
            missing, damaged = folder.missing(shards)
            for message in damaged:
                accelerator.print(f"{message}; it is made again")
    missing = broadcast_object_list([missing])[0]
    if len(missing) < len(shards):
        accelerator.print(f"{len(shards) - len(missing)} of {len(shards)} shards are there already")

    total = sum(len(shard.images) for shard in shards)
    existing = total - sum(len(shard.images) for shard in missing)
    own = missing[accelerator.process_index :: accelerator.num_processes]
    observing, started = 0.0, time.perf_counter()
    with tqdm(
        desc="sampling",
        unit="image",
        total=total,
        initial=existing,
        smoothing=0,  # the mean speed of this call
        disable=not (accelerator.is_main_process and missing),
    ) as progress:

        def update():
            progress.update(folder.count_images(shards) - progress.n)

        observers = metrics.observers()
        for shard in own:
            observing += generate_shard(
                pipe,
                folder,
                shard,
                observers,
                batch_size=args.batch_size,
                sampling=sampling,
                scorer=scorer,
                on_progress=update if accelerator.is_main_process else lambda: None,
            )
        busy = time.perf_counter() - started
        accelerator.wait_for_everyone()
        progress.update(total - progress.n)
    seconds = time.perf_counter() - started
    observing, busy = accelerator.reduce(torch.tensor([observing, busy], device=accelerator.device), "sum").tolist()
    if missing:
        accelerator.print(
            f"sampled {total - existing:,} images in {seconds:,.0f} s, {(total - existing) / seconds:.2f} images/s; "
            f"the networks of the metrics took {observing / busy:.1%} of the time"
        )


def describe_scheduler(pipe: RQPipeline | MARPipeline) -> dict | None:
    """Class and settings of the scheduler of a MAR."""
    if isinstance(pipe, RQPipeline):
        return None
    config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    return {"class": type(pipe.scheduler).__name__, **config}


def describe_data(captions: CaptionArguments, metrics: SampleMetrics) -> dict[str, str]:
    """Names of the real images that samples are compared with or, without such, of the captions."""
    reference = metrics.reference or metrics.cmmd_reference
    if reference is not None:
        return {name: reference.provenance[name] for name in ("dataset", "split")}
    if captions.sources:
        (source,) = captions.sources
        return {"dataset": getattr(captions, source), "split": "all" if source == "captions" else captions.split}
    return {"dataset": "none", "split": "none"}


def create_report(
    args: GenerationArguments,
    plan: GenerationPlan,
    metrics: SampleMetrics,
    folder: GenerationFolder,
    data: dict[str, str],
    protocol: dict | None,
) -> Report:
    """The figures of all finished shards: of several repeats, their means and deviations."""
    sampler = {
        **plan.settings["sampling"],
        "num_candidates": plan.num_candidates,
        **{name: plan.settings[name] for name in ("scorer", "scheduler", "dtype", "compile")},
        "conditions": plan.description()["conditions"],
        "protocol": protocol,
    }
    report = Report(
        model=args.model,
        weights=plan.settings["weights"],
        **data,
        transform=plan.settings["transform"],
        uint8_rule=plan.uint8_rule,
        sampler={name: value for name, value in sampler.items() if value is not None},
        seeds=[plan.seeds(plan.shards(repeat)[0].images)[0] for repeat in range(args.repeats)],
    )
    for name in metrics.names:
        results = [metrics.compute(name, folder, plan.shards(repeat)) for repeat in range(args.repeats)]
        for figure, first in results[0].items():
            values = [result[figure]["value"] for result in results]
            if args.repeats > 1:
                first = first | {"std": statistics.stdev(values), "std_of": "repeats", "values": values}
            report.add(figure, n=plan.num_images, **metrics.basis(name), **first | {"value": statistics.mean(values)})
    return report


def keep_earlier(report: Path) -> None:
    """Renames a report of an earlier call by its time: it may have other metrics or references."""
    if report.exists():
        time_of_writing = datetime.fromtimestamp(report.stat().st_mtime).strftime("%Y-%m-%d-%H%M%S-%f")
        report.rename(report.with_name(f"report-{time_of_writing}.json"))


def protocol_on_command_line() -> Protocol | None:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--protocol", choices=sorted(read_protocols()))
    name = parser.parse_known_args()[0].protocol
    return None if name is None else load_protocol(name)


def describe_protocol(protocol: Protocol | None, *arguments) -> dict | None:
    """Name of the protocol, and the options that are other than it says."""
    if protocol is None:
        return None
    values = {name: value for args in arguments for name, value in asdict(args).items()}
    changed = {name: values[name] for name, value in protocol.settings.items() if values[name] != value}
    return {"name": protocol.name, "changed": changed}


def main() -> None:
    protocol = protocol_on_command_line()
    args, sampling_args, captions, metric_args = parse_arguments(
        GenerationArguments,
        SamplingArguments,
        CaptionArguments,
        MetricArguments,
        description=__doc__,
        sections=(),
        **({} if protocol is None else protocol.settings),
    )
    # A process waits for the others as long as it takes them to finish their last shards.
    accelerator = Accelerator(
        cpu=args.cpu, mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))]
    )
    check_launch(accelerator)
    source, pipe = load_pipeline(args, accelerator)
    sampling = resolve_sampling(pipe, **sampling_args.given())
    scorer, scorer_identity = load_scorer(args, pipe, accelerator.device)
    metrics = load_metrics(metric_args, protocol, accelerator.device)
    height, width = image_size(pipe)
    weights = broadcast_object_list([weight_checksums(source) if accelerator.is_main_process else None])[0]
    settings = {
        "weights": weights,
        "sampling": sampling,
        "scheduler": describe_scheduler(pipe),
        "dtype": args.dtype,
        "compile": args.compile,
        "scorer": scorer_identity,
        "transform": f"none, sampled at {width}×{height}",
        "networks": metrics.identities(),
    }
    plan = create_plan(pipe, args, captions, settings)
    plan.check_seeds(args.repeats)
    metrics.check(
        plan.num_images,
        torch.zeros(3, height, width, dtype=torch.uint8),
        plan.conditions,
        {
            "dataset": f"samples of {args.model}",
            "split": f"seeds from {args.seed} on",
            "transform": settings["transform"],
            "uint8_rule": args.uint8_rule,
        },
    )
    folder = GenerationFolder(args.output_dir, plan, args.save_samples)
    generate(accelerator, pipe, folder, args, metrics, scorer, sampling)
    if accelerator.is_main_process:
        if args.save_samples == "png":
            folder.describe_samples([shard for repeat in range(args.repeats) for shard in plan.shards(repeat)])
        protocol = describe_protocol(protocol, args, sampling_args, captions, metric_args)
        report = create_report(args, plan, metrics, folder, describe_data(captions, metrics), protocol)
        keep_earlier(folder.folder / "report.json")
        report.save(folder.folder / "report.json")
        if args.model_card is not None:
            task = "text-to-image" if pipe.is_text_conditional else "unconditional-image-generation"
            report.update_card(args.model_card, task_type=task, dataset_type=report.dataset)
        print(report.table())
    accelerator.end_training()


if __name__ == "__main__":
    main()
