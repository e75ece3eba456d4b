"""The authors' checkpoints -> a saved pipeline."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..models import RQTransformerModel, RQVAEModel
from ..pipelines import RQPipeline
from ..untrusted_files import one_line
from .card import conversion_card
from .configs import RQTRANSFORMER, RQVAE, Section, generation_config, rqtransformer_config, rqvae_config
from .files import Checkpoint, extract_archive, find_checkpoints, single_checkpoint
from .tokenizer import convert_tokenizer
from .weights import Parts, concatenate, rqtransformer_weights, rqvae_weights

MAX_SHARD_SIZE = "2GB"
UNFINISHED = ".rq_hf-"  # starts the names of folders in which a conversion works


def convert_original_checkpoint(
    source: str | Path | None = None,
    destination: str | Path | None = None,
    *,
    rqvae: str | Path | None = None,
    rqtransformer: str | Path | None = None,
    ema: bool = False,
    tokenizer: str | Path | None = None,
) -> RQPipeline | RQVAEModel:
    r"""
    Converts checkpoints of the authors' code (kakaobrain/rq-vae-transformer).

    Weights are memory-mapped and written shard by shard: memory stays below the size of the checkpoint plus 2 GB.
    No code in checkpoint files is executed.

    Args:
        source (`str` or `Path`, *optional*): their tar archive, or a folder that contains the two stages at any depth,
            each a `.pt` file beside its `config.yaml`, or the RQ-VAE alone.
        destination (`str` or `Path`, *optional*): new or empty folder to write to, for `from_pretrained`, with a model
            card. A new folder appears only when it is complete; an empty one may be a mount point.
        rqvae, rqtransformer (`str` or `Path`, *optional*): the `.pt` file of a stage, with its `config.yaml` beside
            it, instead of `source` or for a stage that `source` lacks.
        ema (`bool`): use `state_dict_ema` instead of `state_dict`: of the RQ-Transformer, as the authors sample, or
            of an RQ-VAE alone.
        tokenizer (`str` or `Path`, *optional*): folder with the vocabulary and merges of a text model.

    Returns:
        The [`RQPipeline`], or the [`RQVAEModel`] if there is no second stage.

    Raises:
        `FileNotFoundError` for a missing path; `FileExistsError` for a destination that is a file, not empty, or that
        another conversion works on, even a killed one; `OSError` for a full disk; `ValueError` for broken files,
        weights that are not finite floating-point numbers, stages that do not fit each other, and unsupported
        options: learned token embeddings, codebooks of unequal size, a `ch_mult` that does not start with 1.
    """
    model, _, _ = convert_checkpoints(source, destination, rqvae, rqtransformer, ema, tokenizer)
    return model


def convert_checkpoints(
    source, destination, rqvae, rqtransformer, ema, tokenizer
) -> tuple[RQPipeline | RQVAEModel, dict[str, list[str]], Path | None]:
    """[`convert_original_checkpoint`], which also returns what it ignored of each file, and the real destination."""
    place = str(destination)
    destination = None if destination is None else Path(os.path.realpath(destination))
    with working_folder(destination) as scratch:
        checkpoints = gather_checkpoints(source, rqvae, rqtransformer, scratch / "archive")
        stage1, stage2 = checkpoints[RQVAE], checkpoints.get(RQTRANSFORMER)
        vae = convert_rqvae(stage1, ema=ema and stage2 is None)
        if stage2 is not None:
            transformer, weights = convert_rqtransformer(stage2, vae, ema)
            text_tokenizer = text_model_tokenizer(tokenizer, transformer, stage2)
            with error_context(f"{stage1.label} and {stage2.label}"):
                model = RQPipeline(vae, transformer, text_tokenizer)
        elif tokenizer is not None:
            raise ValueError(f"an RQ-VAE alone takes no tokenizer, got {tokenizer}")
        else:
            model, weights = vae, None

        model = with_weights(model, weights, conversion_card(model, place), scratch / "finished", destination)
    ignored = {}
    for checkpoint in checkpoints.values():
        ignored[checkpoint.label] = checkpoint.unused
        ignored[str(Path(checkpoint.label).with_name("config.yaml"))] = checkpoint.config.unread()
    return model, ignored, destination


def with_weights(
    model: RQVAEModel | AutoencoderKL | PreTrainedModel | DiffusionPipeline,
    weights: dict[str, Parts] | None,
    card: str,
    finished: Path,
    destination: Path | None,
):
    """The converted `model`, whose transformer, if there is one, has its `weights` no longer on the meta device.

    It is saved with its `card` in the folder `finished`, which becomes `destination`, and read from there; or it is
    completed in memory if `destination` is `None`.
    """
    if destination is None:
        if weights is not None:
            transformer = model.transformer if isinstance(model, DiffusionPipeline) else model
            transformer.load_state_dict({name: concatenate(parts) for name, parts in weights.items()}, assign=True)
        return model
    try:
        save(model, weights, finished)
    except SafetensorError as error:
        raise OSError(f"{destination} cannot be written: {one_line(error)}") from error
    (finished / "README.md").write_text(card, encoding="utf-8")
    move_contents(finished, destination)
    return type(model).from_pretrained(destination)


@contextmanager
def working_folder(destination: Path | None) -> Iterator[Path]:
    """A folder on the disk of `destination`, for what is unpacked and written before it is complete.

    It lies in `destination` if that exists: a mount point cannot be replaced, and the folder around it may belong to
    someone else. Otherwise it lies beside, and a `destination` that was not there appears only when it is complete.

    Raises `FileExistsError` for a destination with contents, also those of a conversion that was killed.
    """
    if destination is None:
        place, prefix = None, UNFINISHED
    else:
        place = next(path for path in (destination, *destination.parents) if path.exists())
        prefix = UNFINISHED if place == destination else f"{UNFINISHED}{destination.name[:100]}-"
        if not place.is_dir():
            raise FileExistsError(f"{place} is a file; name a new or empty folder")
        for path in place.iterdir():  # `tempfile` ends names by letters, digits and underscores
            if path.name.startswith(prefix) and "-" not in path.name.removeprefix(prefix):
                raise FileExistsError(
                    f"{path} belongs to another conversion to {destination}; if none is running, remove it"
                )
        if place == destination and {path.name for path in place.iterdir()} - {"lost+found"}:
            raise FileExistsError(f"{destination} is not empty; name a new folder")
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True) as scratch:
        yield Path(scratch)


def move_contents(finished: Path, destination: Path) -> None:
    """Makes `finished` the contents of `destination`. The file that `from_pretrained` looks for comes last."""
    if not destination.exists():
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.rename(finished, destination)
        return
    for path in sorted(finished.iterdir(), key=lambda path: (path.name in ("model_index.json", "config.json"), path)):
        os.rename(path, destination / path.name)


def gather_checkpoints(source, rqvae, rqtransformer, folder: Path) -> dict[str, Checkpoint]:
    """The checkpoints of the given sources by stage; an archive is extracted to `folder`."""
    found = {}
    if source is not None:
        source = Path(source)
        if source.suffix in (".pt", ".pth", ".ckpt"):
            raise ValueError(f"{source} is a single stage; name it by rqvae or rqtransformer")
        if source.is_file():
            extract_archive(source, folder)
        elif not source.is_dir():
            raise FileNotFoundError(f"no file or folder {source}")
        found = find_checkpoints(folder if source.is_file() else source, str(source))
    for option, path, stage in (("rqvae", rqvae, RQVAE), ("rqtransformer", rqtransformer, RQTRANSFORMER)):
        if path is not None:
            if stage in found:
                raise ValueError(
                    f"{source} has an {stage} already ({found[stage].label}), got {option} {path} as well"
                )
            found[stage] = single_checkpoint(path, stage)
    if not found:
        raise ValueError("nothing to convert: give source or rqvae")
    if RQVAE not in found:
        raise ValueError(
            f"{found[RQTRANSFORMER].label} needs its RQ-VAE, whose codebook embeds the codes: give it by rqvae"
        )
    return found


def convert_rqvae(checkpoint: Checkpoint, ema: bool) -> RQVAEModel:
    state_dict = checkpoint.load(ema)
    with error_context(checkpoint.label), torch.device("meta"):
        vae = RQVAEModel(**rqvae_config(checkpoint.config))
    with error_context(checkpoint.label):
        weights = rqvae_weights(state_dict, vae)
    vae.load_state_dict({name: concatenate(parts) for name, parts in weights.items()}, assign=True)
    checkpoint.unused.append("the padding rows of the codebooks")
    return vae.eval()


def convert_rqtransformer(
    checkpoint: Checkpoint, vae: RQVAEModel, ema: bool
) -> tuple[RQTransformerModel, dict[str, Parts]]:
    """The model on the meta device and its weights."""
    state_dict = checkpoint.load(ema)
    with error_context(checkpoint.label), torch.device("meta"):
        config = rqtransformer_config(checkpoint.config, shared_codebook=vae.config.shared_codebook)
        transformer = RQTransformerModel(config)
        transformer.generation_config = generation_config(checkpoint.config)
    with error_context(checkpoint.label):
        weights = rqtransformer_weights(state_dict, transformer)
    weights["codebook"] = (vae.quantizer.codebook.detach().clone(),)
    if config.code_shape[-1] == 1:
        checkpoint.unused.append("head_mlp, which is not used at depth 1")
    return transformer.eval(), weights


def text_model_tokenizer(folder, transformer: RQTransformerModel, checkpoint: Checkpoint):
    """The tokenizer in `folder`, or `None` without a folder. Raises `ValueError` if the model is not a text model."""
    if folder is None:
        return None
    length = transformer.config.cond_length
    if length == 1:
        raise ValueError(f"{checkpoint.label} is not a text model; remove tokenizer {folder}")
    with error_context(checkpoint.label):
        dataset = checkpoint.config.section("dataset")
        name = dataset.get("txt_tok_name", None)
        if not isinstance(name, str | None):
            dataset.refuse("txt_tok_name", name, "it must be a name")
        return convert_tokenizer(folder, length, name)


def save(model, weights: dict[str, Parts] | None, folder: Path) -> None:
    """Writes the files of `model.save_pretrained(folder)`, which cannot save a transformer on the meta device."""
    if isinstance(model, PreTrainedModel):
        save_transformer(model, weights, folder)
    elif isinstance(model, DiffusionPipeline):
        for name, component in model.components.items():
            if component is not None:
                save(component, weights, folder / name)
        model.save_config(folder)
    else:
        model.save_pretrained(folder)


def save_transformer(transformer: PreTrainedModel, weights: dict[str, Parts], folder: Path) -> None:
    transformer.config.architectures = [type(transformer).__name__]
    transformer.config.dtype = "float32"
    transformer.config.save_pretrained(folder)
    if transformer.can_generate():
        transformer.generation_config.save_pretrained(folder)
    shards = split_torch_state_dict_into_shards(
        transformer.state_dict(), filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_SHARD_SIZE
    )
    for filename, names in shards.filename_to_tensors.items():
        save_file({name: concatenate(weights[name]) for name in names}, folder / filename, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def single_file_config(original_config: dict, checkpoint: dict) -> dict:
    """For `RQVAEModel.from_single_file(..., original_config="config.yaml")`."""
    if not isinstance(original_config, dict):
        raise ValueError(f"original_config must hold named options, got {type(original_config).__name__}")
    return rqvae_config(Section(original_config))


def single_file_weights(checkpoint: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """For `RQVAEModel.from_single_file`."""
    with torch.device("meta"):
        vae = RQVAEModel.from_config(config)
    return {name: concatenate(parts) for name, parts in rqvae_weights(checkpoint, vae).items()}


@contextmanager
def error_context(label: str) -> Iterator[None]:
    """Turns a `ValueError` into a one-line `ValueError` with `label`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{label}: {one_line(error)}") from error
