import json
import signal

import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from processes import run_group
from safetensors.torch import load_file
from scripts import COMMON, COUNT, EXAMPLES, RESOLUTION, STEPS, finish, logged, start
from shapes import draw_shape, write_shapes
from training_process import train_and_keep

from rq_hf.images import to_pixels
from rq_hf.models.continuous_latents import encode_moments, latent_shape, sample_latents

SCRIPT = EXAMPLES / "train_autoencoder_kl.py"
TINY = [
    *("--resolution", RESOLUTION, "--block_out_channels", 8, 8, 8, "--norm_num_groups", 4, "--layers_per_block", 1),
    *("--latent_channels", 3, "--attention_levels", 2, "--perceptual_weight", 0, "--report_to", "none"),
    # The discriminator learns from step 2 on, and reaches the autoencoder at step 4.
    *("--discriminator_weight", 0.5, "--discriminator_width", 4, "--discriminator_layers", 1),
    *("--discriminator_start", 1, "--discriminator_warmup_steps", 2),
]


@pytest.fixture(scope="module")
def shape_files(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), COUNT, RESOLUTION, num_shards=3)


@pytest.fixture(scope="module")
def command(shape_files):
    """(output folder, further options) -> its command line."""

    def arguments(output_dir, *further):
        source = ["--data_files", shape_files, "--validation_files", shape_files, "--validation_images", 12]
        return [*map(str, [*COMMON, *TINY, *source, "--output_dir", output_dir, *further])]

    return arguments


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, command):
    """Folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    finish(SCRIPT, command(folder))
    return folder


def test_killed_and_resumed_run_ends_with_the_weights_of_an_unbroken_one(command, unbroken, tmp_path):
    arguments = command(tmp_path / "killed", "--resume_from_checkpoint", "latest")
    assert start(SCRIPT, arguments, die_at="checkpoint-4/optimizer.bin").code == -signal.SIGKILL
    assert not (tmp_path / "killed" / "vae").exists()
    finish(SCRIPT, arguments)
    actual, expected = (
        load_file(folder / "vae" / "diffusion_pytorch_model.safetensors") for folder in (tmp_path / "killed", unbroken)
    )
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]
    configs = [(folder / "vae" / "config.json").read_text() for folder in (tmp_path / "killed", unbroken)]
    assert configs[0] == configs[1]


def test_logs_losses_and_validation(unbroken):
    lines = [line for line in logged(unbroken) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["loss_kl"] > 0 for line in lines)
    assert [line["step"] for line in lines if "loss_discriminator" in line] == [2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "loss_generator" in line] == [4, 5, 6]
    validated = [line for line in logged(unbroken) if "validation/psnr" in line]
    assert [line["step"] for line in validated] == [3, 6]
    assert all(line["validation/psnr"] > 0 and line["validation/kl"] > 0 for line in validated)
    assert len(list((unbroken / "images").glob("reconstructions-*.png"))) == 2


@torch.no_grad()
def test_finished_model_loads_in_diffusers_with_a_card_and_a_measured_scale(unbroken):
    vae = AutoencoderKL.from_pretrained(unbroken / "vae")
    pixels = torch.stack([to_pixels(draw_shape(number, RESOLUTION), RESOLUTION) for number in range(COUNT)])
    assert latent_shape(vae) == (3, 4, 4)
    assert vae.config.down_block_types[-1] == "AttnDownEncoderBlock2D"
    assert sample_latents(vae, encode_moments(vae, pixels)).std().item() == pytest.approx(1, rel=0.1)
    card = ModelCard.load(unbroken / "vae" / "README.md")
    assert card.data.library_name == "rq_hf"
    assert "AutoencoderKL.from_pretrained(" in card.text


def test_two_processes_end_with_the_same_weights(command, tmp_path):
    arguments = command(tmp_path / "run", "--train_batch_size", 4, "--max_train_steps", 4)
    for outcome in run_group(2, train_and_keep, tmp_path, SCRIPT, arguments):
        assert outcome.code == 0, outcome.output
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_bfloat16_and_gradient_checkpointing_train_float32_weights(command, tmp_path):
    finish(
        SCRIPT,
        command(tmp_path / "run", "--mixed_precision", "bf16", "--gradient_checkpointing", "--max_train_steps", 4),
    )
    weights = load_file(tmp_path / "run" / "vae" / "diffusion_pytorch_model.safetensors").values()
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights)


def test_small_preset_gives_its_defaults(command, tmp_path):
    finish(SCRIPT, command(tmp_path / "run", "--preset", "small-cpu", "--max_train_steps", 1, "--kl_weight", 0.25))
    arguments = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["arguments"]
    assert (arguments["learning_rate"], arguments["adam_beta2"], arguments["kl_weight"]) == (1e-3, 0.95, 0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kl_weight", "-1"], "--kl_weight must be at least 0, got -1.0"),
        (["--scaling_factor_images", "0"], "--scaling_factor_images must be at least 1, got 0"),
        (["--resolution", "18"], "--resolution must be divisible by 4, got 18"),
        (["--perceptual_weight", "1"], "--perceptual_weight 0 disables it"),
        (["--commitment_weight", "1"], "commitment_weight"),
    ],
)
def test_wrong_options_stop_the_run_before_it_trains(options, message, command, tmp_path):
    outcome = start(SCRIPT, command(tmp_path / "run", *options))
    assert outcome.code
    assert message in outcome.output
    assert not logged(tmp_path / "run")
