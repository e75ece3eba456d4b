"""The command line `rq-hf`, run as a user runs it."""

import configparser
import functools
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from original_checkpoints import pack, write_both
from PIL import Image, ImageChops
from processes import run_script
from tiny import (
    CONDITIONS,
    KINDS,
    NUM_CLASSES,
    C,
    D,
    H,
    K,
    L,
    W,
    same_state,
    tiny_mar_pipeline,
    tiny_pipeline,
    tiny_vae,
)

import rq_hf
import rq_hf_cli

ROOT = Path(__file__).parents[1]
MODULE = Path(rq_hf.__file__).with_name("__main__.py")
WORDS = {"none": [], "class": ["--class", "2"], "text": ["red apple"]}
CALLS = {"none": {}, "class": {"class_labels": 2}, "text": {"prompt": "red apple"}}
NAMES = {"none": "image", "class": "class-2", "text": "red-apple"}


def run(folder, *arguments):
    """Runs `rq-hf` in a folder, in a fork of a process that has imported the libraries."""
    return run_script(MODULE, *arguments, before=[functools.partial(os.chdir, folder)])


def fails(folder, message, *arguments):
    """Runs `rq-hf`, which must end with a message of one line, and leave no new file."""
    files = sorted(folder.rglob("*"))
    outcome = run(folder, *arguments)
    assert outcome.code != 0
    assert "Traceback" not in outcome.output
    assert message in outcome.output.splitlines()[-1]
    assert sorted(folder.rglob("*")) == files


def same_image(file, image):
    with Image.open(file) as saved:
        return saved.size == image.size and ImageChops.difference(saved.convert("RGB"), image).getbbox() is None


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """Kind, pipeline and folder of an RQ model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("rq") / "model"
    pipe = tiny_pipeline(request.param)
    if request.param == "class":
        pipe.transformer.config.id2label = dict(enumerate(["tench", "shark", "hen", "owl"]))
        pipe.transformer.config.label2id = {name: i for i, name in pipe.transformer.config.id2label.items()}
    pipe.save_pretrained(folder)
    return request.param, pipe, folder


def test_generate_saves_the_images_of_the_seeds_and_says_where(saved, tmp_path):
    kind, pipe, folder = saved
    settings = ["--temperature", "0.7", "--top-k", "5,4,3,2", "--top-p", "0.9", "--device", "cpu"]
    if kind != "none":
        settings += ["--guidance-scale", "2"]
    options = ["-n", 3, "--seed", 7, "-o", "new/images", "--batch-size", 2]
    outcome = run(tmp_path, "generate", folder, *WORDS[kind], *options, *settings)
    assert outcome.code == 0, outcome.output
    files = [f"new/images/{NAMES[kind]}-{seed}.png" for seed in (7, 8, 9)]
    assert outcome.output.splitlines()[-3:] == files
    assert sorted(tmp_path.rglob("*.*")) == [tmp_path / file for file in files]
    guidance = {} if kind == "none" else {"guidance_scale": 2.0}
    call = functools.partial(pipe, **CALLS[kind], temperature=0.7, top_k=[5, 4, 3, 2], top_p=0.9, **guidance)
    images = [call(generator=[seed]).images[0] for seed in (7, 8, 9)]
    assert all(same_image(tmp_path / file, image) for file, image in zip(files, images))
    assert ImageChops.difference(images[0], images[1]).getbbox()


def test_generate_takes_the_settings_of_mar(tmp_path):
    pipe = tiny_mar_pipeline("text")
    pipe.save_pretrained(tmp_path / "model")
    settings = ["--num-iterations", "2", "--num-inference-steps", "3,2"]
    settings += ["--guidance-scale", "2", "--temperature", "0.9"]
    outcome = run(tmp_path, "generate", "model", "red apple", *settings, "--seed", "5")
    assert outcome.code == 0, outcome.output
    (image,) = pipe(
        "red apple", num_iterations=2, num_inference_steps=[3, 2], guidance_scale=2.0, temperature=0.9, generator=[5]
    ).images
    assert same_image(tmp_path / "red-apple-5.png", image)
    fails(tmp_path, "--top-k is not a setting of MARPipeline", "generate", "model", "red apple", "--top-k", "5")
    fails(tmp_path, "temperature must be", "generate", "model", "red apple", "--temperature", "1,0.9")


def test_the_embedded_model_needs_neither_a_name_nor_a_network(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:1"}
    command = [sys.executable, "-m", "rq_hf", "generate", "red apple", "--seed", "0"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "red-apple-0.png\n"
    pipe = rq_hf.RQPipeline.from_pretrained(rq_hf.EMOJI_MODEL)
    pipe.set_progress_bar_config(disable=True)
    (image,) = pipe("red apple", generator=[0]).images
    assert same_image(tmp_path / "red-apple-0.png", image)


def test_a_seed_that_is_not_given_is_another_one_each_time(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    outputs = {run(tmp_path, "generate", "./model").output for _ in range(2)}
    assert len(outputs) == 2
    assert len(list(tmp_path.glob("image-*.png"))) == 2


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "red-apple-1.png").write_text("mine")
    message = "red-apple-1.png exists, and nothing is overwritten"
    fails(tmp_path, message, "generate", "red apple", "-n", "2", "--seed", "0")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    fails(tmp_path, message, "reconstruct", "photo.png", "-o", "red-apple-1.png")
    fails(tmp_path, "red-apple-1.png is not a folder", "generate", "red apple", "-o", "red-apple-1.png")
    assert (tmp_path / "red-apple-1.png").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["red", "apple"], "there is no model 'red'"),
        (["a", "red", "apple"], "a prompt of several words needs quotes"),
        ([], "the emoji models need a prompt"),
        (["mar"], "the emoji models need a prompt"),
        (["./nowhere"], "there is no model './nowhere'"),
        (["models/nowhere"], "there is no folder 'models/nowhere', nor a pipeline of this name from the Hub"),
        (["empty", "red apple"], "empty is no saved pipeline"),
        (["other", "red apple"], "MODEL must be an RQPipeline or a MARPipeline, got other of class SomePipeline"),
        (["red apple", "--class", "2"], "give a prompt or --class, not both"),
        (["red apple", "-n", "0"], "--num-images must be at least 1, got 0"),
        (["red apple", "--seed", "-1"], "seeds must lie in [0, 2**32), got -1 to -1"),
        (["red apple", "-n", "2", "--seed", str(2**32 - 1)], "seeds must lie in [0, 2**32)"),
        (["red apple", "--temperature", "hot"], "--temperature"),
        (["red apple", "--temperature", "0"], "temperature must be greater than 0, got 0.0"),
        (["red apple", "--top-k", "5,x"], "must be a whole number, or several with commas between, got '5,x'"),
        (["red apple", "--top-k", "5,4"], "top_k must be a number or one per depth (4), got 2 values"),
        (["red apple", "--device", "tpu"], "--device must be "),
        (["red apple", "--num-iterations", "2"], "--num-iterations is not a setting of RQPipeline"),
        (["apple " * 30], "a prompt may have at most 24 tokens"),
    ],
)
def test_generate_says_what_is_wrong(tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "SomePipeline"}')
    fails(tmp_path, message, "generate", *arguments)


def test_generate_needs_what_the_model_samples_from(saved, tmp_path):
    kind, _, folder = saved
    needed = {"none": "nothing", "class": "--class", "text": "a prompt"}[kind]
    for other in {"none", "class", "text"} - {kind}:
        fails(tmp_path, f"this model samples from {needed}, got", "generate", folder, *WORDS[other])


@pytest.mark.parametrize("saved", ["class"], indirect=True)
def test_classes_have_numbers_and_names(saved, tmp_path):
    _, pipe, folder = saved
    assert run(tmp_path, "generate", folder, "--class", "hen", "--seed", "3").code == 0
    assert same_image(tmp_path / "class-hen-3.png", pipe(class_labels=2, generator=[3]).images[0])
    fails(tmp_path, "such as tench, shark, hen; got 'cow'", "generate", folder, "--class", "cow")
    fails(tmp_path, f"must lie in [0, {NUM_CLASSES}), got [9]", "generate", folder, "--class", "9")


@pytest.mark.parametrize("depth", [None, 1, D])
def test_reconstruct(tmp_path, depth):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    pipe.vae.save_pretrained(tmp_path / "vae")
    photo = Image.effect_noise((21, 13), 100).convert("RGB")
    photo.save(tmp_path / "photo.png")
    options = [] if depth is None else ["--depth", depth, "-o", "out.bmp", "--device", "cpu"]
    (expected,) = pipe.reconstruct(photo, depth=depth, resize=True)
    for model in ("model", "vae"):
        outcome = run(tmp_path, "reconstruct", model, "photo.png", *options)
        assert outcome.code == 0, outcome.output
        file = tmp_path / outcome.output.splitlines()[-1]
        assert file.name == ("photo-reconstructed.png" if depth is None else "out.bmp")
        assert same_image(file, expected)
        file.unlink()


def test_reconstruct_says_what_is_wrong(tmp_path):
    tiny_mar_pipeline().save_pretrained(tmp_path / "mar")
    tiny_vae().save_pretrained(tmp_path / "vae")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("no image")
    fails(tmp_path, "--depth is not a setting of MARPipeline", "reconstruct", "mar", "photo.png", "--depth", "2")
    fails(tmp_path, "depth", "reconstruct", "vae", "photo.png", "--depth", D + 1)
    fails(tmp_path, "cannot identify image file", "reconstruct", "vae", "text.png")
    fails(tmp_path, "there is no image 'nowhere.png'", "reconstruct", "nowhere.png")
    fails(tmp_path, "--output must end in .png", "reconstruct", "photo.png", "-o", "out.txt")
    fails(tmp_path, "--device must be ", "reconstruct", "vae", "photo.png", "--device", "cuda:99")


def test_convert_is_the_converter(tmp_path):
    vae, _ = write_both(tmp_path / "church")
    pack(tmp_path / "church", tmp_path / "church.tar.gz")
    outcome = run(tmp_path, "convert", "church.tar.gz", "--ema", "models/church")
    assert outcome.code == 0, outcome.output
    assert same_state(rq_hf.RQVAEModel.from_pretrained(tmp_path / "models/church/vae"), vae)
    assert "rq-hf convert imagenet_1.4B.tar.gz" in run(tmp_path, "convert", "--help").output
    fails(tmp_path, "error: ", "convert", "nowhere.tar.gz", "models/none")


def info_of(folder):
    outcome = run(folder, "info", ".")
    assert outcome.code == 0, outcome.output
    return dict(line.split(maxsplit=1) for line in outcome.output.splitlines())


def count(model):
    return sum(weight.numel() for weight in model.state_dict().values())


def test_info(saved):
    kind, pipe, folder = saved
    lines = info_of(folder)
    assert lines["class"] == "RQPipeline"
    assert lines["codes"] == f"{H}×{W}×{D} of {K}"
    samples = {
        "none": "unconditional",
        "class": f"conditioned on {NUM_CLASSES} classes",
        "text": f"conditioned on {L} tokens of {CONDITIONS['text']['cond_vocab_size']}",
    }
    assert lines["samples"] == samples[kind]
    assert ("tokenizer" in lines) == (kind == "text")
    for name in ("vae", "transformer"):
        assert f"{count(getattr(pipe, name)):,} weights in float32" in lines[name]
    megabytes = 4 * (count(pipe.vae) + count(pipe.transformer)) / 1e6
    assert f"{megabytes:,.1f} MB in float32" in lines["memory"]


def test_info_of_a_model_alone_with_a_card_in_bfloat16(tmp_path):
    vae = tiny_vae().to(torch.bfloat16)
    vae.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n# A card\n")
    lines = info_of(tmp_path)
    assert lines["class"] == "RQVAEModel"
    assert lines["licence"] == "other mine"
    assert f"{count(vae):,} weights in bfloat16, images of 8×8, depth {D}, codewords {K}×{C}" in lines["model"]


def test_info_of_mar(tmp_path):
    pipe = tiny_mar_pipeline("class")
    pipe.save_pretrained(tmp_path)
    lines = info_of(tmp_path)
    assert lines["latents"] == f"{C}×{H}×{W}"
    assert lines["samples"] == f"conditioned on {NUM_CLASSES} classes"
    assert lines["scheduler"] == "DDPMScheduler"
    assert f"{count(pipe.transformer):,} weights" in lines["transformer"]


def test_info_says_what_is_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    fails(tmp_path, "has neither model_index.json nor config.json", "info", "empty")
    fails(tmp_path, "there is no model 'nowhere'", "info", "nowhere")
    tiny_vae().save_pretrained(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    fails(tmp_path, "diffusion_pytorch_model.safetensors is truncated or invalid", "info", "vae")


def test_help_and_wrong_arguments_import_nothing_heavy():
    code = "import sys, rq_hf_cli\ntry: rq_hf_cli.main(sys.argv[1:])\nfinally: print(*sorted(sys.modules))"
    for arguments in (["--help"], ["generate", "--help"], ["info", "-h"], ["reconstruct", "nowhere.png"], ["draw"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert "usage: rq-hf" in done.stdout + done.stderr
        assert {"torch", "rq_hf", "numpy"}.isdisjoint(done.stdout.splitlines()[-1].split())


def test_the_console_script_is_this_command_line():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    name, target = config["options.entry_points"]["console_scripts"].split("=")
    module, function = target.strip().split(":")
    assert name.strip() == "rq-hf"
    assert getattr(import_module(module), function) is rq_hf_cli.main
