"""The training scripts at tiny size, and how tests run them."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import torch
from processes import die_while_saving, execute, run
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"
RQVAE, TEXT, CLASSES = SCRIPTS = (
    EXAMPLES / "train_rqvae.py",
    EXAMPLES / "train_t2i.py",
    EXAMPLES / "train_class_conditional.py",
)

# Twenty examples are three batches an epoch, the last one smaller; six steps are two epochs.
COUNT, RESOLUTION, GRID, DEPTH, STEPS = 20, 16, 4, 2, 6
COMMON = [
    *("--cpu", "--max_train_steps", STEPS, "--train_batch_size", 8, "--lr_warmup_steps", 2, "--random_flip"),
    *("--logging_steps", 1, "--image_logging_steps", 3, "--checkpointing_steps", 2, "--shuffle_buffer_size", 6),
]
TINY_RQVAE = [
    *("--resolution", RESOLUTION, "--block_out_channels", 8, 8, 8, "--norm_num_groups", 4, "--layers_per_block", 1),
    *("--latent_channels", 8, "--codebook_dim", 8, "--codebook_size", 16, "--depth", DEPTH, "--dropout", 0.1),
    *("--perceptual_weight", 0, "--discriminator_weight", 0),
]
TINY_TRANSFORMER = ["--hidden_size", 16, "--spatial_layers", 1, "--depth_layers", 1, "--num_attention_heads", 2]
OWN = {
    RQVAE: TINY_RQVAE,
    TEXT: [*TINY_TRANSFORMER, "--text_length", 6, "--validation_prompts", "a red circle", "a blue square"],
    CLASSES: [*TINY_TRANSFORMER, "--label_column", "label", "--num_samples", 3],
}
MAR = EXAMPLES / "train_mar.py"
TINY_MAR = [
    *("--hidden_size", 16, "--encoder_layers", 1, "--decoder_layers", 2, "--num_attention_heads", 2),
    *("--head_hidden_size", 12, "--head_layers", 1, "--timestep_spacing", "leading"),
]
RESULTS = {RQVAE: "rqvae", TEXT: "pipeline", CLASSES: "pipeline"}


def run_example(script, arguments, folder, *before):
    """Runs a script in this process, with the cache of data sets in `folder`, after calling each of `before`."""
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # 5 seconds after every epoch of a parquet stream
    execute(script, arguments, *before)


def start(script, arguments, die_at=None):
    output_dir = Path(arguments[arguments.index("--output_dir") + 1])
    die = [functools.partial(die_while_saving, die_at)] if die_at else []
    return run(run_example, script, arguments, output_dir.parent, *die)


def finish(script, arguments):
    outcome = start(script, arguments)
    assert outcome.code == 0, outcome.output
    return outcome


def launch(launcher, script, arguments, **environment):
    """Runs a script as a user would."""
    output_dir = Path(arguments[arguments.index("--output_dir") + 1])
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_HOME": str(output_dir.parent / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-m", *launcher, script, *arguments], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output_dir


def logged(output_dir):
    log = output_dir / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [line for line in lines if "step" in line]


def final_weights(script, output_dir):
    if script == RQVAE:
        return load_file(output_dir / "rqvae" / "diffusion_pytorch_model.safetensors")
    return load_file(output_dir / "pipeline" / "transformer" / "model.safetensors")


def assert_same_weights(script, output_dir, expected_dir):
    actual, expected = final_weights(script, output_dir), final_weights(script, expected_dir)
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]
