"""Command lines and files to try: options of the scripts, saved folders and checkpoints of the authors, changed."""

import functools
import json
import math
import os
import random
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import original_checkpoints as authors
import safetensors.torch
import tiny
import torch
from bad_calls import CONFIGS, VAE, sampling
from fuzzing import Invalid, describe, is_finite, quiet, same, shorten
from huggingface_hub.errors import StrictDataclassError

import rq_hf
from rq_hf.convert.__main__ import main as convert
from rq_hf.training import RunArguments, TrainingDataArguments, TransformerArguments, ValidationArguments

EXAMPLES = Path(__file__).parents[2] / "examples"
GENERAL = (RunArguments, TrainingDataArguments, TransformerArguments)
STAGE_1 = (RunArguments, TrainingDataArguments, ValidationArguments)
SCRIPTS = {
    "train_rqvae.py": (*STAGE_1, "RQVAEArguments", "RQVAELossArguments"),
    "train_autoencoder_kl.py": (*STAGE_1, "AutoencoderKLArguments", "AutoencoderKLLossArguments"),
    "train_t2i.py": (*GENERAL, "TextArguments"),
    "train_class_conditional.py": (*GENERAL, "ClassArguments"),
    "extract_latents.py": ("DatasetArguments", "ExtractionArguments"),
}
REQUIRED = ["--output_dir", "out", "--rqvae", "vae"]
WORDS = [
    "",
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1",
    "2",
    "1.5",
    "-0.5",
    "1e400",
    "1e-3",
    "abc",
    "True",
    "0x10",
    "1_0",
    "²",
    "10**3",
    "None",
]
# Whole numbers that may be 0.
ZERO = {
    "seed",
    "dataloader_num_workers",
    "lr_warmup_steps",
    "image_logging_steps",
    "discriminator_start",
    "depth_layers",
}
ZERO |= {"discriminator_warmup_steps", "attention_levels"}
SHARES = {"adam_beta1", "adam_beta2", "ema_decay", "hidden_dropout", "cond_dropout", "dropout", "codebook_ema_decay"}
SHARES |= {"bpe_dropout", "quantizer_dropout"}
POSITIVE = {"learning_rate", "peak_teraflops", "soft_label_temperature", "max_adaptive_weight"}


class FileCase(NamedTuple):
    """
    Args:
        text: what is changed.
        words: by which a message may name it.
        run: -> the result, if it is not refused.
        is_right: of the result.
    """

    text: str
    words: tuple[str, ...]
    run: Callable
    is_right: Callable

    def __str__(self):
        return self.text


def verdict(case: FileCase) -> tuple[str, str]:
    """As for calls; `OSError` and the exit of a command line are refusals, too."""
    with quiet() as output:
        try:
            torch.manual_seed(0)
            result = case.run()
        except (ValueError, TypeError, OSError, SystemExit, StrictDataclassError) as error:
            said = f"{error} {output.getvalue()}"
            named = any(word.lower() in said.lower() for word in case.words)
            return ("refused" if named else "obscure"), describe(error) + shorten(output.getvalue()[-160:])
        except Exception as error:
            return "obscure", describe(error)
        return ("right" if case.is_right(result) else "wrong"), shorten(result)


def file_cases(count: int, seed: int, folder: Path) -> Iterator[FileCase]:
    rng = random.Random(seed)
    makers = [command_line, converter_line, saved_config, saved_weights, saved_bytes, authors_checkpoint]
    for number in range(count):
        yield makers[number % len(makers)](rng, folder)


# Command lines


@functools.cache
def script(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / name), run_name=name)


def argument_classes(name: str) -> list[type]:
    return [script(name)[c] if isinstance(c, str) else c for c in SCRIPTS[name]]


def command_line(rng: random.Random, folder: Path) -> FileCase:
    name = rng.choice(list(SCRIPTS))
    classes = argument_classes(name)
    options = [(c, f) for c in classes for f in fields(c)]
    argument_class, option = rng.choice(options)
    words = rng.choices([w for w in WORDS], k=rng.choice([1, 1, 1, 2, 0]))
    is_stage_1 = classes[: len(STAGE_1)] == list(STAGE_1)
    required = REQUIRED if not is_stage_1 else [*REQUIRED[:2], "--perceptual_weight", "0"]
    line = [*required, f"--{option.name}", *words]
    if rng.random() < 0.1:
        line[-1 - len(words)] += "x"

    def run():
        with command(name, line):
            parsed = script(name)["parse_arguments"](*classes, description=name, sections=())
        return getattr(next(p for p in parsed if isinstance(p, argument_class)), option.name)

    hint = get_type_hints(argument_class)[option.name]
    return FileCase(
        f"{name} {' '.join(map(repr, line))}",
        (option.name, *map(repr, words)),
        run,
        functools.partial(is_option, option, hint, words),
    )


def is_option(option, hint, words: list[str], value) -> bool:
    """Whether the value is the meaning of the words, and one that the option may have."""
    types = [t for t in (hint, *get_args(hint)) if t in (int, float, str, bool)]
    kind = types[0]
    values = value if isinstance(value, list) else [value]
    if kind is bool:
        return [w.lower() in ("true", "1", "yes", "t", "y") for w in words] == values or (not words and value is True)
    if kind is str:
        choices = option.metadata.get("choices")
        return values == words and (choices is None or value in choices)
    try:
        meant = [kind(word) for word in words]
    except ValueError:
        return False
    if not all(math.isfinite(number) for number in meant):
        return False
    lowest = 0 if kind is float or option.name in ZERO else 1
    highest = 1 if option.name in SHARES else math.inf
    fits = all(lowest <= n < highest and (n > 0 or option.name not in POSITIVE) for n in meant)
    return meant == values and fits


@contextmanager
def command(name: str, line: list[str]):
    before, sys.argv = sys.argv, [name, *line]
    try:
        yield
    finally:
        sys.argv = before


def converter_line(rng: random.Random, folder: Path) -> FileCase:
    places = [
        "/nope",
        str(folder),
        str(folder / "vae"),
        "no.pt",
        str(folder / "vae" / "config.json"),
        "-x",
        "a",
        "b",
    ]
    line = [
        rng.choice(["--rqvae", "--rqtransformer", "--tokenizer", "--vae", "--ema", "--nope", rng.choice(places)])
        for _ in range(rng.randint(0, 3))
    ]
    line = [
        word
        for part in line
        for word in ([part, rng.choice(places)] if part.startswith("--") and part != "--ema" else [part])
    ]

    def run():
        with command("convert", line):
            return convert()

    words = ("usage", "error: ", *(word for word in line if word))
    return FileCase(f"convert {' '.join(map(repr, line))}", words, run, lambda result: False)


# Saved folders

JSON_VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    1.5,
    math.nan,
    math.inf,
    10**15,
    "abc",
    "4",
    "",
    [],
    [1],
    [2, 3, 4],
    {},
    {"a": 1},
    "gelu",
]


def probe_vae(vae):
    torch.manual_seed(0)
    return vae.get_codes(tiny.tiny_pixels()), vae.decode_codes(tiny.tiny_codes(shape=(2, 3, vae.config.depth))).sample


def probe_transformer(model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(2, model.config.cond_length, dtype=torch.long)
    return model.generate(ids, generator=generator)


def probe_pipeline(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe("red apple", generator=torch.Generator().manual_seed(0), output_type="pt").images


LOADERS = {
    "vae": (rq_hf.RQVAEModel.from_pretrained, probe_vae),
    "transformer": (rq_hf.RQTransformerModel.from_pretrained, probe_transformer),
    "": (rq_hf.RQPipeline.from_pretrained, probe_pipeline),
}
KINDS_OF = {"vae/config.json": VAE[0].kinds, "transformer/config.json": CONFIGS[1].kinds, "stack": CONFIGS[0].kinds}
KINDS_OF["transformer/generation_config.json"] = sampling


def save_folder(folder: Path) -> None:
    torch.manual_seed(0)
    pipe = tiny.tiny_pipeline("text")
    pipe.transformer.generation_config.update(do_sample=True, temperature=0.7, top_k=5)
    pipe.save_pretrained(folder)


@contextmanager
def changed(path: Path, content: bytes | None):
    """With another content of a file, or without the file."""
    kept = path.with_name("kept")
    path.rename(kept)  # not overwritten, because models that were loaded may still map it
    try:
        if content is not None:
            path.write_bytes(content)
        yield
    finally:
        kept.replace(path)


@functools.cache
def original(folder: Path, part: str):
    load, probe = LOADERS[part]
    return probe(load(folder / part))


def load_changed(folder: Path, part: str, file: str, content: bytes | None):
    """The loaded object and what its probe gives."""
    load, probe = LOADERS[part]
    with changed(folder / file, content):
        loaded = load(folder / part)
    torch.manual_seed(0)
    return loaded, probe(loaded)


def saved_config(rng: random.Random, folder: Path) -> FileCase:
    """One entry of a JSON file is removed or replaced."""
    file = rng.choice(
        ["vae/config.json"] * 3 + ["transformer/config.json"] * 4 + ["transformer/generation_config.json"] * 2
    )
    part = os.path.dirname(file)
    config = json.loads((folder / file).read_text())
    section, kinds = config, KINDS_OF.get(file, {})
    if part == "transformer" and rng.random() < 0.3 and "spatial_config" in config:
        section, kinds = config[rng.choice(["spatial_config", "depth_config"])], KINDS_OF["stack"]
    key = rng.choice(sorted(section))
    if rng.random() < 0.2:
        del section[key]
        what = "removed"
        value = MISSING
    else:
        value = section[key] = rng.choice(JSON_VALUES)
        what = f"= {value!r}"

    def run():
        return load_changed(folder, part, file, json.dumps(config).encode())

    def is_right(result):
        loaded, probed = result
        if same(probed, original(folder, part)):
            return True
        if value is MISSING and "generation" in file:
            return is_finite(probed)
        if value is MISSING or key not in kinds:
            return False
        try:
            kinds[key].plain(value)
        except Invalid:
            return False
        return is_finite(probed)

    return FileCase(f"{file}: {key} {what}", (key, file, Path(file).name, str(folder)), run, is_right)


def saved_bytes(rng: random.Random, folder: Path) -> FileCase:
    """A file is removed, cut off, emptied or is something else."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = [f for f in files if "README" not in f]
    file = rng.choice(files)
    content = (folder / file).read_bytes()
    part = os.path.dirname(file) if os.path.dirname(file) in LOADERS else ""
    name, new = rng.choice(
        [
            ("removed", None),
            ("empty", b""),
            ("cut off", content[: rng.randrange(len(content))]),
            ("a web page", b"<!DOCTYPE html><html></html>"),
            ("null", b"null"),
            ("a list", b"[1, 2]"),
            ("a number", b"3"),
            ("binary", bytes(rng.randrange(256) for _ in range(200))),
            ("followed by more", content + b"\0{"),
        ]
    )

    def is_right(result):
        loaded, probed = result
        return same(probed, original(folder, part)) or (name == "removed" and "generation_config" in file)

    words = (file, Path(file).name, str(folder / part), "tokenizer" if "tokenizer" in file else file, "README")
    return FileCase(f"{file}: {name}", words, lambda: load_changed(folder, part, file, new), is_right)


WEIGHT_CHANGES = {
    "removed": lambda w: None,
    "transposed": lambda w: w.transpose(0, -1).contiguous(),
    "flattened": lambda w: w.flatten(),
    "one row less": lambda w: w[:-1].clone(),
    "a number": lambda w: w.sum(),
    "NaN": lambda w: w * math.nan,
    "infinite": lambda w: w + math.inf,
    "half": lambda w: w.half(),
    "double": lambda w: w.double(),
    "empty": lambda w: w[:0].clone(),
    "another one added": lambda w: w,
}


def saved_weights(rng: random.Random, folder: Path) -> FileCase:
    """One tensor of a safetensors file is removed, added or replaced."""
    part, name = rng.choice([("vae", "diffusion_pytorch_model.safetensors"), ("transformer", "model.safetensors")])
    weights = safetensors.torch.load_file(folder / part / name)
    key, change = rng.choice(sorted(weights)), rng.choice(list(WEIGHT_CHANGES))
    weight = WEIGHT_CHANGES[change](weights.pop(key))
    if weight is not None:
        weights[key] = weight
    if change == "another one added":
        weights[f"{key}.nope"] = torch.zeros(2)
    content = safetensors.torch.save(weights, metadata={"format": "pt"})

    def is_right(result):
        loaded, probed = result
        if change in ("NaN", "infinite"):  # either shows, or is not used
            return True
        state = loaded.state_dict()[key]
        return weight is not None and torch.equal(state, weight.to(state.dtype)) and is_finite(probed)

    words = (key, name, str(folder / part), "NaN")
    return FileCase(
        f"{part}/{name}: {key} {change}",
        words,
        lambda: load_changed(folder, part, f"{part}/{name}", content),
        is_right,
    )


# Checkpoints of the authors

OPTIONS = sorted(
    [
        "arch.hparams." + name
        for name in (
            "embed_dim",
            "n_embed",
            "latent_shape",
            "code_shape",
            "shared_codebook",
            "decay",
            "restart_unused_codes",
        )
    ]
    + [
        "arch.ddconfig." + name
        for name in (
            "z_channels",
            "resolution",
            "in_channels",
            "out_ch",
            "ch",
            "ch_mult",
            "num_res_blocks",
            "attn_resolutions",
            "dropout",
        )
    ]
)


def authors_checkpoint(rng: random.Random, folder: Path) -> FileCase:
    """An RQ-VAE of the authors with another option, another weight, or broken."""
    place = folder / "authors"
    shutil.rmtree(place, ignore_errors=True)
    if rng.random() < 0.5:
        option, value = rng.choice(OPTIONS), rng.choice(JSON_VALUES)
        text, words = f"{option} = {value!r}", (option.split(".")[-1], "model.pt", "config.yaml")
        path = authors.write_rqvae(place, options={option: value})
        content = path.read_bytes()
    else:
        weights = authors.original_rqvae(authors.shared_rqvae())
        key, change = rng.choice(sorted(weights)), rng.choice([c for c in WEIGHT_CHANGES if c not in AUTHORS_OPEN])
        weight = WEIGHT_CHANGES[change](weights.pop(key))
        weights |= {} if weight is None else {key: weight}
        if change == "another one added":
            weights[f"{key}.nope"] = torch.zeros(2)
        path = authors.write(place / "stage1", authors.config_with(authors.RQVAE_CONFIG, {}), weights)
        text, words = f"{key} {change}", (key, "model.pt")
        content = path.read_bytes()
        if rng.random() < 0.3:
            cut = rng.randrange(len(content))
            content, text = content[:cut], f"the first {cut} bytes"
    config = path.with_name("config.yaml").read_bytes()

    def run():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.with_name("config.yaml").write_bytes(config)
        try:
            vae = rq_hf.convert_original_checkpoint(rqvae=path)
        finally:
            shutil.rmtree(place)
        return probe_vae(vae), dict(vae.config)

    def is_right(result):
        probed, _ = result
        return is_finite(probed)

    return FileCase(f"authors' model.pt: {text}", words, run, is_right)


# Changes of weights that the converter does not look at.
AUTHORS_OPEN = {"NaN", "infinite"}
