"""
The command line `rq-hf`, which is also `python -m rq_hf`.

It lies beside the package: to import `rq_hf` takes seconds, which neither `--help` nor a wrong argument should.
"""

import argparse
import functools
import importlib.metadata
import os
import random
import re
import sys
from pathlib import Path

EMBEDDED = {"rq": "EMOJI_MODEL", "mar": "MAR_EMOJI_MODEL"}
MODEL_HELP = "rq (if left out) or mar, the emoji models of the package, a folder, or user/name on the Hub"
SETTINGS = {
    "guidance_scale": (float, "classifier-free guidance; 1 is none"),
    "temperature": (float, "above 1 more varied, below 1 more typical"),
    "top_k": (int, "RQ: sample from the K likeliest codes"),
    "top_p": (float, "RQ: sample from the likeliest codes that have this share of the probability"),
    "num_iterations": (int, "MAR: steps in which the tokens of an image are sampled"),
    "num_inference_steps": (int, "MAR: steps in which each token is denoised; X,X in the first and last iteration"),
}
DEVICE_HELP = "cpu, cuda, cuda:1 or such (the accelerator, if there is one)"
LONGEST_NAME = 50  # characters of a prompt in the name of a file

MAIN_EPILOG = """\
commands:
  generate      images from a prompt, a class, or nothing
  reconstruct   an image, encoded and decoded
  convert       a checkpoint of the authors into a folder for the other commands
  info          what a model is: sizes, weights, memory, settings, licence

examples:
  rq-hf generate "red apple"
  rq-hf generate models/cc3m "a painting of a cat" -n 4 -o cats
  rq-hf reconstruct photo.jpg --depth 2 -o coarse.png
  rq-hf info models/cc3m

rq-hf COMMAND --help is the manual of a command.
"""
GENERATE_EPILOG = """\
examples:
  rq-hf generate "red apple"
  rq-hf generate mar "red apple" -n 4 -o apples --guidance-scale 3 --num-iterations 16 --num-inference-steps 25
  rq-hf generate models/imagenet-1.4b --class 207 --top-k 2048,1024,512,256
  rq-hf generate models/ffhq-355m -n 16 --seed 0

Two words are MODEL and PROMPT. One alone is a model if it is rq, mar, a saved pipeline, or a path or Hub id (with a /
and no spaces), and otherwise a prompt for rq: generate "either/or" by rq-hf generate rq "either/or". Settings that you
leave out are those of the model. Those of RQ are a number, or one for each depth, with commas between them. An image
depends on its seed, not on how many there are: in Python, generator=[SEED] gives the same one.
"""
RECONSTRUCT_EPILOG = """\
examples:
  rq-hf reconstruct photo.jpg
  rq-hf reconstruct models/imagenet-1.4b photo.jpg --depth 2 -o coarse.png

The image may have any size: as for training, its shorter side is resized and its centre kept.
"""
INFO_EPILOG = """\
Of weights, only the headers of files are read. A model of the Hub is downloaded first.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("rq-hf", "COMMAND ...", "Images by residual quantization and by MAR.", MAIN_EPILOG)
    version = importlib.metadata.version("rq_hf")
    parser.add_argument("--version", action="version", version=f"rq_hf {version}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    try:
        COMMANDS[args.command](args.arguments)
    except (ValueError, TypeError, OSError) as error:
        from rq_hf.untrusted_files import one_line

        sys.exit(f"rq-hf {args.command}: error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(f"rq-hf {args.command}: error: interrupted")


class Parser(argparse.ArgumentParser):
    """Of a command, with its examples as they are written."""

    def __init__(self, prog: str, usage: str, description: str, epilog: str):
        formatter = argparse.RawDescriptionHelpFormatter
        usage = f"{prog} {usage}"
        super().__init__(prog, usage, description, epilog, formatter_class=formatter)

    def check_model(self, model: str) -> None:
        """Ends the program unless this can be a model."""
        if model not in EMBEDDED and not os.path.isdir(model) and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
            self.error(f"there is no model {model!r}. MODEL is {MODEL_HELP}; a prompt of several words needs quotes")

    def check_new(self, *files: Path) -> None:
        """Ends the program for files that exist, or that would lie below one."""
        for file in files:
            if file.exists():
                self.error(f"{file} exists, and nothing is overwritten: choose another place (-o) or remove it")
            if any(parent.exists() and not parent.is_dir() for parent in file.parents):
                self.error(f"{file} cannot be written: {file.parent} is not a folder")


def generate(arguments: list[str]) -> None:
    parser = Parser(
        "rq-hf generate",
        '[MODEL] ["PROMPT"] [options]',
        "Samples images and saves each as FOLDER/PROMPT-SEED.png.",
        GENERATE_EPILOG,
    )
    parser.add_argument("words", nargs="*", metavar="MODEL PROMPT", help=f"MODEL is {MODEL_HELP}")
    parser.add_argument("--class", dest="label", metavar="CLASS", help="number or name, of a class-conditional model")
    parser.add_argument("-n", "--num-images", type=int, default=1, metavar="N", help="(%(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path(), metavar="FOLDER", help="(the current one)")
    parser.add_argument("--seed", type=int, help="of the first image, the others follow (at random)")
    for name, (kind, text) in SETTINGS.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=functools.partial(numbers, kind), metavar="X", help=text)
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images at a time (%(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(that of the model)")
    parser.add_argument("--device", help=DEVICE_HELP)
    args = parser.parse_intermixed_args(arguments)

    if len(args.words) > 2:
        parser.error(f"give MODEL and one PROMPT, got {args.words}: a prompt of several words needs quotes")
    model, prompt = args.words if len(args.words) == 2 else [None, *args.words, None][:2]
    if len(args.words) == 1 and is_model(args.words[0]):
        model, prompt = args.words[0], None
    if model is not None:
        parser.check_model(model)
    if prompt is not None and args.label is not None:
        parser.error(f"give a prompt or --class, not both; got {prompt!r} and {args.label!r}")
    if prompt is None and (model is None or model in EMBEDDED):
        parser.error('the emoji models need a prompt, such as: rq-hf generate "red apple"')
    for name in ("num_images", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    first = random.randrange(10**6) if args.seed is None else args.seed
    if not 0 <= first <= 2**32 - args.num_images:
        parser.error(f"seeds must lie in [0, 2**32), got {first} to {first + args.num_images - 1}")
    name = file_name(prompt if prompt is not None else "image" if args.label is None else f"class {args.label}")
    files = {seed: args.output / f"{name}-{seed}.png" for seed in range(first, first + args.num_images)}
    parser.check_new(*files.values())
    settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    sample(model or "rq", prompt, args.label, settings, files, args.batch_size, args.dtype, args.device)


def sample(
    model: str,
    prompt: str | None,
    label: str | None,
    settings: dict,
    files: dict[int, Path],
    batch_size: int,
    dtype: str | None,
    device: str | None,
) -> None:
    """Samples an image for each seed in `files`, and saves it there."""
    import torch
    from transformers import AutoConfig

    from rq_hf.files import atomic_file

    hide_loading()
    device = device_of(device)
    place = place_of(model)
    pipeline_class = pipeline_class_of(place)
    condition = condition_of(AutoConfig.from_pretrained(place, subfolder="transformer"), prompt, label)
    check_taken(pipeline_class.__call__, settings, pipeline_class)
    pipe = pipeline_class.from_pretrained(place, **({} if dtype is None else {"dtype": getattr(torch, dtype)}))
    pipe.to(device)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    seeds = list(files)
    for start in range(0, len(seeds), batch_size):
        batch = seeds[start : start + batch_size]
        images = pipe(**condition, **settings, num_images_per_prompt=len(batch), generator=batch).images
        for seed, image in zip(batch, images):
            with atomic_file(files[seed]) as file:
                image.save(file)
            print(files[seed], flush=True)


def numbers(kind: type, text: str) -> float | list[float]:
    """A number, or several with commas between them."""
    try:
        values = [kind(value) for value in text.split(",")]
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what}, or several with commas between, got {text!r}") from error
    return values if len(values) > 1 else values[0]


def device_of(name: str | None) -> str:
    """A device of this machine by its name; without one, the accelerator or else the CPU. Raises `ValueError` for
    another name."""
    import torch

    found = ["cpu"]
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        kind = accelerator.type
        found = [kind, *(f"{kind}:{number}" for number in range(torch.accelerator.device_count())), *found]
    if name is not None and name not in found:
        raise ValueError(f"--device must be {' or '.join(found)} on this machine, got {name!r}")
    return name or found[0]


def is_model(word: str) -> bool:
    """Whether a word alone is a model, not a prompt."""
    has_form = "/" in word and not re.search(r"\s", word)
    return word in EMBEDDED or has_form or os.path.isfile(os.path.join(word, "model_index.json"))


def file_name(text: str) -> str:
    """The letters and digits of a text, words separated by hyphens; `"image"` if it has none."""
    return re.sub(r"[\W_]+", "-", text)[:LONGEST_NAME].strip("-") or "image"


def reconstruct(arguments: list[str]) -> None:
    parser = Parser(
        "rq-hf reconstruct",
        "[MODEL] IMAGE [options]",
        "Encodes an image, decodes it, and saves the result.",
        RECONSTRUCT_EPILOG,
    )
    parser.add_argument(
        "words", nargs="+", metavar="MODEL IMAGE", help=f"MODEL is {MODEL_HELP}; or the folder of an RQ-VAE"
    )
    parser.add_argument("--depth", type=int, metavar="D", help="RQ: of only the first D codes of every position")
    parser.add_argument("--device", help=DEVICE_HELP)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="(IMAGE-reconstructed.png, here)")
    args = parser.parse_intermixed_args(arguments)

    if len(args.words) > 2:
        parser.error(f"give MODEL and one IMAGE, got {args.words}")
    *model, path = args.words
    if model:
        parser.check_model(model[0])
    if not os.path.isfile(path):
        parser.error(f"there is no image {path!r}")
    output = args.output or Path(f"{Path(path).stem}-reconstructed.png")
    parser.check_new(output)

    from PIL import Image

    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        parser.error(f"--output must end in .png, .jpg or another kind of image, got {output}")
    try:
        image = Image.open(path)
        image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has too many pixels: {error}") from error

    from rq_hf import RQPipeline, RQVAEModel
    from rq_hf.files import atomic_file

    hide_loading()
    device = device_of(args.device)
    place = place_of(model[0] if model else "rq")
    if os.path.isfile(os.path.join(place, "config.json")):
        pipe = RQPipeline(RQVAEModel.from_pretrained(place), None)
    else:
        pipeline_class = pipeline_class_of(place)
        others = {name: None for name in pipeline_class._optional_components if name != "vae"}
        pipe = pipeline_class.from_pretrained(place, **others)
    depth = {} if args.depth is None else {"depth": args.depth}
    check_taken(pipe.reconstruct, depth, type(pipe))
    (reconstruction,) = pipe.to(device).reconstruct(image, resize=True, **depth)
    with atomic_file(output) as file:
        reconstruction.save(file)
    print(output)


def convert(arguments: list[str]) -> None:
    from rq_hf.convert.__main__ import main

    main(arguments, prog="rq-hf convert")


def info(arguments: list[str]) -> None:
    parser = Parser("rq-hf info", "[MODEL]", "Says what a model is.", INFO_EPILOG)
    parser.add_argument("model", nargs="?", default="rq", metavar="MODEL", help=MODEL_HELP)
    model = parser.parse_args(arguments).model
    parser.check_model(model)

    from huggingface_hub import snapshot_download

    from rq_hf.model_info import model_info

    place = place_of(model)
    files = ["*.json", "*.safetensors", "README.md"]
    folder = Path(place if os.path.isdir(place) else snapshot_download(place, allow_patterns=files))
    for name, value in model_info(folder).items():
        print(f"{name:12} {value}")


def place_of(model: str) -> str:
    """Folder or Hub id of a MODEL."""
    import rq_hf

    return getattr(rq_hf, EMBEDDED[model]) if model in EMBEDDED else model


def hide_loading() -> None:
    """Turns off the progress bars of loading."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def pipeline_class_of(place: str) -> type:
    """The class of a saved pipeline. Raises `FileNotFoundError` for anything else, `ValueError` for another class."""
    from huggingface_hub import hf_hub_download

    from rq_hf import MARPipeline, RQPipeline
    from rq_hf.models.pretrained import read_json
    from rq_hf.untrusted_files import one_line

    index = Path(place, "model_index.json")
    if not os.path.isdir(place):
        try:
            index = Path(hf_hub_download(place, index.name))
        except OSError as error:
            raise FileNotFoundError(
                f"there is no folder {place!r}, nor a pipeline of this name from the Hub: {one_line(error)}"
            ) from error
    elif not index.is_file():
        raise FileNotFoundError(f"{place} is no saved pipeline: it has no model_index.json")
    name = read_json(index).get("_class_name")
    if name not in ("RQPipeline", "MARPipeline"):
        raise ValueError(f"MODEL must be an RQPipeline or a MARPipeline, got {place} of class {name}")
    return {"RQPipeline": RQPipeline, "MARPipeline": MARPipeline}[name]


def condition_of(config, prompt: str | None, label: str | None) -> dict:
    """The argument of a pipeline that says what to sample. Raises `ValueError` unless it is what the model takes."""
    from rq_hf.pipelines.conditions import is_class_conditional, is_text_conditional

    needed = "a prompt" if is_text_conditional(config) else "--class" if is_class_conditional(config) else "nothing"
    given = "a prompt" if prompt is not None else "--class" if label is not None else "nothing"
    if given != needed:
        raise ValueError(f"this model samples from {needed}, got {given}")
    if prompt is not None:
        return {"prompt": prompt}
    return {} if label is None else {"class_labels": number_of_class(config, label)}


def number_of_class(config, label: str) -> int:
    from rq_hf.pipelines.conditions import check_class_labels

    if label in config.label2id:
        return config.label2id[label]
    if not label.isdecimal():
        names = ", ".join(config.id2label[number] for number in sorted(config.id2label)[:3])
        raise ValueError(f"--class must be a number or the name of a class, such as {names}; got {label!r}")
    check_class_labels(int(label), config)
    return int(label)


def check_taken(call, settings: dict, pipeline_class: type) -> None:
    """Raises `ValueError` for a setting that this call of the pipeline does not have."""
    import inspect

    for name in settings.keys() - inspect.signature(call).parameters.keys():
        raise ValueError(f"--{name.replace('_', '-')} is not a setting of {pipeline_class.__name__}")


COMMANDS = {"generate": generate, "reconstruct": reconstruct, "convert": convert, "info": info}

if __name__ == "__main__":
    main()
