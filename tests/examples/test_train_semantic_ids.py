import json
import re
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from processes import run_group
from scripts import EXAMPLES, finish, launch, logged, run_example, start
from training_process import train_and_keep

from rq_hf import SemanticIds

SCRIPT = EXAMPLES / "train_semantic_ids.py"
COUNT, CHANNELS, SIZES = 20, 6, (5, 8)
STEPS = 6  # two epochs of three batches, the last one smaller
TINY = [
    *("--cpu", "--vector_column", "embedding", "--max_train_steps", STEPS, "--train_batch_size", 8),
    *("--lr_warmup_steps", 2, "--logging_steps", 1, "--checkpointing_steps", 2, "--report_to", "none"),
    *("--codebook_sizes", *SIZES),
]
ENCODER = ["--hidden_dims", 12, "--latent_dim", 4]
NAMES = [f"item {n}" for n in range(COUNT)]


def numbers(count=COUNT):
    """Vectors of norm 1, the last of which is there twice."""
    vectors = np.random.default_rng(0).normal(size=(count, CHANNELS)).astype(np.float32)
    vectors[-1] = vectors[-2]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_table(path, vectors, names):
    pq.write_table(pa.table({"id": names, "embedding": list(vectors)}), path)
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("vectors") / "vectors.parquet", numbers(), NAMES)


@pytest.fixture(scope="module")
def command(table):
    """(output folder, further options) -> its command line."""

    def arguments(output_dir, *further):
        own = [] if "--no_encoder" in further else ENCODER
        source = [] if "--data_files" in further else ["--data_files", table, "--item_column", "id"]
        return [*map(str, [*TINY, *own, *source, "--output_dir", output_dir, *further])]

    return arguments


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, command, table):
    """Folder and output of a finished run, with validation."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    validation = ["--validation_files", table, "--image_logging_steps", 3]
    return folder, finish(SCRIPT, command(folder, *validation)).output


def load(output_dir):
    return SemanticIds.from_pretrained(output_dir / "semantic_ids")


def assert_same(output_dir, expected_dir):
    ids, expected = load(output_dir), load(expected_dir)
    assert ids.items == expected.items and torch.equal(ids.codes, expected.codes)
    ours, theirs = ids.model.state_dict(), expected.model.state_dict()
    assert not [name for name in theirs if not torch.equal(ours[name], theirs[name])]


def test_gives_all_items_ids_of_the_trained_model(unbroken):
    ids = load(unbroken[0])
    config = ids.model.config
    assert (config.input_dim, config.hidden_dims, config.latent_dim, config.codebook_size) == (6, [12], 4, [5, 8])
    assert ids.items == NAMES and ids.sizes[:2] == SIZES
    vectors = torch.from_numpy(numbers())
    assert torch.equal(ids.codes[:, :2], ids.model.encode(vectors))
    assert len({tuple(codes) for codes in ids.codes.tolist()}) == COUNT  # by a suffix
    torch.testing.assert_close(ids.model.mean, vectors.mean(dim=0))


def test_reports_what_the_codes_are_like(unbroken):
    folder, output = unbroken
    ids, figures = load(folder), json.loads((folder / "semantic_ids" / "report.json").read_text())
    coded = SemanticIds(ids.model, ids.items, ids.codes[:, :2])
    expected = coded.report(torch.from_numpy(numbers()))
    assert figures["report"] == expected and str(expected) in output
    before, after = figures["resolved"]["collision_rate"]
    assert before == expected["collision_rate"][-1] > 0 and after == 0
    assert f"suffix: items that share their ID {before:.2%} → 0.00%; one more code, a suffix in [0, " in output


def test_the_card_has_the_report_and_code_that_runs(unbroken):
    folder = unbroken[0]
    card = ModelCard.load(folder / "semantic_ids" / "README.md")
    assert card.data.library_name == "rq_hf" and "semantic-ids" in card.data.tags
    assert "20 vectors; vector column `embedding`; item column `id`" in card.text
    assert "one more code, a suffix in" in card.text and "after step 6" in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    found = {}
    exec(code, found)
    assert found["items"] == NAMES[:1] and found["vectors"].shape == (COUNT, CHANNELS)


def test_logs_vectors_and_validation(unbroken):
    lines = [line for line in logged(unbroken[0]) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1, 1, 1]
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss_reconstruction"] + 0.1 * line["loss_commitment"], rel=1e-5)
        assert line["vectors_per_second"] > 0 and "images_per_second" not in line
    validated = [line for line in logged(unbroken[0]) if "validation/relative_error_depth_2" in line]
    assert [line["step"] for line in validated] == [3, 6]
    report = json.loads((unbroken[0] / "semantic_ids" / "report.json").read_text())["report"]
    assert validated[-1]["validation/usage_depth_1"] == report["usage"][0]


def test_killed_and_resumed_run_ends_with_the_ids_of_an_unbroken_one(command, unbroken, tmp_path):
    arguments = command(tmp_path / "killed", "--resume_from_checkpoint", "latest")
    assert start(SCRIPT, arguments, die_at="checkpoint-4/optimizer.bin").code == -signal.SIGKILL
    assert not (tmp_path / "killed" / "semantic_ids").exists()
    finish(SCRIPT, arguments)
    assert_same(tmp_path / "killed", unbroken[0])


def test_finished_run_can_encode_otherwise(command, unbroken, tmp_path):
    resume = ["--resume_from_checkpoint", unbroken[0] / "checkpoint-6"]
    finish(SCRIPT, command(tmp_path / "run", *resume, "--beam_size", 3, "--resolve", "next_nearest", "--balanced"))
    ids, trained, vectors = load(tmp_path / "run"), load(unbroken[0]).model, torch.from_numpy(numbers())
    encoded = SemanticIds.encode(trained, NAMES, vectors, beam_size=3, balanced=True)
    assert ids.sizes == SIZES and torch.equal(ids.codes, encoded.resolve("next_nearest", vectors)[0].codes)


def test_two_processes_end_with_the_same_model_and_its_ids(command, tmp_path):
    arguments = command(tmp_path / "run", "--train_batch_size", 4)
    for outcome in run_group(2, train_and_keep, tmp_path, SCRIPT, arguments):
        assert outcome.code == 0, outcome.output
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    ids = load(tmp_path / "run")
    assert torch.equal(ids.codes[:, :2], ids.model.encode(torch.from_numpy(numbers())))
    assert torch.equal(ids.model.quantizer.codebook, ours["quantizer.codebook"])


def test_bfloat16_trains_float32_weights(command, tmp_path):
    finish(SCRIPT, command(tmp_path / "run", "--mixed_precision", "bf16", "--ema_decay", 0.9))
    weights = load(tmp_path / "run").model.state_dict().values()
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights)


@pytest.mark.parametrize("world_size", [1, 2])
def test_without_an_encoder_it_is_residual_k_means(command, table, tmp_path, world_size):
    arguments = command(tmp_path / "run", "--no_encoder", "--data_files", table, "--resolve", "keep")
    for outcome in run_group(world_size, run_example, SCRIPT, arguments, tmp_path):
        assert outcome.code == 0, outcome.output
    ids, vectors = load(tmp_path / "run"), torch.from_numpy(numbers())
    assert ids.items == list(range(COUNT)) and ids.sizes == SIZES
    assert ids.model.config.hidden_dims == [] and ids.model.config.latent_dim == CHANNELS
    assert torch.equal(ids.codes, ids.model.encode(vectors))
    codes = ids.codes[:, 0]
    for code in codes.unique():
        centre = ids.model.decode(code.view(1, 1))[0]
        torch.testing.assert_close(centre, vectors[codes == code].mean(dim=0), atol=1e-5, rtol=1e-5)
    assert not logged(tmp_path / "run") and not list((tmp_path / "run").glob("checkpoint*"))


@pytest.mark.slow
def test_uploads_model_and_table(command, tmp_path):
    with FakeHub() as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_fake"}
        upload = ["--push_to_hub", "--hub_model_id", "tester/ids", "--max_train_steps", 2]
        accelerate = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
        folder = launch(accelerate, SCRIPT, command(tmp_path / "run", *upload), NO_PROXY="127.0.0.1", **environment)
        uploaded = hub.files("tester/ids")
    saved = {path.name: path.read_bytes() for path in (folder / "semantic_ids").iterdir()}
    assert {name: content for name, content in uploaded.items() if name != ".gitattributes"} == saved
    assert {"semantic_ids.parquet", "diffusion_pytorch_model.safetensors", "README.md"} < saved.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vector_column", "vector"], "the data set has no column 'vector'; its columns are ['id', 'embedding']"),
        (["--vector_column", "id"], "'id' must hold lists of floating-point numbers, got string"),
        (["--item_column", "name"], "the data set has no column 'name'"),
        (["--item_column", "embedding"], "'embedding' must hold strings or integers"),
        (["--codebook_sizes", "21"], "--codebook_sizes must be at most the number of vectors, 20, got 21"),
        (["--codebook_sizes", "4", "4", "--depth", "3"], "--codebook_sizes must be one number or --depth 3 of them"),
        (["--codebook_sizes", "0"], "--codebook_sizes must be at least 1, got 0"),
        (["--codebook_sizes", "4", "--resolve", "next_nearest", "--depth", "2"], "as many IDs as items, 20, got 4×4"),
        (["--depth", "0"], "--depth must be at least 1, got 0"),
        (["--hidden_dims", "8", "-1"], "--hidden_dims must be at least 1, got -1"),
        (["--latent_dim", "0"], "--latent_dim must be at least 1, got 0"),
        (["--beam_size", "0"], "--beam_size must be at least 1, got 0"),
        (["--codebook_ema_decay", "1"], "--codebook_ema_decay must lie in [0, 1), got 1.0"),
        (["--commitment_weight", "-1"], "--commitment_weight must be at least 0, got -1.0"),
        (
            ["--encoder", "false"],
            "--hidden_dims and --latent_dim are of the encoder: leave them out with --no_encoder",
        ),
        (["--resolve", "drop"], "invalid choice: 'drop'"),
        (["--gradient_checkpointing"], "gradient_checkpointing"),
        (["--data_files", "none.parquet"], "data_files 'none.parquet' matches no file"),
    ],
)
def test_wrong_options_stop_the_run_before_it_trains(options, message, command, tmp_path):
    outcome = start(SCRIPT, command(tmp_path / "run", *options))
    assert outcome.code
    assert message in outcome.output
    assert not logged(tmp_path / "run")


def test_held_out_vectors_have_the_same_channels(command, tmp_path):
    file = write_table(tmp_path / "other.parquet", numbers()[:, :4], NAMES)
    outcome = start(SCRIPT, command(tmp_path / "run", "--validation_files", file))
    assert "--validation_files must have vectors of 6 numbers like the data, got 4" in outcome.output
    assert not logged(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vectors, names: vectors[2:3].fill(np.nan), "row 2 has NaN or infinite numbers in the column 'embed"),
        (lambda vectors, names: names.__setitem__(4, names[1]), "must name every row differently, got 'item 1' 2 tim"),
        (lambda vectors, names: vectors.fill(0.5), "all 20 vectors are equal: there is nothing to quantize"),
    ],
    ids=["NaN", "items twice", "equal"],
)
def test_wrong_tables_stop_the_run_before_it_trains(change, message, command, tmp_path):
    vectors, names = numbers(), list(NAMES)
    change(vectors, names)
    file = write_table(tmp_path / "wrong.parquet", vectors, names)
    outcome = start(SCRIPT, command(tmp_path / "run", "--data_files", file, "--item_column", "id"))
    assert outcome.code == 1
    assert message in outcome.output
    assert not logged(tmp_path / "run")
