"""The result of an evaluation: figures, each with everything that it depends on."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, RepoCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..argument_checks import (
    as_plain,
    check_choice,
    check_instance,
    check_integer,
    check_items,
    check_number,
    check_size,
)
from ..files import atomic_file
from ..images import UINT8_RULES
from ..metrics.feature_networks import INCEPTION_SHA256
from ..metrics.statistics import (
    FLOATS,
    IDENTITY,
    STORED,
    FeatureStatistics,
    check_identity,
    check_provenance,
    check_sha256,
    check_text,
)
from ..model_cards import find_versions
from ..untrusted_files import check_contents_are_there, one_line, shown, shown_first

NAMES = {
    "fid": "FID",
    "frechet_distance": "Fréchet distance",
    "fd_infinity": "FD∞",
    "kid": "KID",
    "cmmd": "CMMD",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "clip_score": "CLIP score",
    "class_accuracy": "class accuracy",
    "codebook_usage": "codebook usage",
    "codebook_perplexity": "codebook perplexity",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
}
OF_REFERENCE = {"fid", "frechet_distance", "fd_infinity", "kid", "cmmd", "precision", "recall"}
OF_NETWORK = OF_REFERENCE | {"inception_score", "clip_score", "class_accuracy", "lpips"}


@dataclass(frozen=True)
class Figure:
    """
    One result.

    Args:
        metric: one of [`NAMES`].
        value: of the metric.
        n: number of images that it was computed from.
        std: its standard deviation, over what `settings` say (splits, subsets or repeats).
        network: identity of the network whose features it compares, see [`FeatureNetwork.identity`].
        reference: of a distance to statistics: their provenance, and the `file` and `sha256` that they were loaded
            from, `None` for statistics of the same run.
        settings: further arguments of the metric.
    """

    metric: str
    value: float
    n: int
    std: float | None = None
    network: dict[str, str] | None = None
    reference: dict[str, str | int | None] | None = None
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        check_choice("metric", self.metric, tuple(NAMES))
        check_number(self.metric, self.value, "be finite")
        check_size("n", self.n)
        if self.std is not None:
            check_number("std", self.std, "be at least 0")
        if self.network is None and self.metric in OF_NETWORK:
            raise ValueError(f"{self.metric} needs network, the identity of the one that computed the features")
        if self.reference is None and self.metric in OF_REFERENCE:
            raise ValueError(f"{self.metric} needs reference, the statistics that it compares with")
        if self.network is not None:
            check_identity(self.network)
            if self.metric in ("fid", "frechet_distance") and (self.metric == "fid") != self.is_of_inception:
                raise ValueError(
                    "fid is the distance of the Inception network, frechet_distance that of any other one; "
                    f"got {self.metric} of {self.network['network']}"
                )
        if self.reference is not None:
            check_provenance({name: self.reference[name] for name in self.reference if name not in ("file", "sha256")})
            for name in IDENTITY:
                if self.network is None or self.reference[name] != self.network[name]:
                    raise ValueError(
                        f"reference must have the {name} of the network: got {shown(self.reference[name])} and "
                        f"{shown(self.network and self.network[name])}"
                    )

    @property
    def is_of_inception(self) -> bool:
        return self.network["network_sha256"] == INCEPTION_SHA256

    @property
    def name(self) -> str:
        """The metric with its network: the protocol of the Inception network, or the name of another one."""
        if self.network is None:
            return NAMES[self.metric]
        return f"{NAMES[self.metric]} ({self.network['protocol' if self.is_of_inception else 'network']})"


@dataclass(kw_only=True)
class Report:
    """
    Figures of one model on one data set, with what they depend on, which must all be given.

    Args:
        model: folder or Hub id.
        weights: SHA-256 of every file of weights, by its path in the model.
        dataset, split: names of the real images or captions.
        transform: how the model's images were cropped and resized before a network saw them.
        uint8_rule: how they got 8 bits: one of [`UINT8_RULES`], or `"none"` if they stayed floats.
        sampler: settings that they were sampled with; empty if nothing was sampled.
        seeds: first seed of every repeat; empty if nothing was sampled.

    `versions`, `command` and `date` are those of this process. Raises `ValueError`/`TypeError` for values that these
    cannot have.
    """

    model: str
    weights: dict[str, str]
    dataset: str
    split: str
    transform: str
    uint8_rule: str
    sampler: dict
    seeds: list[int]
    versions: dict[str, str] = field(default_factory=find_versions)
    command: str = field(default_factory=lambda: shlex.join(sys.argv))
    date: str = field(default_factory=lambda: datetime.now().astimezone().isoformat(timespec="seconds"))
    figures: list[Figure] = field(default_factory=list)

    def __post_init__(self):
        for name in ("model", "dataset", "split", "transform", "command", "date"):
            check_text(name, getattr(self, name))
        for name in ("weights", "sampler", "versions"):
            check_instance(name, getattr(self, name), dict)
        self.sampler = as_json("sampler", self.sampler)
        if not self.weights:
            raise ValueError("weights must have the SHA-256 of at least one file, got none")
        for name, sha256 in self.weights.items():
            check_sha256(f"weights[{shown(name)}]", sha256)
        check_choice("uint8_rule", self.uint8_rule, (*UINT8_RULES, FLOATS))
        check_items("seeds", self.seeds)
        for seed in self.seeds:
            check_integer("seeds", seed, 0, 2**64 - 1)
        if self.sampler and not self.seeds:
            raise ValueError("seeds must have the first seed of every repeat of what was sampled, got none")

    def add(
        self,
        metric: str,
        value: float,
        n: int,
        *,
        std: float | None = None,
        network: dict[str, str] | None = None,
        reference: FeatureStatistics | None = None,
        **settings,
    ) -> None:
        """
        Adds a figure; see [`Figure`]. The network of a distance to `reference` is that of these statistics.

        Raises `ValueError` for a metric that lacks its network or reference, for statistics of another network or
        uint8 rule, and for a figure that is there already.
        """
        if reference is not None:
            check_instance("reference", reference, FeatureStatistics)
            rule = reference.provenance["uint8_rule"]
            if rule not in (self.uint8_rule, STORED):
                raise ValueError(f"reference must have the uint8_rule {self.uint8_rule} or {STORED}, got {rule}")
            network = network or {name: reference.provenance[name] for name in IDENTITY}
            reference = {"file": reference.file, "sha256": reference.sha256, **reference.provenance}
        settings = as_json("settings", {name: as_plain(setting) for name, setting in settings.items()})
        figure = Figure(metric, as_plain(value), as_plain(n), as_plain(std), network, reference, settings)
        if any((f.name, f.settings) == (figure.name, figure.settings) for f in self.figures):
            raise ValueError(f"the report has a figure of {figure.name} with the settings {settings} already")
        self.figures.append(figure)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a `.json` file, in the place of one that is there. Raises `ValueError` for another suffix and for a
        report without figures."""
        check_instance("path", path, str | os.PathLike)
        path = Path(path)
        if path.suffix != ".json":
            raise ValueError(f"a report must end in .json, got {path}")
        if not self.figures:
            raise ValueError("the report has no figures")
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False)
        with atomic_file(path) as unfinished:
            unfinished.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Report":
        """Raises `ValueError` for a file that is no whole report."""
        check_instance("path", path, str | os.PathLike)
        check_contents_are_there(path, str(path))
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            check_names(values, cls)
            for figure in values["figures"]:
                check_names(figure, Figure)
            return cls(**values | {"figures": [Figure(**figure) for figure in values["figures"]]})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a whole report: {shown(one_line(error))}") from error

    def table(self) -> str:
        """The figures and what they depend on, for a terminal."""
        rows = [("metric", "value", "images", "reference", "settings")]
        for figure in self.figures:
            value = f"{figure.value:.5g}" + (f" ± {figure.std:.2g}" if figure.std is not None else "")
            rows.append((figure.name, value, f"{figure.n:,}", describe(figure.reference), in_words(figure.settings)))
        widths = [max(map(len, column)) for column in zip(*rows)]
        rows.insert(1, tuple("-" * width for width in widths))
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
        weights = ", ".join(f"{name} {sha256[:8]}…" for name, sha256 in self.weights.items())
        networks = {tuple(f.network.values()): f.network for f in self.figures if f.network is not None}
        lines += [
            "",
            f"model      {self.model} ({weights})",
            f"data       {self.dataset} ({self.split})",
            f"images     transform {self.transform}, uint8 rule {self.uint8_rule}",
            f"sampling   {in_words(self.sampler) or 'none'}",
            f"seeds      {', '.join(f'from {seed} on' for seed in self.seeds) or 'none'}",
            *(f"network    {n['network']}, {n['protocol']} ({n['network_sha256'][:8]}…)" for n in networks.values()),
            f"versions   {', '.join(f'{name} {number}' for name, number in self.versions.items())}",
            f"date       {self.date}",
        ]
        return "\n".join(lines)

    def update_card(
        self,
        path: str | os.PathLike,
        *,
        task_type: str,
        dataset_type: str,
        dataset_config: str | None = None,
    ) -> None:
        """
        Merges the figures into the `model-index` of a model card. An earlier figure of the same metric, name, data set
        and split without a source is replaced; all other entries stay, such as those that others published.

        Args:
            path: the card, `README.md`.
            task_type: task of the Hub, such as `unconditional-image-generation`.
            dataset_type: Hub id of the data set, or a name like one.
            dataset_config: its configuration.

        Raises `ValueError` for a card with invalid metadata and for a report without figures.
        """
        if not self.figures:
            raise ValueError("the report has no figures")
        check_instance("path", path, str | os.PathLike)
        path = Path(path)
        check_contents_are_there(path, str(path))
        results = [
            EvalResult(
                task_type=task_type,
                dataset_type=dataset_type,
                dataset_name=self.dataset,
                dataset_config=dataset_config,
                dataset_split=self.split,
                metric_type=figure.metric,
                metric_name=figure.name,
                metric_value=figure.value,
                metric_args=self.card_arguments(figure),
            )
            for figure in self.figures
        ]
        (ours,) = eval_results_to_model_index(Path(self.model).name, results)
        try:
            card = RepoCard.load(path)  # not ModelCard, which mixes the sources of entries
            ModelCard(card.content)
            index = card.data.get("model-index") or [ours | {"results": []}]
            index[0]["results"] = merge_results(index[0]["results"], ours["results"])
            card.data["model-index"] = index
            content = card.content
            ModelCard(content)
        except Exception as error:  # YAML has exceptions of its own
            raise ValueError(f"{path} has invalid metadata: {shown(one_line(error))}") from error
        with atomic_file(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
            file.write(content)

    def card_arguments(self, figure: Figure) -> dict:
        """What a figure depends on, as far as a model card has no field for it."""
        of_figure = {
            "n": figure.n,
            "std": figure.std,
            **figure.settings,
            "network_sha256": figure.network and figure.network["network_sha256"],
            "reference_sha256": figure.reference and figure.reference["sha256"],
        }
        of_report = {"transform": self.transform, "uint8_rule": self.uint8_rule, "seeds": list(self.seeds)}
        weights = {"weights_sha256": self.weights, "rq_hf": self.versions.get("rq_hf"), "date": self.date}
        arguments = of_figure | of_report | {"sampler": self.sampler} | weights
        return {name: value for name, value in arguments.items() if value is not None}


def merge_results(existing: Sequence[dict], new: Sequence[dict]) -> list[dict]:
    """Results of a model index with the `new` ones in the place of the same metrics; see [`Report.update_card`]."""
    replaced = {(*place_of(result), *name_of(metric)) for result in new for metric in result["metrics"]}
    merged = []
    for result in existing:
        place = place_of(result)
        kept = [metric for metric in result["metrics"] if (*place, *name_of(metric)) not in replaced]
        if kept:
            merged.append({**result, "metrics": kept})
    for result in new:
        same = next((other for other in merged if place_of(other) == place_of(result)), None)
        if same is None:
            merged.append(result)
        else:
            same["metrics"] += result["metrics"]
    return merged


def place_of(result: dict) -> tuple:
    """What the metrics of a result have in common."""
    task, dataset, source = (result.get(name) or {} for name in ("task", "dataset", "source"))
    keys = ("name", "type", "config", "split", "revision")
    return task.get("type"), *(dataset.get(key) for key in keys), source.get("url"), source.get("name")


def name_of(metric: dict) -> tuple[str, str | None]:
    return metric["type"], metric.get("name")


def as_json(name: str, values: dict) -> dict:
    """The values as they come back from a file. Raises `TypeError` for values that JSON cannot hold."""
    try:
        return json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be plain values, as JSON can hold them: {one_line(error)}") from error


def check_names(values, kind: type) -> None:
    """Raises `ValueError` unless these are the fields of a data class, all of them."""
    check_instance("it", values, dict)
    names = {entry.name for entry in fields(kind)}
    if values.keys() != names:
        missing, unknown = (shown_first(sorted(n), 5) for n in (names - values.keys(), values.keys() - names))
        raise ValueError(f"missing: {missing or 'none'}; unknown: {unknown or 'none'}")


def describe(reference: dict | None) -> str:
    """Statistics that were compared with, for a table."""
    if reference is None:
        return ""
    text = f"{reference['dataset']} ({reference['split']}), {reference['count']:,} images"
    return text if reference["sha256"] is None else f"{text}, {reference['file']} {reference['sha256'][:8]}…"


def in_words(settings: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
