"""The pipeline that comes with the package, and the demo that draws with it."""

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


@pytest.fixture(scope="module")
def pipe():
    pipe = rq_hf.RQPipeline.from_pretrained(rq_hf.EMOJI_MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_shipped_pipeline_is_small_and_has_a_card():
    folder = Path(rq_hf.EMOJI_MODEL)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 20e6
    assert "OFL" in (folder / "README.md").read_text()
    assert list(folder.rglob("*.bin")) == []


def test_shipped_pipeline_computes_in_single_precision(pipe):
    assert pipe.vae.dtype == pipe.transformer.dtype == torch.float32


def test_shipped_pipeline_draws_different_emoji_on_white(pipe):
    prompts = ["red heart", "blue heart", "fire engine"]
    images = pipe(prompts, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (3, 3, 64, 64)
    assert images[..., :2, :2].mean() > 0.95
    red_heart, blue_heart, _ = images[:, :, 24:40, 24:40].mean(dim=(2, 3))
    assert red_heart[0] > red_heart[2] + 0.3
    assert blue_heart[2] > blue_heart[0] + 0.3


@pytest.mark.parametrize("output", ["grid.nope", "grid", "nowhere/grid.png"])
def test_demo_notices_a_file_that_it_cannot_write_before_it_samples(tmp_path, output):
    command = ["--model", str(tmp_path / "no model"), "--output", str(tmp_path / output)]
    outcome = run_script(DEMO, *command)
    assert outcome.code == 2
    assert "--output must" in outcome.output and output in outcome.output


@pytest.mark.parametrize("arguments", [[], ["--prompt", "it's a fire engine"]])
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
