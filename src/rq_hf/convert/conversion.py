"""`convert_original_checkpoint`: the authors' checkpoints -> a saved pipeline."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from ..models import RQTransformerModel, RQVAEModel
from ..pipelines import RQPipeline
from .card import model_card, summary
from .configs import RQTRANSFORMER, RQVAE, Section, generation_config, rqtransformer_config, rqvae_config
from .files import Checkpoint, extract_archive, find_checkpoints, one_line, single_checkpoint
from .tokenizer import convert_tokenizer
from .weights import Parts, joined, rqtransformer_weights, rqvae_weights

MAX_SHARD_SIZE = "2GB"


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
    Converts checkpoints of the authors' code (kakaobrain/rq-vae-transformer) and prints what it read and ignored.

    Weights are memory-mapped, and written shard by shard: memory stays below the size of the checkpoint plus 2 GB.
    Nothing that a file might want to execute is executed.

    Args:
        source (`str` or `Path`, *optional*): their tar archive, or a folder with the two stages somewhere below it,
            each a `.pt` file beside its `config.yaml`. The RQ-VAE may be there alone.
        destination (`str` or `Path`, *optional*): new or empty folder to write to, for `from_pretrained`, with a model
            card. It appears when all is written.
        rqvae, rqtransformer (`str` or `Path`, *optional*): the `.pt` file of a stage, instead of `source` or for what
            `source` lacks; its `config.yaml` lies beside it.
        ema (`bool`): take `state_dict_ema` instead of `state_dict`: of the RQ-Transformer, as the authors sample, or
            of an RQ-VAE that comes alone.
        tokenizer (`str` or `Path`, *optional*): folder with the vocabulary and merges of a text model.

    Returns:
        The [`RQPipeline`], or the [`RQVAEModel`] when there is no second stage.

    Raises:
        `FileNotFoundError` for a path that is not there; `FileExistsError` for a destination that is not empty;
        `ValueError` for everything that is broken, does not fit together, or has no equal here: learned token
        embeddings, codebooks of unequal size, a `ch_mult` that does not start with 1.
    """
    destination = None if destination is None else Path(destination).resolve()
    if destination is not None and destination.exists() and (destination.is_file() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} is not empty; name a new folder")
    # Beside the destination, which the finished folder is renamed to. Weights of an archive are mapped from here.
    beside = None if destination is None else next(parent for parent in destination.parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix=".rq_hf-", dir=beside, ignore_cleanup_errors=True) as scratch:
        checkpoints = gather_checkpoints(source, rqvae, rqtransformer, Path(scratch, "archive"))
        stage1, stage2 = checkpoints[RQVAE], checkpoints.get(RQTRANSFORMER)
        vae = convert_rqvae(stage1, ema=ema and stage2 is None)
        if stage2 is not None:
            transformer, weights = convert_rqtransformer(stage2, vae, ema)
            text_tokenizer = text_model_tokenizer(tokenizer, transformer, stage2)
            with blamed(f"{stage1.label} and {stage2.label}"):
                model = RQPipeline(vae, transformer, text_tokenizer)
        elif tokenizer is not None:
            raise ValueError(f"an RQ-VAE alone takes no tokenizer, got {tokenizer}")
        else:
            model, weights = vae, None

        if destination is not None:
            finished = Path(scratch, "finished")
            save(model, weights, finished)
            (finished / "README.md").write_text(model_card(model), encoding="utf-8")
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(finished, destination)
            model = type(model).from_pretrained(destination)
        elif stage2 is not None:
            transformer.load_state_dict({name: joined(parts) for name, parts in weights.items()}, assign=True)
    print(summary(model, list(checkpoints.values()), destination))
    return model


def gather_checkpoints(source, rqvae, rqtransformer, folder: Path) -> dict[str, Checkpoint]:
    """All checkpoints that the arguments name; an archive is extracted to `folder`."""
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
            f"{found[RQTRANSFORMER].label} needs its RQ-VAE, with whose codebook it embeds the codes: give it by rqvae"
        )
    return found


def convert_rqvae(checkpoint: Checkpoint, ema: bool) -> RQVAEModel:
    state_dict = checkpoint.load(ema)
    with blamed(checkpoint.label):
        with torch.device("meta"):
            vae = RQVAEModel(**rqvae_config(checkpoint.config))
        weights = rqvae_weights(state_dict, vae)
    vae.load_state_dict({name: joined(parts) for name, parts in weights.items()}, assign=True)
    checkpoint.unused.append("the padding rows of the codebooks")
    return vae.eval()


def convert_rqtransformer(
    checkpoint: Checkpoint, vae: RQVAEModel, ema: bool
) -> tuple[RQTransformerModel, dict[str, Parts]]:
    """The model on the meta device, and its weights."""
    state_dict = checkpoint.load(ema)
    with blamed(checkpoint.label):
        config = rqtransformer_config(checkpoint.config, shared_codebook=vae.config.shared_codebook)
        with torch.device("meta"):
            transformer = RQTransformerModel(config)
        weights = rqtransformer_weights(state_dict, transformer)
        transformer.generation_config = generation_config(checkpoint.config)
    weights["codebook"] = (vae.quantizer.codebook.detach().clone(),)
    if config.code_shape[-1] == 1:
        checkpoint.unused.append("head_mlp, which has nothing to project at depth 1")
    return transformer.eval(), weights


def text_model_tokenizer(folder, transformer: RQTransformerModel, checkpoint: Checkpoint):
    """The tokenizer of a text model; `None` where no folder is given. Raises `ValueError` for another model."""
    if folder is None:
        return None
    length = transformer.config.cond_length
    if length == 1:
        raise ValueError(f"{checkpoint.label} is no text model and takes no tokenizer, got {folder}")
    with blamed(checkpoint.label):
        return convert_tokenizer(folder, length, checkpoint.config.section("dataset").get("txt_tok_name"))


def save(model: RQPipeline | RQVAEModel, weights: dict[str, Parts] | None, folder: Path) -> None:
    """What `model.save_pretrained(folder)` would write, were the transformer not on the meta device."""
    if isinstance(model, RQVAEModel):
        model.save_pretrained(folder)
        return
    model.vae.save_pretrained(folder / "vae")
    save_transformer(model.transformer, weights, folder / "transformer")
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder / "tokenizer")
    model.save_config(folder)


def save_transformer(transformer: RQTransformerModel, weights: dict[str, Parts], folder: Path) -> None:
    transformer.config.architectures = [type(transformer).__name__]
    transformer.config.dtype = "float32"
    transformer.config.save_pretrained(folder)
    transformer.generation_config.save_pretrained(folder)
    shards = split_torch_state_dict_into_shards(
        transformer.state_dict(), filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_SHARD_SIZE
    )
    for filename, names in shards.filename_to_tensors.items():
        save_file({name: joined(weights[name]) for name in names}, folder / filename, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def single_file_config(original_config: dict, checkpoint: dict) -> dict:
    """For `RQVAEModel.from_single_file(..., original_config="config.yaml")`."""
    return rqvae_config(Section(original_config))


def single_file_weights(checkpoint: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """For `RQVAEModel.from_single_file`."""
    with torch.device("meta"):
        vae = RQVAEModel.from_config(config)
    return {name: joined(parts) for name, parts in rqvae_weights(checkpoint, vae).items()}


@contextmanager
def blamed(label: str) -> Iterator[None]:
    """Says in one line what is wrong with a checkpoint, and with which."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{label}: {one_line(error)}") from error
    except OSError:
        raise
    except Exception as error:  # whatever an option of the wrong kind leads to
        raise ValueError(f"{label}: no model comes of its config.yaml: {one_line(error)}") from error
