import signal

import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from processes import run_group
from safetensors.torch import load_file
from scripts import COMMON, COUNT, EXAMPLES, RESOLUTION, STEPS, TINY_MAR, finish, logged, start
from scripts import MAR as SCRIPT
from shapes import SHAPES, write_shapes
from training_process import train_and_keep

from rq_hf import MARPipeline, RQVAEModel

LATEST = ["--resume_from_checkpoint", "latest"]
GRID = RESOLUTION // 4
TINY = [*TINY_MAR, "--report_to", "none", "--image_logging_steps", 0]
TEXT = ["--text_column", "text", "--text_length", 6]
CLASSES = ["--label_column", "label", "--cond_repeats", 3]


@pytest.fixture(scope="module")
def shape_files(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), COUNT, RESOLUTION, num_shards=3)


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    """A folder with an AutoencoderKL `kl` and an RQ-VAE `rq`."""
    folder = tmp_path_factory.mktemp("vaes")
    common = {"block_out_channels": (8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": RESOLUTION}
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    AutoencoderKL(**common, **levels, latent_channels=3).save_pretrained(folder / "kl")
    sizes = {"latent_channels": 8, "codebook_dim": 6, "codebook_size": 16, "depth": 2}
    RQVAEModel(**common, **levels, **sizes).save_pretrained(folder / "rq")
    return folder


@pytest.fixture(scope="module")
def command(shape_files, vaes):
    """(output folder, further options) -> its command line."""

    def arguments(output_dir, *further):
        source = [] if "--latents" in further else ["--data_files", shape_files]
        vae = [] if "--vae" in further else ["--vae", vaes / "kl"]
        common = [option for option in COMMON if option != "--random_flip"]
        return [*map(str, [*common, *TINY, *source, *vae, "--output_dir", output_dir, *further])]

    return arguments


def final_weights(output_dir):
    return load_file(output_dir / "pipeline" / "transformer" / "model.safetensors")


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


def test_killed_and_resumed_run_ends_with_the_weights_of_an_unbroken_one(command, tmp_path):
    own = [*TEXT, "--random_flip", "--dropout", 0.2]
    finish(SCRIPT, command(tmp_path / "unbroken", *own))
    arguments = command(tmp_path / "killed", *own, *LATEST)
    assert start(SCRIPT, arguments, die_at="checkpoint-4/optimizer.bin").code == -signal.SIGKILL
    finish(SCRIPT, arguments)
    assert_same(final_weights(tmp_path / "killed"), final_weights(tmp_path / "unbroken"))
    lines = logged(tmp_path / "unbroken")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line["loss"] == pytest.approx(line["mse"] + line["vlb"], rel=1e-5)
        assert line["tokens_per_second"] == pytest.approx(GRID**2 * line["images_per_second"])


def test_two_processes_end_with_the_same_weights_resumed_or_not(command, tmp_path):
    for folder in ("unbroken", "resumed"):
        (tmp_path / folder).mkdir()

    def run(folder, steps, *further):
        options = ["--train_batch_size", 4, "--max_train_steps", steps, "--lr_scheduler", "constant", *further]
        arguments = command(tmp_path / folder / "run", *TEXT, *options)
        for outcome in run_group(2, train_and_keep, tmp_path / folder, SCRIPT, arguments):
            assert outcome.code == 0, outcome.output

    run("unbroken", 6)
    run("resumed", 4)
    run("resumed", 6, *LATEST)
    unbroken, resumed = (
        [torch.load(tmp_path / folder / f"{rank}.pt") for rank in range(2)] for folder in ("unbroken", "resumed")
    )
    assert_same(unbroken[1], unbroken[0])
    assert_same(resumed[0], unbroken[0])
    assert_same(resumed[1], unbroken[1])


SAMPLED = {
    "text": [*TEXT, "--validation_prompts", "a red circle", "a blue square"],
    "classes": [*CLASSES, "--num_samples", 3],
    "none": ["--num_samples", 2, "--patch_size", 2],
}


@pytest.mark.parametrize("condition", SAMPLED)
def test_finished_pipeline_samples_and_the_log_has_images(condition, command, shape_files, tmp_path):
    validation = ["--validation_files", shape_files, "--validation_images", 12]
    few = ["--max_train_steps", 2, "--image_logging_steps", 2]
    finish(SCRIPT, command(tmp_path / "run", *SAMPLED[condition], *validation, *few))
    assert [path.name for path in (tmp_path / "run" / "images").iterdir()] == ["samples-0000002.png"]
    (line,) = [line for line in logged(tmp_path / "run") if "validation/loss" in line]
    assert line["validation/loss"] == pytest.approx(line["validation/mse"] + line["validation/vlb"], rel=1e-5)
    pipe = MARPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    call = {"text": {"prompt": "a red circle"}, "classes": {"class_labels": 1}, "none": {}}[condition]
    images = pipe(**call, num_iterations=2, num_inference_steps=2).images
    assert images[0].size == (RESOLUTION, RESOLUTION)
    config = pipe.transformer.config
    if condition == "classes":
        assert (config.cond_vocab_size, config.null_cond_id) == (len(SHAPES) + 1, len(SHAPES))
        assert config.id2label == dict(enumerate(SHAPES))
    card = ModelCard.load(tmp_path / "run" / "pipeline" / "README.md")
    assert "MARPipeline.from_pretrained(" in card.text


@pytest.mark.parametrize("kind", ["kl", "rq"])
def test_latents_train_like_images(kind, command, vaes, shape_files, tmp_path):
    vae = ["--vae", vaes / kind]
    extraction = [*vae, "--data_files", shape_files, "--text_column", "text", "--dtype", "float32", "--cpu"]
    finish(EXAMPLES / "extract_latents.py", [*map(str, [*extraction, "--output_dir", tmp_path / "latents"])])
    finish(SCRIPT, command(tmp_path / "latents-run", *vae, *TEXT, "--latents", tmp_path / "latents"))
    finish(SCRIPT, command(tmp_path / "images-run", *vae, *TEXT))
    of_latents, of_images = (
        [line["mse"] for line in logged(tmp_path / name)] for name in ("latents-run", "images-run")
    )
    assert of_latents == pytest.approx(of_images, rel=1e-3)
    factors = [
        MARPipeline.from_pretrained(tmp_path / name / "pipeline").vae.config.scaling_factor
        for name in ("latents-run", "images-run")
    ]
    assert factors[0] == pytest.approx(factors[1], rel=1e-4)
    assert (factors[0] == 0.18215) == (kind == "kl")  # that of an RQ-VAE is measured


def test_options_of_arithmetic_keep_float32_weights(command, tmp_path):
    options = ["--mixed_precision", "bf16", "--gradient_checkpointing", "--attn_implementation", "eager"]
    finish(SCRIPT, command(tmp_path / "run", *TEXT, *options, "--max_train_steps", 2))
    weights = final_weights(tmp_path / "run").values()
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights)


def test_defaults_are_the_authors_recipe(command, tmp_path):
    finish(SCRIPT, command(tmp_path / "run", "--max_train_steps", 1))
    groups = torch.load(tmp_path / "run" / "checkpoint-1" / "optimizer.bin")["param_groups"]
    assert [group["betas"] for group in groups] == [(0.9, 0.95)] * 2
    assert [group["weight_decay"] for group in groups] == [0.02, 0.0]
    model = MARPipeline.from_pretrained(tmp_path / "run" / "pipeline").transformer
    decayed = sum(weight.ndim >= 2 for name, weight in model.named_parameters() if not name.startswith("head."))
    assert len(groups[0]["params"]) == decayed


def test_continues_from_a_trained_transformer(command, tmp_path):
    finish(SCRIPT, command(tmp_path / "first", *TEXT, "--max_train_steps", 1))
    trained = tmp_path / "first" / "pipeline"
    own = [*TEXT, "--transformer", trained / "transformer", "--tokenizer", trained / "tokenizer"]
    finish(SCRIPT, command(tmp_path / "second", *own, "--max_train_steps", 1, "--learning_rate", 1e-30))
    assert_same(final_weights(tmp_path / "second"), final_weights(tmp_path / "first"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*TEXT, "--label_column", "label"], "--text_column or --label_column, not both, got 'text' and 'label'"),
        ([*TEXT, "--transformer", "x"], "--transformer needs the --tokenizer"),
        (["--mask_ratio_min", "0"], "--mask_ratio_min must lie in (0, 1], got 0.0"),
        (["--diffusion_batch_mul", "0"], "--diffusion_batch_mul must be at least 1, got 0"),
        (["--patch_size", "3"], "patch_size must divide height and width of latent_shape, got 3"),
        (["--vae", "nowhere/at/all"], "there is no folder 'nowhere/at/all'"),
    ],
)
def test_wrong_options_stop_the_run_before_it_trains(options, message, command, tmp_path):
    outcome = start(SCRIPT, command(tmp_path / "run", *options))
    assert outcome.code
    assert message in outcome.output
    assert not logged(tmp_path / "run")
