"""The code blocks of README, CONTRIBUTING, docs and cards, and how tests run them.

A block is Python, or shell where the fence names no language. What cannot be run has the reason in a comment before
its fence, `<!-- not run: needs the authors' weights -->`. Blocks in `DATA` are to be read, not to be run.
"""

import argparse
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset, Features
from PIL import Image
from tiny import CAPTIONS, tiny_kl, tiny_mar_pipeline, tiny_pipeline, tiny_vae
from transformers import HfArgumentParser

import rq_hf_cli
from rq_hf.text import train_tokenizer

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "model_cards")
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))),
]
SHELL, PYTHON, DATA = "", "python", ("csv", "text")
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
VARIABLES = "COUNT=100"  # that shell blocks leave to the reader
OUR_PROGRAMS = ("python", "accelerate", "make", "rq-hf")
OTHER_PROGRAMS = ("apt", "curl", "git", "hf", "npm", "pip")  # of which only marked blocks have commands


@dataclass
class Block:
    """`line` is that of the fence; `reason` says why the block is not run."""

    language: str
    code: str
    line: int
    reason: str | None


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match["language"], match["code"], text[: match.start("language")].count("\n") + 1, match["reason"])
        for match in BLOCK.finditer(text)
    ]


# What pages may assume, beside a checkout as the working directory: files, which are made here, and names. Tiny models
# stand in for those that take the authors' weights or hours of training.


def assume_published_model(folder: Path, name: str = "imagenet-1.4b") -> None:
    classes = {"cond_vocab_size": 1001, "null_cond_id": 1000}
    if name.startswith("mar"):
        pipe = tiny_mar_pipeline("class", **classes)
    elif name.startswith("imagenet"):
        pipe = tiny_pipeline("class", **classes)
    elif name.startswith("cc3m"):
        pipe = tiny_pipeline("text", cond_length=64)
        pipe.tokenizer = train_tokenizer(iter(CAPTIONS), pipe.transformer.config.cond_vocab_size, max_length=64)
    else:
        pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "models" / name)


def assume_photos(folder: Path) -> None:
    """Photos with a table, a depth map, and models that were trained on such photos."""
    (folder / "photos").mkdir()
    for path in ("photos/1.png", "photos/2.jpg", "photo.jpg"):
        Image.fromarray(np.random.default_rng(0).integers(256, size=(70, 90, 3), dtype=np.uint8)).save(folder / path)
    (folder / "photos.csv").write_text(next(block.code for block in read_blocks(ROOT / "docs/data.md")))
    Image.fromarray(np.linspace(0, 7.5, 48, dtype=np.float32).reshape(6, 8)).save(folder / "depth.tiff")
    classes = {"cond_vocab_size": 3, "null_cond_id": 2, "id2label": {0: "circle", 1: "square"}}
    tiny_pipeline("class", **classes).save_pretrained(folder / "runs/classes/pipeline")
    tiny_kl().save_pretrained(folder / "runs/kl/vae")


def assume_captioned_folder(folder: Path) -> None:
    """Images with the table of their captions."""
    (folder / "photos").mkdir()
    for path in ("1.png", "2.jpg"):
        Image.fromarray(np.random.default_rng(0).integers(256, size=(70, 90, 3), dtype=np.uint8)).save(
            folder / "photos" / path
        )
    (table,) = (block for block in read_blocks(ROOT / "docs/first-training.md") if block.language == "csv")
    (folder / "photos/metadata.csv").write_text(table.code)


def assume_cifar10(folder: Path) -> None:
    """The file of held-out images, and a trained RQ-VAE with four codes per position."""
    pixels = np.random.default_rng(0).integers(256, size=(12, 32, 32, 3), dtype=np.uint8)
    images = Dataset.from_dict({"img": list(map(Image.fromarray, pixels))}, Features({"img": datasets.Image()}))
    (folder / "cifar10").mkdir()
    images.to_parquet(folder / "cifar10/train-00004-of-00005.parquet")
    tiny_vae(depth=4, sample_size=32).save_pretrained(folder / "runs/rate-distortion/D=4-K=512/seed-0/model")


def assume_images(folder: Path) -> dict:
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    return {"images": images, "pixels": images / 127.5 - 1}


ASSUMPTIONS: dict[str, Callable[[Path], dict | None]] = {
    "README": assume_published_model,
    "data": assume_photos,
    "first-training": assume_captioned_folder,
    "rate-distortion": assume_cifar10,
    "cifar10-classifier": assume_images,
}


def assume(page: Path, folder: Path) -> dict:
    """Makes the files that a page may assume, and returns the names."""
    for path in ROOT.iterdir():
        if path.suffix != ".md" and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    if page.stem in ASSUMPTIONS:
        return ASSUMPTIONS[page.stem](folder) or {}
    if any(f"models/{page.stem}" in block.code for block in read_blocks(page)):
        assume_published_model(folder, page.stem)
    return {}


def run_blocks(page: Path, folder: Path) -> None:
    """Runs what is not marked, in order: the Python of a page in one namespace, shell by bash."""
    os.chdir(folder)
    os.environ |= {"HF_HOME": str(folder / "home"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    torch.manual_seed(0)
    names = {"__name__": "__main__"} | assume(page, folder)
    for block in read_blocks(page):
        if block.reason is None and block.language == PYTHON:
            exec(compile("\n" * block.line + block.code, page, "exec"), names)
        elif block.reason is None and block.language == SHELL:
            subprocess.run(["bash", "-euc", block.code], check=True)


def commands(block: Block) -> list[list[str]]:
    """Program and arguments of every command of a shell block, after quoting, variables and loops."""
    record = "() { printf '%s\\0' \"$FUNCNAME\" \"$@\" $'\\n'; }"
    programs = "\n".join(f"{program}{record}" for program in OUR_PROGRAMS + OTHER_PROGRAMS)
    script = f"PATH= {VARIABLES}\ncd() {{ :; }}\n{programs}\n{block.code}"
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True)
    assert done.returncode == 0, f"line {block.line}: {done.stderr}"
    return [command.split("\0")[:-1] for command in done.stdout.split("\n\0")[:-1]]


class Parsed(BaseException):
    """The command line of a program is right, and it would begin its work."""


def stop_after_parsing(monkeypatch) -> None:
    def stopping(parse):
        def parse_and_stop(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        return parse_and_stop

    monkeypatch.setattr(
        HfArgumentParser,
        "parse_args_into_dataclasses",
        stopping(HfArgumentParser.parse_args_into_dataclasses),
    )
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))


def check_command(words: list[str], monkeypatch) -> None:
    """Has the arguments of one of `OUR_PROGRAMS` checked by its own parser."""
    program, *arguments = words
    if program == "make":
        done = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    if program == "accelerate":
        assert arguments.pop(0) == "launch"
        launch = launch_command_parser().parse_args(arguments)
        arguments = [launch.training_script, *launch.training_script_args]
    elif program == "python" and arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
        return
    with monkeypatch.context() as patch:
        stop_after_parsing(patch)
        try:
            if program == "rq-hf":
                rq_hf_cli.COMMANDS[arguments[0]](arguments[1:])
            elif arguments[0] == "-m":
                patch.setattr(sys, "argv", arguments[1:])
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            else:
                script = ROOT / arguments[0]
                patch.setattr(sys, "argv", arguments)
                patch.syspath_prepend(script.parent)
                runpy.run_path(str(script), run_name="__main__")
        except Parsed:
            return
    raise AssertionError("it did not parse its command line")
