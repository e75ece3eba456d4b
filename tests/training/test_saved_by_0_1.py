"""Folders that version 0.1 wrote load, and its checkpoints resume to the weights that it ended with."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from scripts import CLASSES, RQVAE, TEXT, final_weights, finish, logged
from shapes import write_shapes

from rq_hf import RQPipeline, RQVAEModel

SAVED = Path(__file__).parents[1] / "saved_by_0_1"
COMMON = [
    *("--cpu", "--max_train_steps", 6, "--train_batch_size", 8, "--lr_warmup_steps", 2, "--logging_steps", 1),
    *("--image_logging_steps", 0, "--checkpointing_steps", 2, "--report_to", "none"),
    *("--resume_from_checkpoint", "latest"),
]
TRANSFORMER = [
    *("--rqvae", SAVED / "rqvae" / "rqvae", "--hidden_size", 8, "--num_attention_heads", 2),
    *("--spatial_layers", 1, "--depth_layers", 1, "--soft_label_temperature", 0.5),
]
IMAGES = ["--data_files", "DATA", "--random_flip"]
RUNS = {
    "rqvae": (
        RQVAE,
        [
            *(*IMAGES, "--resolution", 8, "--block_out_channels", 4, 4, "--norm_num_groups", 2),
            *("--layers_per_block", 1, "--latent_channels", 4, "--codebook_dim", 4, "--codebook_size", 16),
            *("--depth", 2, "--perceptual_weight", 0, "--discriminator_width", 2, "--discriminator_layers", 1),
            *("--discriminator_start", 1, "--learning_rate", 1e-3),
        ],
    ),
    "t2i": (TEXT, [*IMAGES, *TRANSFORMER, "--text_length", 6]),
    "classes": (CLASSES, [*TRANSFORMER, "--latents", SAVED / "latents", "--label_column", "label"]),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), count=20, resolution=16)


@pytest.mark.parametrize("name", RUNS)
def test_checkpoint_resumes_to_the_final_weights(name, data, tmp_path):
    script, options = RUNS[name]
    output_dir = tmp_path / name
    output_dir.mkdir()
    for kept in ("checkpoint-4", "tokenizer"):
        if (SAVED / name / kept).exists():
            shutil.copytree(SAVED / name / kept, output_dir / kept)
    arguments = [*COMMON, *options, "--output_dir", output_dir]
    outcome = finish(script, [data if argument == "DATA" else str(argument) for argument in arguments])
    assert outcome.output.count("which version 0.1 wrote without the options of its run") == 1
    assert [line["step"] for line in logged(output_dir)] == [5, 6]
    expected, weights = final_weights(script, SAVED / name), final_weights(script, output_dir)
    if script == RQVAE:  # that version averaged codebooks, too; now they are those of the model that was trained
        trained = load_file(output_dir / "checkpoint-6" / "model.safetensors")
        expected |= {tensor: value for tensor, value in trained.items() if tensor.startswith("quantizer.")}
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)


def test_rqvae_loads_and_encodes():
    vae = RQVAEModel.from_pretrained(SAVED / "rqvae" / "rqvae")
    codes = vae.get_codes(torch.zeros(1, 3, 8, 8))
    assert codes.shape == (1, 4, 4, 2)
    assert vae.decode_codes(codes).sample.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("loader", [RQPipeline, DiffusionPipeline])
@pytest.mark.parametrize(
    ("name", "condition"), [("t2i", {"prompt": "red circle"}), ("classes", {"class_labels": [2]})]
)
def test_pipeline_loads_and_generates(name, condition, loader, generator):
    pipe = loader.from_pretrained(SAVED / name / "pipeline")
    assert isinstance(pipe, RQPipeline)
    output = pipe(**condition, generator=generator)
    assert output.codes.shape == (1, 4, 4, 2)
    assert output.images[0].size == (8, 8)
