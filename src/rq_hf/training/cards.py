"""Model cards of trained models: what they say of the training, and what they show."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
from accelerate import Accelerator
from diffusers import AutoencoderKL
from huggingface_hub import EvalResult
from PIL import Image

from ..argument_checks import is_number
from ..models import RQVAEModel
from .checkpoints import save_finished

SAMPLES_FILE = "samples.png"
RECONSTRUCTIONS_FILE = "reconstructions.png"
VALIDATION = "validation/"
COLUMNS = ("image_column", "text_column", "label_column", "vector_column", "item_column")

Dataset = datasets.Dataset | datasets.IterableDataset


def training_sections(accelerator: Accelerator, configuration: dict, dataset: Dataset, task: str) -> dict:
    """
    Arguments of [`rq_hf.model_cards.model_card`]: training data, command, hyper-parameters and last metrics as
    `details`, and the metadata `datasets`, `base_model` and `model-index` where there are such.

    Args:
        configuration: all options of the run, see [`flat_configuration`].
        dataset: of the training.
        task: of the Hub, for the `model-index`.
    """
    given = {name: value for name, value in configuration.items() if value != "None"}
    losses, validation = last_metrics(Path(accelerator.project_dir) / "log.jsonl")
    details = [
        f"## Training data\n\n{describe_data(given, dataset)}",
        f"## Training\n\n{describe_origin(given)}{describe_processes(accelerator)}\n\n```\n{command()}\n```",
        f"<details><summary>All hyper-parameters</summary>\n\n{table(configuration)}\n\n</details>",
    ]
    if losses:
        details.append(f"Means of the last logged steps:\n\n{table(losses)}")
    metadata = {}
    if is_hub_id(given.get("dataset_name")):
        metadata["datasets"] = [given["dataset_name"]]
    if is_hub_id(given.get("transformer")):
        metadata["base_model"] = given["transformer"]
    if validation:
        source, split = validation_source(given)
        step = validation.pop("step")
        count = {"n": int(given["validation_images"])} if "validation_images" in given else {}
        details.append(f"On {source} ({split}), after step {step:,}:\n\n{table(validation)}")
        metadata["model_name"] = Path(given["output_dir"]).name
        metadata["eval_results"] = [
            EvalResult(
                task_type=task,
                dataset_type=source,
                dataset_name=source,
                dataset_split=split,
                metric_type=name.rpartition("/")[2],
                metric_name=name,
                metric_value=value,
                metric_args={**count, "step": step},
            )
            for name, value in validation.items()
        ]
    return {"details": "\n\n".join(details), **metadata}


def save_autoencoder(
    accelerator: Accelerator,
    autoencoder: RQVAEModel | AutoencoderKL,
    destination: Path,
    card: Callable[..., str],
    reconstructions: Image.Image,
    *,
    configuration: dict,
    dataset: Dataset,
    upload_to: str | None = None,
) -> None:
    """
    Saves a trained autoencoder with its reconstructions and its card, see [`save_finished`].

    Args:
        card: (place of the model, sections) -> text.
        reconstructions: what the card shows.
        configuration, dataset: see [`training_sections`].
    """
    sections = training_sections(accelerator, configuration, dataset, "image-to-image")
    sections["introduction"] = (
        f"![Reconstructions]({RECONSTRUCTIONS_FILE})\n\n*Images, and what this model makes of them.*"
    )
    text = card(upload_to or str(destination), **sections)
    save_finished(accelerator, autoencoder, destination, text, upload_to, {RECONSTRUCTIONS_FILE: reconstructions.save})


def describe_data(given: dict, dataset: Dataset) -> str:
    if "latents" in given:
        text = f"Latents of images, as `examples/extract_latents.py` wrote them to `{given['latents']}`"
    elif "dataset_name" in given:
        config = f", configuration `{given['dataset_config']}`" if "dataset_config" in given else ""
        place = f"[{given['dataset_name']}](https://huggingface.co/datasets/{given['dataset_name']})"
        place = place if is_hub_id(given["dataset_name"]) else f"`{given['dataset_name']}`"
        text = f"{place}{config}, split `{given['split']}`"
    else:
        text = f"The files `{given['data_files']}`"
    columns = [f"{name.replace('_', ' ')} `{given[name]}`" for name in COLUMNS if name in given]
    examples = "vectors" if "vector_column" in given else "images"
    count = "" if isinstance(dataset, datasets.IterableDataset) else f", {len(dataset):,} {examples}"
    return text + count + "".join(f"; {text}" for text in columns) + "."


def describe_origin(given: dict) -> str:
    """What the model was made from: sentences with a space behind each."""
    text = f"The transformer continues `{given['transformer']}`. " if "transformer" in given else ""
    for name in ("rqvae", "vae"):
        if name in given:
            text += f"The autoencoder is `{given[name]}`, unchanged. "
    return text


def describe_processes(accelerator: Accelerator) -> str:
    count, kind = accelerator.num_processes, accelerator.device.type
    processes = "one process" if count == 1 else f"{count} processes ({accelerator.distributed_type.value})"
    return f"Trained by {processes} on `{kind}`, mixed precision `{accelerator.mixed_precision}`, with:"


def command() -> str:
    """The command line of this process."""
    return f"python {shlex.join(sys.argv)}"


def table(values: dict) -> str:
    """A Markdown table of names and values."""
    rows = [f"| {name} | {show(value)} |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def show(value) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def last_metrics(log: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The last training metrics in a `log.jsonl`, and the last validation metrics with their `step`; empty where there
    are none."""
    losses, validation = {}, {}
    for line in log.read_text().splitlines():
        values = json.loads(line)
        numbers = {name: value for name, value in values.items() if is_number(value)}
        if any(name.startswith(VALIDATION) for name in numbers):
            validation = {name.removeprefix(VALIDATION): value for name, value in numbers.items()}
        elif "loss" in numbers:
            losses = numbers
    return losses, validation


def validation_source(given: dict) -> tuple[str, str]:
    """Name and split of the held-out images."""
    if "validation_files" in given:
        return given["validation_files"], "validation"
    return given["dataset_name"], given["validation_split"]


def is_hub_id(name: str | None) -> bool:
    """Whether a source that the run has read is on the Hub."""
    return name is not None and not Path(name).exists()
