"""Models of semantic IDs, as other projects publish them -> a saved RQEmbeddingModel."""

import json
import os
import pickletools
import zipfile
from pathlib import Path

from safetensors.torch import load_file

from ..argument_checks import check_bool, check_choice, is_integer
from ..models import RQEmbeddingModel
from ..untrusted_files import (
    MAX_PICKLE_SIZE,
    StandIn,
    check_contents_are_there,
    one_line,
    read_torch_file,
    shown,
    shown_first,
)
from .conversion import error_context, with_weights, working_folder
from .embedding_weights import RQ_VAE_RECOMMENDER, Family, Weights, embedding_model, family_of

ACTIVATIONS = {"ReLU": "relu", "SiLU": "silu"}  # classes of PyTorch, and how the model calls them
INTRODUCTION = """\
Converted with `rq_hf` from a checkpoint whose weights are named as those of {projects}. Its codes are those that this
code computes, except where two codewords are equally near."""
LICENCE = """\
## Licence

The licence of the weights is that of their authors; a checkpoint does not say it. Look there before you publish this
conversion. The code that converted them, `rq_hf`, is under Apache-2.0."""


def convert_embedding_checkpoint(
    checkpoint: str | Path | dict,
    destination: str | Path | None = None,
    *,
    activation: str | None = None,
    codebook_normalize: bool | None = None,
) -> RQEmbeddingModel:
    r"""
    Converts a model of semantic IDs, which is recognised by the names of its weights: `centroids.0`, as of OpenOneRec;
    `rq.vq_layers.0.embedding.weight`, as of LC-Rec, LETTER and MiniOneRec; `layers.0.embedding.weight`, as of
    RQ-VAE-Recommender (Edoardo Botta).

    Sizes are those of the weights. No code in checkpoint files is executed.

    Args:
        checkpoint (`str`, `Path` or `dict`): a file of `torch.save` or of safetensors; or a state dict. The state dict
            may also be the `"state_dict"` or `"model"` of the file or dictionary.
        destination (`str` or `Path`, *optional*): new or empty folder to write to, for `from_pretrained`, with a model
            card. A new folder appears only when it is complete; an empty one may be a mount point.
        activation (`str`, *optional*): of RQ-VAE-Recommender, `"silu"` until 27 March 2026, where the decoder's output
            has unit length, or `"relu"` since, where it has not. A training checkpoint says it, weights alone do not.
        codebook_normalize (`bool`, *optional*): of RQ-VAE-Recommender, as its code calls it: latents and the codewords
            of the first level have unit length. Default: as a training checkpoint or the `config.json` beside the file
            says; otherwise `False`, as in all configurations of the authors.

    Returns:
        The [`RQEmbeddingModel`]. What such projects do beyond the nearest codes, such as Sinkhorn assignments of items
        that collide, is no matter of weights: [`SemanticIds`] makes IDs unique in its own ways.

    Raises:
        `FileNotFoundError` for a missing file; `FileExistsError` for a destination that is a file, not empty, or that
        another conversion works on, even a killed one; `OSError` for a full disk; `TypeError` for arguments of another
        type; `ValueError` for broken files, weights that are not finite floating-point numbers or not those of one
        model, an activation that nothing says, and what an [`RQEmbeddingModel`] cannot be: encoders that add their
        input to their output (RQ-KMeans+), and decoders of categories.
    """
    model, _, _ = convert_embedding(checkpoint, destination, activation, codebook_normalize)
    return model


def convert_embedding(
    checkpoint, destination, activation, codebook_normalize
) -> tuple[RQEmbeddingModel, dict[str, list[str]], Path | None]:
    """[`convert_embedding_checkpoint`], which also returns what it ignored of the file, and the real destination."""
    if activation is not None:
        check_choice("activation", activation, list(ACTIVATIONS.values()))
    if codebook_normalize is not None:
        check_bool("codebook_normalize", codebook_normalize)
    label = "the checkpoint" if isinstance(checkpoint, dict) else str(checkpoint)
    place = str(destination)
    destination = None if destination is None else Path(os.path.realpath(destination))
    with working_folder(destination) as scratch:
        contents = checkpoint if isinstance(checkpoint, dict) else read(Path(checkpoint))
        with error_context(label):
            weights, ignored = find_weights(contents)
            family = family_of(weights)
            if family is None:
                found = shown_first(weights, 5) or "nothing"
                raise ValueError(f"it has no weights of a semantic-ID model that is known, but {found}")
            given = {"activation": activation, "codebook_normalize": codebook_normalize}
            if family is RQ_VAE_RECOMMENDER:
                options, config = recommender_options(contents.get("model_config"), **given)
            else:
                for name, value in given.items():
                    if value is not None:
                        raise ValueError(f"{name} is not an option of {' or '.join(family.projects)}")
                options, config = {}, {}
            model = embedding_model(weights, family, options, **config)
        model = with_weights(model, None, embedding_card(model, family, place), scratch / "finished", destination)
    return model, {label: ignored}, destination


def is_embedding_checkpoint(path: Path) -> bool:
    """Whether a file has weights of a semantic-ID model, by their names. Nothing else of it is read or checked."""
    if path.suffix == ".safetensors":
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
            data = archive.read(entry) if entry.file_size <= MAX_PICKLE_SIZE else b""
        texts = {argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)}
    except Exception:  # a broken archive or pickle can raise anything; who reads it says what is wrong
        return False
    return family_of({text.removeprefix("module.") for text in texts}) is not None


def read(path: Path):
    """The contents of a checkpoint; objects that are no tensors or plain values are [`StandIn`]s. Beside weights of
    safetensors a `config.json` may lie, whose contents then are their `model_config`."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix != ".safetensors":
        return read_torch_file(path, str(path), stand_ins=True)
    check_contents_are_there(path, str(path))
    config = path.with_name("config.json")
    try:
        weights = load_file(path)
    except Exception as error:  # safetensors has exceptions of its own
        raise ValueError(f"{path} is a truncated or invalid file of safetensors: {one_line(error)}") from error
    if not config.is_file():
        return weights
    try:
        return {"model": weights, "model_config": json.loads(config.read_text(encoding="utf-8"))}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} is not JSON: {one_line(error)}") from error


def find_weights(contents) -> tuple[Weights, list[str]]:
    """The state dict in a checkpoint, by the names that it has without DDP, and the names of what else is there."""
    if not isinstance(contents, dict):
        raise ValueError(f"it must be a state dict or hold one, got {shown(type(contents).__name__)}")
    key = next((key for key in ("state_dict", "model") if isinstance(contents.get(key), dict)), None)
    weights = contents if key is None else contents[key]
    for name in weights:
        if not isinstance(name, str):
            raise ValueError(f"weights must have names, got {shown(name)}")
    ignored = [] if key is None else [shown(name) for name in contents if name not in (key, "model_config")]
    return {name.removeprefix("module."): weight for name, weight in weights.items()}, ignored


def recommender_options(
    recorded, activation: str | None, codebook_normalize: bool | None
) -> tuple[dict[str, bool], dict[str, str | bool]]:
    """
    Of an RQ-VAE-Recommender, what weights do not say: arguments of its function in `FAMILIES`, and of the model.

    Args:
        recorded: the `model_config` of a checkpoint, arguments of its model and, from training, the model as `"self"`.
        activation, codebook_normalize: see [`convert_embedding_checkpoint`].
    """
    recorded = recorded if isinstance(recorded, dict) else {}
    categories = recorded.get("n_cat_features", 0)
    if not is_integer(categories) or categories != 0:
        raise ValueError(f"model_config.n_cat_features must be 0, got {shown(categories)}: it decodes to categories")

    encoder, decoder = (layer_names(recorded.get("self"), part) for part in ("encoder", "decoder"))
    found = {*encoder, *decoder} - {"Linear", "Dropout", "Identity", "L2NormalizationLayer"}
    if len(found) > 1 or not found <= ACTIVATIONS.keys():
        raise ValueError(f"activations other than one of {list(ACTIVATIONS)} are not supported, got {shown(found)}")
    if found:
        activation = agreed("activation", activation, ACTIVATIONS[found.pop()])
        normalize_output = "L2NormalizationLayer" in decoder
    elif activation is None:
        raise ValueError("the weights do not say their activation; give activation: silu until 27 March 2026, or relu")
    else:
        normalize_output = activation == "silu"

    if "codebook_normalize" in recorded:
        if not isinstance(recorded["codebook_normalize"], bool):
            raise ValueError(
                f"model_config.codebook_normalize must be True or False, got {shown(recorded['codebook_normalize'])}"
            )
        codebook_normalize = agreed("codebook_normalize", codebook_normalize, recorded["codebook_normalize"])
    codebook_normalize = bool(codebook_normalize)
    config = {"normalize_latents": codebook_normalize, "normalize_output": normalize_output, "activation": activation}
    return {"codebook_normalize": codebook_normalize}, config


def layer_names(model: StandIn, part: str) -> list[str]:
    """Classes of the layers of `model.<part>.mlp`, in order; none for anything but a module of PyTorch."""
    for name in (part, "mlp"):
        model = modules(model).get(name)
    return [type(layer).__name__ for layer in modules(model).values()]


def modules(module: StandIn) -> dict:
    found = getattr(module, "_modules", None)
    return found if isinstance(found, dict) else {}


def agreed(name: str, given, recorded):
    if given is not None and given != recorded:
        raise ValueError(f"{name} must be {shown(recorded)}, as the checkpoint says, got {given}")
    return recorded


def embedding_card(model: RQEmbeddingModel, family: Family, place: str) -> str:
    """A card with valid Hub metadata, code that loads the model from `place`, its sizes, and where it comes from."""
    projects = " or ".join(f"[{name}]({address})" for name, address in family.projects.items())
    facts = "\n".join(f"* {fact}" for fact in embedding_sizes(model))
    return model.card(
        place,
        introduction=INTRODUCTION.format(projects=projects),
        details=f"{facts}\n\n{LICENCE}",
        license="unknown",
    )


def embedding_sizes(model: RQEmbeddingModel) -> list[str]:
    config = model.config
    widths = [config.input_dim, *config.hidden_dims, config.latent_dim] if config.hidden_dims else []
    return [
        f"codebooks of {', '.join(f'{size:,}' for size in model.codebook_sizes)} codewords of {config.latent_dim}",
        f"encoder: {' → '.join(map(str, widths))}, {config.activation}" if widths else "no encoder",
    ]
