"""Images for an evaluation, sampled in shards that any process can make and that are kept.

Every image has a seed and a condition of its own, which follow from its number alone. A shard of them is sampled whole
by one process and appears in the folder when it is finished: the result depends neither on the number of processes nor
on interruptions, and on the batch size only as far as the models round differently.
"""

import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..argument_checks import (
    as_plain,
    check_choice,
    check_finite,
    check_instance,
    check_int64,
    check_integer,
    check_items,
    check_number,
    check_size,
    is_integer,
)
from ..files import atomic_file
from ..images import UINT8_RULES, to_uint8
from ..metrics.moments import FeatureMoments
from ..metrics.statistics import fingerprint
from ..models.mar_transformer.denoising import check_scheduler, num_steps_of
from ..models.mar_transformer.generation_mar_transformer import resolve_num_iterations
from ..models.rq_transformer.generation_settings import DEFAULTS, GenerationSettings
from ..pipelines import MARPipeline, RQPipeline
from ..pipelines.rejection_sampling import Scorer
from ..untrusted_files import one_line, shown

PLAN = "plan.json"
SHARDS = "shards"
SAMPLES = "samples"
SAMPLE_TYPES = ("png", "npz")
UNFINISHED = "unfinished-"
SAMPLING = (
    *("temperature", "top_k", "top_p", "do_sample", "guidance_scale", "guidance_schedule"),
    *("num_iterations", "num_inference_steps"),
)
# Images that are decoded together, and that a network sees together: rounding depends on their number.
CHUNK = 16

# Images `(B, 3, height, width)` in uint8, and their prompts or labels -> what is kept of each image, `(B, ...)`.
Observer = Callable[[torch.Tensor, list | None], dict[str, torch.Tensor]]


class Shard(NamedTuple):
    index: int
    images: range  # their numbers

    @property
    def name(self) -> str:
        return f"{self.index:05d}"


@dataclass(frozen=True)
class GenerationPlan:
    """
    Which images are sampled. A repeat is a set of `num_images`; image i of repeat r has the number
    j = r · `num_images` + i.

    Args:
        num_images: of one repeat.
        conditions: M prompts or M class labels, or `None`; image i has number i mod M. Where M does not divide
            `num_images`, the first conditions have one image more than the others.
        cond_ids (`(M, L)`, int64): ids to sample with in place of the prompts, such as those of truncated captions.
        seed: image j is sampled with `seed` + j; with n candidates, they have n seeds from `seed` + j · n on.
        num_candidates: n of rejection sampling: of n candidates, the best one is kept.
        shard_size: images in a shard; the last one of a repeat may be smaller.
        uint8_rule: how pixels are rounded, one of `UINT8_RULES`.
        settings: everything else that the images and what is kept of them depend on, as JSON can hold it.

    Raises `ValueError`/`TypeError` for anything else.
    """

    num_images: int
    conditions: Sequence[str] | Sequence[int] | None = None
    cond_ids: torch.Tensor | None = None
    seed: int = 0
    num_candidates: int = 1
    shard_size: int = 256
    uint8_rule: str = "round"
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in ("num_images", "num_candidates", "shard_size"):
            check_size(name, getattr(self, name))
        check_choice("uint8_rule", self.uint8_rule, UINT8_RULES)
        check_instance("settings", self.settings, dict)
        if self.conditions is not None:
            check_items("conditions", self.conditions)
            if not self.conditions:
                raise ValueError("conditions must be at least one, or None for an unconditional model, got none")
            if not (all(isinstance(c, str) for c in self.conditions) or all(map(is_integer, self.conditions))):
                raise TypeError(f"conditions must be strings or integers, got {self.conditions!r:.80}")
        if self.cond_ids is not None:
            if self.conditions is None:
                raise ValueError("cond_ids go with conditions, got cond_ids alone")
            check_int64("cond_ids", self.cond_ids, len(self.conditions), "L")
        self.check_seeds(1)

    def check_seeds(self, repeats: int) -> None:
        """Raises `ValueError` unless the seeds of so many repeats lie in [0, 2³²)."""
        check_size("repeats", repeats)
        count = repeats * self.num_images * self.num_candidates
        check_integer("seed", self.seed, 0, 2**32 - 1)
        if self.seed + count > 2**32:
            raise ValueError(
                f"seeds must lie in [0, 2**32), got {self.seed} and the {count - 1:,} after it, one for each candidate"
            )

    def shards(self, repeat: int) -> list[Shard]:
        """Those of one repeat, in order."""
        per_repeat = -(-self.num_images // self.shard_size)
        first, end = repeat * self.num_images, (repeat + 1) * self.num_images
        starts = range(first, end, self.shard_size)
        return [
            Shard(repeat * per_repeat + k, range(start, min(start + self.shard_size, end)))
            for k, start in enumerate(starts)
        ]

    def seeds(self, images: range) -> list[int]:
        """Those of all candidates of the images."""
        start, stop = (self.seed + image * self.num_candidates for image in (images.start, images.stop))
        return list(range(start, stop))

    def conditions_of(self, images: range) -> list[str] | list[int] | None:
        """Their prompts or labels."""
        if self.conditions is None:
            return None
        return [self.conditions[row] for row in self._rows(images)]

    def pipeline_conditions(self, images: range) -> dict:
        """Arguments of a pipeline."""
        if self.conditions is None:
            return {"batch_size": len(images)}
        if self.cond_ids is not None:
            return {"cond_ids": self.cond_ids[self._rows(images)]}
        values = self.conditions_of(images)
        return {"prompt" if isinstance(values[0], str) else "class_labels": values}

    def _rows(self, images: range) -> list[int]:
        return [image % self.num_images % len(self.conditions) for image in images]

    def description(self) -> dict:
        """The plan as JSON can hold it, with a digest of the conditions."""
        conditions = None
        if self.conditions is not None:
            contents = [as_plain(list(self.conditions)), None if self.cond_ids is None else self.cond_ids.tolist()]
            conditions = {
                "kind": "prompts" if isinstance(self.conditions[0], str) else "class labels",
                "count": len(self.conditions),
                "distinct": len(set(self.conditions)),
                "sha256": hashlib.sha256(json.dumps(contents).encode()).hexdigest(),
            }
        return {
            "num_images": int(self.num_images),
            "conditions": conditions,
            "seed": int(self.seed),
            "num_candidates": int(self.num_candidates),
            "shard_size": int(self.shard_size),
            "uint8_rule": self.uint8_rule,
            **self.settings,
        }


class GenerationFolder:
    """
    Where the shards of a plan are kept: `plan.json`; `shards/00012.safetensors` with what was observed of each image;
    and, if they are saved, the images themselves in `samples`.

    Args:
        folder: new, empty, or that of an earlier run with the same plan.
        sample_type: `"png"`: `samples/0003072.png` is image 3072, see [`describe_samples`]. `"npz"`:
            `samples/00012.npz` is shard 12 with images `(B, height, width, 3)` in `arr_0` and class labels, if any, in
            `arr_1`. `None` saves none.
    """

    def __init__(self, folder: str | os.PathLike, plan: GenerationPlan, sample_type: str | None = None):
        check_instance("plan", plan, GenerationPlan)
        if sample_type is not None:
            check_choice("sample_type", sample_type, SAMPLE_TYPES)
        self.folder = Path(folder)
        self.plan = plan
        self.sample_type = sample_type
        # Through JSON, so that tuples are lists as in the file.
        self.description = json.loads(json.dumps(plan.description() | {"samples": sample_type}))
        self.fingerprint = hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    def open(self) -> None:
        """
        Writes `plan.json`, or compares it; called by one process. A plan of which no shard was finished is replaced.

        Raises `ValueError` that names the differences when there are shards of another plan, and for a folder that
        holds anything else.
        """
        path = self.folder / PLAN
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(
                f"the output folder must be new, empty or that of an earlier run; {self.folder} is a file"
            )
        if path.exists():
            differences = describe_differences(read_plan(path), self.description)
            if differences and any((self.folder / SHARDS).glob("[0-9]*.safetensors")):
                raise ValueError(
                    f"{self.folder} holds the shards of another plan: {'; '.join(differences)}. Go on with the "
                    "settings of that plan, or choose another output folder"
                )
        elif self.folder.exists():
            others = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith(UNFINISHED))
            if others:
                raise ValueError(
                    f"the output folder must be new, empty or that of an earlier run; {self.folder} holds "
                    f"{shown(others[0])} but no {PLAN}"
                )
        (self.folder / SHARDS).mkdir(parents=True, exist_ok=True)
        if self.sample_type is not None:
            (self.folder / SAMPLES).mkdir(exist_ok=True)
        for note in (self.folder / SHARDS).glob("*.progress"):  # of a run that was killed
            note.unlink()
        with atomic_file(path) as unfinished:
            unfinished.write_text(json.dumps(self.description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def path(self, shard: Shard) -> Path:
        return self.folder / SHARDS / f"{shard.name}.safetensors"

    def missing(self, shards: Sequence[Shard]) -> tuple[list[Shard], list[str]]:
        """The shards that have yet to be made, and a message for each of them whose file is damaged. Raises
        `ValueError` for a shard of another plan."""
        missing, damaged = [], []
        for shard in shards:
            try:
                reason = None if self._is_whole(shard) else "its contents do not match their checksum"
            except FileNotFoundError:
                missing.append(shard)
                continue
            except SafetensorError as error:
                reason = one_line(error)
            if reason is not None:
                missing.append(shard)
                damaged.append(f"{self.path(shard)} is truncated or damaged: {reason}")
        return missing, damaged

    def _open(self, shard: Shard) -> safe_open:
        path = self.path(shard)
        file = safe_open(path, framework="pt")
        metadata = file.metadata() or {}
        if metadata.get("plan") != self.fingerprint or metadata.get("images") != describe_range(shard.images):
            raise ValueError(f"{path} is not shard {shard.index} of this plan: move it away")
        return file

    def _is_whole(self, shard: Shard) -> bool:
        """Whether its contents have the checksum that was written with them."""
        file = self._open(shard)
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return file.metadata().get("contents_sha256") == fingerprint(self.fingerprint, tensors)

    def load(self, shard: Shard, name: str) -> torch.Tensor:
        """One of the tensors of a finished shard, `(B, ...)`. Raises `ValueError` if there is none."""
        file = self._open(shard)
        if name not in file.keys():
            raise ValueError(f"{self.path(shard)} has no {name!r}; it has {', '.join(file.keys())}")
        return file.get_tensor(name)

    def save(self, shard: Shard, tensors: dict[str, torch.Tensor], images: torch.Tensor | None = None) -> None:
        """Tensors `(B, ...)` of a shard and, where samples are saved, its images `(B, 3, height, width)` in uint8."""
        if self.sample_type is not None:
            self._save_samples(shard, images.permute(0, 2, 3, 1).contiguous().numpy())
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        metadata = {
            "plan": self.fingerprint,
            "images": describe_range(shard.images),
            "contents_sha256": fingerprint(self.fingerprint, tensors),
        }
        with atomic_file(self.path(shard)) as unfinished:
            save_file(tensors, unfinished, metadata)
        self._note(shard).unlink(missing_ok=True)

    def _save_samples(self, shard: Shard, images: np.ndarray) -> None:
        folder = self.folder / SAMPLES
        if self.sample_type == "png":
            for number, image in zip(shard.images, images):
                with atomic_file(folder / image_name(number)) as unfinished:
                    Image.fromarray(image).save(unfinished, format="PNG")
            return
        arrays = {"arr_0": images}
        conditions = self.plan.conditions_of(shard.images)
        if conditions is not None and not isinstance(conditions[0], str):
            arrays["arr_1"] = np.array(conditions)
        with atomic_file(folder / f"{shard.name}.npz") as unfinished, open(unfinished, "wb") as file:
            np.savez(file, **arrays)

    def describe_samples(self, shards: Sequence[Shard]) -> None:
        """Writes `samples/metadata.jsonl` with the caption (`text`) or class (`label`) of every image, so that
        `datasets.load_dataset("imagefolder", data_dir="samples")` reads them."""
        with atomic_file(self.folder / SAMPLES / "metadata.jsonl") as unfinished:
            with open(unfinished, "w", encoding="utf-8") as file:
                for image in (image for shard in shards for image in shard.images):
                    row = {"file_name": image_name(image)}
                    if self.plan.conditions is not None:
                        (condition,) = self.plan.conditions_of(range(image, image + 1))
                        row["text" if isinstance(condition, str) else "label"] = condition
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _note(self, shard: Shard) -> Path:
        return self.folder / SHARDS / f"{shard.name}.progress"

    def note_progress(self, shard: Shard, count: int) -> None:
        """Tells all processes how many images of an unfinished shard there are."""
        self._note(shard).write_text(str(count))

    def count_images(self, shards: Sequence[Shard]) -> int:
        """The images so far of all processes."""
        names = set(os.listdir(self.folder / SHARDS))
        count = 0
        for shard in shards:
            if self.path(shard).name in names:
                count += len(shard.images)
            elif self._note(shard).name in names:
                try:
                    count += int(self._note(shard).read_text() or 0)
                except FileNotFoundError:  # finished in the meantime
                    count += len(shard.images)
        return count

    def moments(self, shards: Sequence[Shard], name: str) -> FeatureMoments:
        """Those of the features `name` of all shards, added one after another: of the same shards, the same bits."""
        first, *others = shards
        moments = FeatureMoments.of(self.load(first, name))
        for shard in others:
            moments.update(self.load(shard, name))
        return moments

    def gather(self, shards: Sequence[Shard], name: str) -> torch.Tensor:
        """What was kept of all images, `(N, ...)`."""
        return torch.cat([self.load(shard, name) for shard in shards])


def generate_shard(
    pipe: RQPipeline | MARPipeline,
    folder: GenerationFolder,
    shard: Shard,
    observers: Sequence[Observer] = (),
    *,
    batch_size: int,
    sampling: dict | None = None,
    scorer: Scorer | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> float:
    """
    Samples a shard, observes its images and saves it. Returns the seconds that observing took.

    Args:
        observers: what to keep of every image; see [`Observer`].
        batch_size: images or candidates that are sampled at a time.
        sampling: further arguments of the pipeline, such as `top_k`.
        scorer: of rejection sampling, see [`RQPipeline.__call__`]; goes with `num_candidates` of the plan.
        on_progress: called after every few images.

    Raises `ValueError` with a note of the images where the pipeline or an observer gives NaN or infinite values.
    """
    observed, images = [], []
    count, seconds = 0, 0.0
    for chunk in sample_images(
        pipe, folder.plan, shard.images, batch_size=batch_size, sampling=sampling, scorer=scorer
    ):
        numbers = shard.images[count : count + len(chunk)]
        conditions = folder.plan.conditions_of(numbers)
        started, results = time.perf_counter(), {}
        with naming_images(folder.plan, numbers):
            for observe in observers:
                results |= observe(chunk, conditions)
            results = {name: value.detach().cpu() for name, value in results.items()}
            for name, value in results.items():
                check_finite(name, value.reshape(len(chunk), -1))
        observed.append(results)
        seconds += time.perf_counter() - started
        if folder.sample_type is not None:
            images.append(chunk.cpu())
        count += len(chunk)
        folder.note_progress(shard, count)
        on_progress()
    tensors = {name: torch.cat([results[name] for results in observed]) for name in observed[0]}
    folder.save(shard, tensors, torch.cat(images) if images else None)
    return seconds


def sample_images(
    pipe: RQPipeline | MARPipeline,
    plan: GenerationPlan,
    images: range,
    *,
    batch_size: int,
    sampling: dict | None = None,
    scorer: Scorer | None = None,
) -> Iterator[torch.Tensor]:
    """
    The images of these numbers in order, `CHUNK` at a time: `(B, 3, height, width)`, uint8; grey ones as RGB.

    Only sampling depends on `batch_size`. They are decoded in the same chunks whatever it is.
    """
    check_size("batch_size", batch_size)
    pending, count = [], 0  # codes or latents; the images before them
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        with naming_images(plan, batch):
            pending += pipe(
                **plan.pipeline_conditions(batch),
                **(sampling or {}),
                generator=plan.seeds(batch),
                scorer=scorer,
                num_candidates=plan.num_candidates,
                max_batch_size=batch_size,
                output_type="latent",
                return_dict=False,
            )[0]
        while len(pending) >= CHUNK or (pending and batch.stop == images.stop):
            chunk, pending = pending[:CHUNK], pending[CHUNK:]
            with naming_images(plan, images[count : count + len(chunk)]):
                pixels = decode(pipe, torch.stack(chunk))
            count += len(chunk)
            yield to_uint8(pixels, plan.uint8_rule)


def decode(pipe: RQPipeline | MARPipeline, sampled: torch.Tensor) -> torch.Tensor:
    """Codes or latents -> `(B, 3, height, width)` in [0, 1]; grey images as RGB."""
    decode_sampled = pipe.decode_codes if isinstance(pipe, RQPipeline) else pipe.decode_latents
    return decode_sampled(sampled, output_type="pt").expand(-1, 3, -1, -1)


def image_size(pipe: RQPipeline | MARPipeline) -> tuple[int, int]:
    """Height and width of the images that the pipeline samples."""
    config = pipe.transformer.config
    if isinstance(pipe, RQPipeline):
        sampled = torch.zeros(1, *config.code_shape, dtype=torch.long, device=pipe.device)
    else:
        sampled = torch.zeros(1, *config.latent_shape, device=pipe.device)
    return tuple(decode(pipe, sampled).shape[2:])


@contextmanager
def naming_images(plan: GenerationPlan, images: range) -> Iterator[None]:
    """A `ValueError` inside gets a note that says which images it is about."""
    try:
        yield
    except ValueError as error:
        error.add_note(f"while sampling images {describe_range(images)}, seeds from {plan.seeds(images)[0]} on")
        raise


def resolve_sampling(pipe: RQPipeline | MARPipeline, **given) -> dict:
    """
    The settings that the pipeline samples with, all of them by name: the given ones, else those of the model, else the
    defaults of its pipeline. Settings of every depth are one number where they are equal.

    Args:
        given: of `temperature`, `top_k`, `top_p`, `do_sample`, `guidance_scale`, `guidance_schedule`,
            `num_iterations` and `num_inference_steps`, those that are not left to the model.

    Raises `ValueError`/`TypeError` for settings that this pipeline does not have or does not accept.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    unknown = [name for name in given if name not in parameters or name not in SAMPLING]
    if unknown:
        accepted = ", ".join(name for name in SAMPLING if name in parameters)
        raise ValueError(f"{type(pipe).__name__} samples with {accepted}, got {', '.join(unknown)}")
    settings = {name: given.get(name, parameters[name].default) for name in SAMPLING if name in parameters}
    transformer = pipe.transformer
    if isinstance(pipe, RQPipeline):
        config = transformer.config
        resolved = GenerationSettings.resolve(
            transformer.generation_config,
            config.code_shape[-1],
            config.codebook_size,
            **{name: settings[name] for name in DEFAULTS},
        )
        resolved.check_guidance(settings["guidance_schedule"], None, config.null_cond_id)
        settings |= {
            name: value[0] if isinstance(value, list) and len(set(value)) == 1 else value
            for name, value in asdict(resolved).items()
        }
        return settings
    mask = torch.ones(1, transformer.config.num_tokens, dtype=torch.bool)
    settings["num_iterations"] = resolve_num_iterations(settings["num_iterations"], mask)
    num_steps_of(settings["num_inference_steps"], settings["num_iterations"])
    check_number("temperature", settings["temperature"], "be at least 0")
    check_scheduler(pipe.scheduler, settings["temperature"])
    transformer.check_guidance(settings["guidance_scale"], settings["guidance_schedule"], None)
    return settings


def read_plan(path: Path) -> dict:
    """Raises `ValueError` unless the file holds a plan."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not the plan of a run: {one_line(error)}") from error
    if not isinstance(plan, dict):
        raise ValueError(f"{path} is not the plan of a run: it holds {shown(plan)}")
    return plan


def describe_differences(saved: dict, wanted: dict, prefix: str = "") -> list[str]:
    """One text per setting that differs, with both values."""
    differences = []
    for name in saved | wanted:
        old, new = saved.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            differences += describe_differences(old, new, f"{prefix}{name}.")
        elif old != new or (name in saved) != (name in wanted):
            differences.append(f"{prefix}{name} was {shown(old)}, got {shown(new)}")
    return differences


def image_name(image: int) -> str:
    return f"{image:07d}.png"


def describe_range(numbers: range) -> str:
    return f"{numbers.start}-{numbers.stop - 1}"
