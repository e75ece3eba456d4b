"""What a saved model is, from its configurations and the headers of its weights."""

import math
from collections import Counter
from pathlib import Path

from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from .convert.card import condition, sampling
from .models import RQTransformerConfig
from .models.pretrained import read_json

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
TRANSFORMERS = {"rq_transformer", "mar_transformer"}


def model_info(folder: Path) -> dict[str, str]:
    """
    What there is to say about a saved pipeline or model, by short names such as `"class"` and `"memory"`. No weights
    are read, only the headers of their files.

    Raises `FileNotFoundError` for a folder without `model_index.json` and `config.json`, `ValueError` for files that
    are damaged.
    """
    pipeline, alone = folder / "model_index.json", folder / "config.json"
    if pipeline.is_file():
        index = read_json(pipeline)
        parts = {name: folder / name for name, value in index.items() if isinstance(value, list) and value[0]}
        described = {"class": index.get("_class_name")}
    elif alone.is_file():
        parts = {"model": folder}
        described = {"class": class_name(read_json(alone))}
    else:
        raise FileNotFoundError(f"{folder} has neither model_index.json nor config.json, and is no saved model")
    described |= {"folder": folder, "licence": licence(folder / "README.md")}
    for part in parts.values():
        described |= sampled(part)
    total = 0
    for name, part in parts.items():
        if not part.is_dir():
            raise FileNotFoundError(f"{folder} lacks {name}/, which its model_index.json names")
        if (part / "config.json").is_file():
            described[name], count = component(part)
            total += count
        elif name == "tokenizer":
            described[name] = f"{len(AutoTokenizer.from_pretrained(part)):,} tokens"
        else:
            described[name] = class_name(read_json(part / f"{name}_config.json"))
    described["memory"] = ", ".join(f"{megabytes(size * total)} in {name}" for name, size in BYTES.items())
    return described


def component(folder: Path) -> tuple[str, int]:
    """A line about a saved model, and the number of its weights, with buffers."""
    config, counts = read_json(folder / "config.json"), count_weights(folder)
    types = ", ".join(TYPES.get(name, name) for name in counts)
    facts = [f"{class_name(config)}, {counts.total():,} weights in {types or 'no file'}"]
    if "sample_size" in config:
        facts.append(f"images of {config['sample_size']}×{config['sample_size']}")
    if config.get("_class_name") == "RQVAEModel":
        facts.append(f"depth {config['depth']}, codewords {config['codebook_size']:,}×{config['codebook_dim']}")
    return ", ".join(facts), counts.total()


def sampled(folder: Path) -> dict[str, str]:
    """What a transformer samples, from what, and its settings; nothing for another component."""
    file = folder / "config.json"
    if not file.is_file() or read_json(file).get("model_type") not in TRANSFORMERS:
        return {}
    config = AutoConfig.from_pretrained(folder)
    if isinstance(config, RQTransformerConfig):
        described = {"codes": f"{'×'.join(map(str, config.code_shape))} of {config.codebook_size:,}"}
    else:
        described = {"latents": "×".join(map(str, config.latent_shape))}
    described["samples"] = condition(config)
    if (folder / "generation_config.json").is_file():
        described["settings"] = sampling(GenerationConfig.from_pretrained(folder))
    return described


def count_weights(folder: Path) -> Counter[str]:
    """The weights in the files of a folder, by their type."""
    counts = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():
                    weight = weights.get_slice(name)
                    counts[weight.get_dtype()] += math.prod(weight.get_shape())
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or invalid: {error}") from error
    return counts


def licence(card: Path) -> str:
    metadata = ModelCard.load(card).data if card.is_file() else {}
    names = [metadata.get(key) for key in ("license", "license_name", "license_link")]
    return " ".join(filter(None, names)) or "not said in the model card"


def class_name(config: dict) -> str:
    """That of the class that a configuration of diffusers or transformers is of."""
    return config.get("_class_name") or ", ".join(config.get("architectures") or ["unknown class"])


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
