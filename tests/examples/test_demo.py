"""The pipelines that come with the package, and the demo that samples with them."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import run_script

import rq_hf

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


SETTINGS = {"rq": {}, "mar": {"guidance_scale": 3.0, "num_iterations": 16, "num_inference_steps": 25}}
SHIPPED = {"rq": (rq_hf.RQPipeline, rq_hf.EMOJI_MODEL, 20e6), "mar": (rq_hf.MARPipeline, rq_hf.MAR_EMOJI_MODEL, 14e6)}
both_methods = pytest.mark.parametrize("method", SHIPPED)


@functools.cache
def shipped(method):
    pipeline_class, folder, _ = SHIPPED[method]
    pipe = pipeline_class.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@both_methods
def test_shipped_pipeline_is_small_and_has_a_card(method):
    _, folder, largest = SHIPPED[method]
    folder = Path(folder)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= largest
    assert "OFL" in (folder / "README.md").read_text()
    assert list(folder.rglob("*.bin")) == []


@both_methods
def test_shipped_pipeline_computes_in_single_precision(method):
    pipe = shipped(method)
    assert pipe.vae.dtype == pipe.transformer.dtype == torch.float32


@both_methods
def test_shipped_pipeline_samples_different_emoji_on_white(method):
    prompts = ["red heart", "blue heart", "fire engine"]
    generator = torch.Generator().manual_seed(0)
    images = shipped(method)(prompts, generator=generator, output_type="pt", **SETTINGS[method]).images
    assert images.shape == (3, 3, 64, 64)
    assert images[..., :2, :2].mean() > 0.95
    red_heart, blue_heart, _ = images[:, :, 24:40, 24:40].mean(dim=(2, 3))
    assert red_heart[0] > red_heart[2] + 0.3
    assert blue_heart[2] > blue_heart[0] + 0.3


def test_shipped_mar_pipeline_fills_what_is_hidden_to_fit_what_is_kept():
    pipe = shipped("mar")
    image = pipe("red heart", generator=[0], output_type="pt", **SETTINGS["mar"]).images
    mask = torch.zeros(64, 64)
    mask[:, 32:] = 1
    filled = pipe("red heart", image=image, mask_image=mask, generator=[1], output_type="pt", **SETTINGS["mar"]).images
    assert (filled - image)[..., :24].abs().mean() < 0.05
    red, _, blue = filled[0, :, 24:40, 36:44].mean(dim=(1, 2))
    assert red > blue + 0.3


@pytest.mark.parametrize("output", ["grid.nope", "grid", "nowhere/grid.png"])
def test_demo_notices_a_file_that_it_cannot_write_before_it_samples(tmp_path, output):
    command = ["--model", str(tmp_path / "no model"), "--output", str(tmp_path / output)]
    outcome = run_script(DEMO, *command)
    assert outcome.code == 2
    assert "--output must" in outcome.output and output in outcome.output


@pytest.mark.parametrize("arguments", [[], ["--prompt", "it's a fire engine"], ["--model", "mar"]])
def test_demo_writes_a_grid_and_prints_its_path_and_speed(tmp_path, arguments):
    output = tmp_path / "grid.png"
    command = [sys.executable, str(DEMO), "--output", str(output), *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"(\S+): (\d+) images, ([\d.]+) images/s", printed)
    assert match[1] == str(output)
    assert int(match[2]) >= 16
    assert float(match[3]) > 0
    width, height = Image.open(output).size
    assert width >= 4 * 64 and height >= 4 * 64
