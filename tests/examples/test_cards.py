"""The cards that the training scripts write: their code runs, and makes what they show."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from scripts import COMMON, COUNT, EXAMPLES, MAR, OWN, RESOLUTION, RQVAE, STEPS, TEXT, TINY_MAR, finish
from shapes import write_shapes

from rq_hf import RQVAEModel
from rq_hf.images import captioned_grid

PROMPTS = ["a small red circle", '"blue" square']


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder in which all scripts ran, with validation images."""
    folder = tmp_path_factory.mktemp("cards")
    files = write_shapes(folder / "shapes", COUNT, RESOLUTION, num_shards=3)
    data = ["--data_files", files, "--validation_files", files, "--validation_images", 8, "--report_to", "none"]
    options = [*COMMON, *data, "--image_logging_steps", STEPS]

    def start(script, name, *further):
        finish(script, [*map(str, [*options, *further, "--output_dir", folder / name])])

    start(RQVAE, "rqvae", *OWN[RQVAE])
    text = [option for option in OWN[TEXT] if option not in ("--validation_prompts", "a red circle", "a blue square")]
    vae = folder / "rqvae" / "rqvae"
    start(TEXT, "captions", *text, "--rqvae", vae)
    start(TEXT, "prompts", *text, "--rqvae", vae, "--validation_prompts", *PROMPTS)
    mar = [*TINY_MAR, "--vae", vae, "--label_column", "label", "--num_samples", 2]
    start(MAR, "classes", *mar)
    return folder


def read(folder):
    return ModelCard.load(folder / "README.md")


def execute(card):
    """The variables that the code of a card leaves behind."""
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    variables = {}
    exec(code, variables)
    return variables


@pytest.mark.parametrize("name", ["captions", "prompts", "classes"])
def test_code_of_the_card_samples_the_images_that_it_shows(runs, name):
    folder = runs / name / "pipeline"
    card = read(folder)
    variables = execute(card)
    (file,) = re.findall(r"!\[Samples\]\((.*?)\)", card.text)
    shown = Image.open(folder / file)
    config = variables["pipe"].transformer.config
    if name == "classes":
        captions = [config.id2label[label] for label in (0, 1)]
    else:
        captions = PROMPTS if name == "prompts" else re.findall(r"'(.*?)'", card.text.partition("prompt=[")[2])
        captions = captions[: len(variables["images"])]
    assert len(set(captions)) == len(variables["images"]) > 1
    assert shown.tobytes() == captioned_grid(variables["images"], captions).tobytes()


def test_code_of_the_card_of_an_autoencoder_runs(runs):
    folder = runs / "rqvae" / "rqvae"
    variables = execute(read(folder))
    assert isinstance(variables["vae"], RQVAEModel)
    assert variables["pixels"].shape == (1, 3, RESOLUTION, RESOLUTION)
    assert variables["vectors"].shape == (*variables["codes"].shape, 8)
    assert Image.open(folder / "reconstructions.png").width > RESOLUTION


@pytest.mark.parametrize(
    "name, script, task",
    [
        ("rqvae/rqvae", RQVAE, "image-to-image"),
        ("prompts/pipeline", TEXT, "text-to-image"),
        ("classes/pipeline", MAR, "unconditional-image-generation"),
    ],
)
def test_card_says_how_the_model_was_trained(runs, name, script, task):
    card = read(runs / name)
    assert (
        f"python {EXAMPLES / script.name} " in card.text and f"--output_dir {runs / name.split('/')[0]}" in card.text
    )
    assert f"{COUNT} images; image column `image`" in card.text
    assert f"| max_train_steps | {STEPS} |" in card.text and "| learning_rate | " in card.text
    assert "| loss | " in card.text and f"after step {STEPS}:" in card.text
    results = card.data.eval_results
    assert results and {(result.task_type, result.metric_args["n"]) for result in results} == {(task, 8)}
    assert all(isinstance(result.metric_value, int | float) for result in results)
    assert "rq_hf 0." in card.text and f"torch {torch.__version__}" in card.text
    assert "@inproceedings{" in card.text
    assert "..." not in card.text and "More Information" not in card.text


def test_card_says_what_the_model_was_made_from(runs):
    assert f"The autoencoder is `{runs / 'rqvae' / 'rqvae'}`, unchanged." in read(runs / "prompts" / "pipeline").text
