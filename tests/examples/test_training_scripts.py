import json
import math
import signal

import datasets
import numpy as np
import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from PIL import Image
from processes import run_group, run_script
from scripts import (
    CLASSES,
    COMMON,
    COUNT,
    DEPTH,
    GRID,
    OWN,
    RESOLUTION,
    RESULTS,
    RQVAE,
    SCRIPTS,
    STEPS,
    TEXT,
    assert_same_weights,
    final_weights,
    finish,
    launch,
    logged,
    start,
)
from shapes import CAPTIONS, SHAPES, create_shapes, draw_shape, write_parquet, write_shapes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from training_process import train_and_keep
from transformers import PreTrainedTokenizerFast

from rq_hf import RQPipeline, RQVAEModel
from rq_hf.images import to_pixels
from rq_hf.metrics.lpips import LPIPS
from rq_hf.text import train_tokenizer

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
streaming_or_not = pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["prepared", "streaming"])


@pytest.fixture(scope="module")
def shape_files(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), COUNT, RESOLUTION, num_shards=3)


@pytest.fixture(scope="module")
def command(tmp_path_factory, shape_files):
    """(script, output folder, further options) -> its command line."""
    rqvae_dir = tmp_path_factory.mktemp("runs") / "rqvae"

    def arguments(script, output_dir, *further):
        source = [] if "--data_files" in further else ["--data_files", shape_files]
        own = OWN[script]
        if script != RQVAE:
            if not rqvae_dir.exists():
                finish(RQVAE, arguments(RQVAE, rqvae_dir))
            own = [*own, "--rqvae", rqvae_dir / "rqvae"]
        return [*map(str, [*COMMON, *own, *source, "--output_dir", output_dir, *further])]

    return arguments


def sample(pipe):
    generator = torch.Generator().manual_seed(0)
    if pipe.is_text_conditional:
        return pipe("a small red circle", generator=generator)
    if pipe.is_class_conditional:
        return pipe(class_labels=2, guidance_scale=2.0, generator=generator)
    return pipe(generator=generator)


ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]


@pytest.fixture(scope="module")
def launched(tmp_path_factory, command):
    """Finished runs of all scripts, by `accelerate launch`; the one with classes uploads its pipeline."""
    folder = tmp_path_factory.mktemp("launched")
    runs = {script: launch(ACCELERATE, script, command(script, folder / script.stem)) for script in (RQVAE, TEXT)}
    with FakeHub() as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_fake"}
        upload = ["--push_to_hub", "--hub_model_id", "tester/classes"]
        arguments = command(CLASSES, folder / CLASSES.stem, *upload)
        runs[CLASSES] = launch(ACCELERATE, CLASSES, arguments, NO_PROXY="127.0.0.1", **environment)
        uploaded = hub.files("tester/classes")
    return runs, uploaded


@pytest.mark.slow
class TestLaunched:
    def test_rqvae_loads_and_gives_codes(self, launched):
        vae = RQVAEModel.from_pretrained(launched[0][RQVAE] / "rqvae")
        pixels = torch.stack([to_pixels(draw_shape(number, RESOLUTION), RESOLUTION) for number in range(2)])
        codes = vae.get_codes(pixels)
        assert codes.shape == (2, GRID, GRID, DEPTH)
        assert vae.decode_codes(codes).sample.shape == pixels.shape

    @pytest.mark.parametrize("script", [TEXT, CLASSES], ids=lambda path: path.stem)
    def test_pipeline_loads_and_samples(self, launched, script):
        pipe = RQPipeline.from_pretrained(launched[0][script] / "pipeline")
        output = sample(pipe)
        assert output.images[0].size == (RESOLUTION, RESOLUTION)
        assert output.codes.shape == (1, GRID, GRID, DEPTH)
        assert torch.equal(pipe.transformer.codebook, pipe.vae.quantizer.codebook)

    def test_tokenizer_was_trained_on_the_captions(self, launched):
        tokenizer = RQPipeline.from_pretrained(launched[0][TEXT] / "pipeline").tokenizer
        assert max(len(tokenizer(caption)["input_ids"]) for caption in CAPTIONS[:COUNT]) == 4

    def test_classes_are_those_of_the_data_set_and_none(self, launched):
        config = RQPipeline.from_pretrained(launched[0][CLASSES] / "pipeline").transformer.config
        assert (config.cond_vocab_size, config.null_cond_id) == (len(SHAPES) + 1, len(SHAPES))

    @each_script
    def test_logs_every_step(self, launched, script):
        lines = logged(launched[0][script])
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert [line["epoch"] for line in lines] == [0, 0, 0, 1, 1, 1]
        assert all(np.isfinite(value) for line in lines for value in line.values())
        for line in lines:
            assert line["codes_per_second"] == pytest.approx(GRID * GRID * DEPTH * line["images_per_second"])

    @each_script
    def test_tensorboard_has_curves_and_images(self, launched, script):
        events = EventAccumulator(str(launched[0][script] / "logs")).Reload()
        assert [event.step for event in events.Scalars("loss")] == list(range(1, STEPS + 1))
        images = "reconstructions" if script == RQVAE else "samples"
        assert [event.step for event in events.Images(images)] == [3, 6]

    @pytest.mark.parametrize(
        ("script", "name", "count"), [(RQVAE, "reconstructions", 32), (TEXT, "samples", 2), (CLASSES, "samples", 3)]
    )
    def test_image_grids_show_all_images(self, launched, script, name, count):
        folder = launched[0][script] / "images"
        assert sorted(path.name for path in folder.iterdir()) == [f"{name}-000000{step}.png" for step in (3, 6)]
        grid = Image.open(folder / f"{name}-0000006.png")
        assert grid.width * grid.height >= count * RESOLUTION**2

    @each_script
    def test_keeps_the_newest_checkpoints(self, launched, script):
        assert {path.name for path in launched[0][script].glob("*checkpoint*")} == {"checkpoint-4", "checkpoint-6"}

    @each_script
    def test_result_has_a_valid_card(self, launched, script):
        card = ModelCard.load(launched[0][script] / RESULTS[script] / "README.md")
        assert card.data.library_name == "rq_hf"
        assert "from_pretrained(" in card.text

    def test_uploads_what_it_saved(self, launched):
        runs, uploaded = launched
        folder = runs[CLASSES] / "pipeline"
        saved = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert {name: content for name, content in uploaded.items() if name != ".gitattributes"} == saved

    def test_two_processes_by_torchrun(self, command, tmp_path):
        torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        output_dir = launch(torchrun, RQVAE, command(RQVAE, tmp_path / "run", "--train_batch_size", 5))
        position = json.loads((output_dir / "checkpoint-6" / "position-1.json").read_text())
        assert position == {"format": 2, "step": 6, "num_processes": 2, "epoch": 2, "batches_in_epoch": 2}
        assert RQVAEModel.from_pretrained(output_dir / "rqvae").config.depth == DEPTH


@each_script
@pytest.mark.parametrize(
    "reading",
    [[], ["--streaming"], ["--dataloader_num_workers", 2]],
    ids=["prepared", "streaming", "workers"],
)
def test_resumed_run_ends_with_the_weights_of_an_unbroken_one(script, reading, command, tmp_path):
    finish(script, command(script, tmp_path / "unbroken", *reading))
    arguments = command(script, tmp_path / "killed", *reading, "--resume_from_checkpoint", "latest")
    assert start(script, arguments, die_at="checkpoint-4/optimizer.bin").code == -signal.SIGKILL
    assert not (tmp_path / "killed" / RESULTS[script]).exists()
    finish(script, arguments)
    assert_same_weights(script, tmp_path / "killed", tmp_path / "unbroken")
    assert [line["step"] for line in logged(tmp_path / "killed")] == [1, 2, 3, 4, 3, 4, 5, 6]


@each_script
@streaming_or_not
def test_two_processes_end_with_the_same_weights(script, streaming, command, tmp_path):
    further = ["--train_batch_size", 4, "--gradient_accumulation_steps", 2]
    arguments = command(script, tmp_path / "run", *streaming, *further)
    for outcome in run_group(2, train_and_keep, tmp_path, script, arguments):
        assert outcome.code == 0, outcome.output
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


@each_script
def test_bfloat16_trains_float32_weights(script, command, tmp_path):
    finish(script, command(script, tmp_path / "run", "--mixed_precision", "bf16", "--max_train_steps", 2))
    assert all(np.isfinite(line["loss"]) for line in logged(tmp_path / "run"))
    weights = final_weights(script, tmp_path / "run")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}


@each_script
def test_gradient_checkpointing_changes_nothing(script, command, tmp_path):
    few = ["--max_train_steps", 2]
    finish(script, command(script, tmp_path / "plain", *few))
    finish(script, command(script, tmp_path / "checkpointing", *few, "--gradient_checkpointing"))
    actual, expected = (final_weights(script, tmp_path / name) for name in ("checkpointing", "plain"))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


# The discriminator learns from step 2 on, and reaches the RQ-VAE at step 4.
DISCRIMINATOR = ["--discriminator_weight", 0.5, "--discriminator_width", 4, "--discriminator_layers", 1]
DISCRIMINATOR += ["--discriminator_start", 1, "--discriminator_warmup_steps", 2]


def test_resumed_run_with_a_discriminator_ends_with_the_weights_of_an_unbroken_one(command, tmp_path):
    finish(RQVAE, command(RQVAE, tmp_path / "unbroken", *DISCRIMINATOR))
    arguments = command(RQVAE, tmp_path / "killed", *DISCRIMINATOR, "--resume_from_checkpoint", "latest")
    assert start(RQVAE, arguments, die_at="checkpoint-4/optimizer.bin").code == -signal.SIGKILL
    finish(RQVAE, arguments)
    assert_same_weights(RQVAE, tmp_path / "killed", tmp_path / "unbroken")
    steps = {line["step"]: line for line in logged(tmp_path / "unbroken")}
    assert [step for step in steps if "loss_discriminator" in steps[step]] == [2, 3, 4, 5, 6]
    assert [step for step in steps if "loss_generator" in steps[step]] == [4, 5, 6]


def test_resumed_run_uses_the_new_learning_rate_for_both_optimizers(command, tmp_path):
    arguments = command(RQVAE, tmp_path / "run", *DISCRIMINATOR, "--max_train_steps", 4)
    finish(RQVAE, arguments)
    finish(
        RQVAE, [*arguments, "--max_train_steps", "6", "--learning_rate", "1e-6", "--resume_from_checkpoint", "latest"]
    )
    for name in ("optimizer.bin", "optimizer_1.bin"):
        groups = torch.load(tmp_path / "run" / "checkpoint-6" / name)["param_groups"]
        assert {group["lr"] for group in groups} == {1e-6}
    assert [line["learning_rate"] for line in logged(tmp_path / "run")][-2:] == [1e-6, 1e-6]


def test_resumed_run_refuses_the_options_of_another_one(command, tmp_path):
    finish(TEXT, command(TEXT, tmp_path / "run", "--max_train_steps", 1))
    others = ["--labels", "hard", "--text_length", 7, "--hidden_size", 32, "--resume_from_checkpoint", "latest"]
    outcome = start(TEXT, command(TEXT, tmp_path / "run", "--max_train_steps", 2, *others))
    assert outcome.code == 1
    assert (
        "--hidden_size was 16, got 32; --labels was 'soft', got 'hard'; --text_length was 6, got 7." in outcome.output
    )


def test_two_processes_with_a_discriminator_end_with_the_same_weights(command, tmp_path):
    arguments = command(RQVAE, tmp_path / "run", *DISCRIMINATOR, "--train_batch_size", 4)
    for outcome in run_group(2, train_and_keep, tmp_path, RQVAE, arguments):
        assert outcome.code == 0, outcome.output
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_validation_logs_quality_and_codebook_usage(command, shape_files, tmp_path):
    finish(RQVAE, command(RQVAE, tmp_path / "run", "--validation_files", shape_files, "--validation_images", 12))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    validated = {line["step"]: line for line in log if "validation/psnr" in line}
    assert list(validated) == [3, 6]
    assert 0 < validated[6]["validation/psnr"] < 60
    for d in range(1, DEPTH + 1):
        assert 0 < validated[6][f"validation/usage_depth_{d}"] <= 1
        assert 1 <= validated[6][f"validation/perplexity_depth_{d}"] <= 16


def test_stage_2_validates_and_keeps_the_temperature_that_it_chose(command, shape_files, tmp_path):
    outcome = finish(TEXT, command(TEXT, tmp_path / "run", "--validation_files", shape_files))
    log = logged(tmp_path / "run")
    held_out = [line for line in log if "validation/loss" in line]
    assert [line["step"] for line in held_out] == [3, 6]
    for line in held_out:
        depths = [line[f"validation/loss_depth_{d}"] for d in range(1, DEPTH + 1)]
        assert 0 < min(depths) and max(depths) < 2 * math.log(16)
    config = json.loads((tmp_path / "run" / "pipeline" / "transformer" / "config.json").read_text())
    assert f"soft labels of temperature {config['soft_label_temperature']} have" in outcome.output
    effective = [line["effective_codewords_depth_2"] for line in log if "effective_codewords_depth_2" in line]
    assert len(effective) == STEPS and 1 < min(effective) and max(effective) < 8


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--codebook_update", "gradient"], {"codebook_update": "gradient"}),
        (["--codebook_init", "k-means", "--quantizer_dropout", 0.5], {"quantizer_dropout": 0.5}),
        (["--codebook_per_depth"], {"shared_codebook": False}),
        (["--depth", 1, "--reconstruction_loss", "l1"], {"depth": 1}),
        (["--attention_levels", 1, 2], {"down_block_types": ["DownEncoderBlock2D"] + ["AttnDownEncoderBlock2D"] * 2}),
    ],
)
def test_rqvae_options_reach_the_model(options, expected, command, tmp_path):
    finish(RQVAE, command(RQVAE, tmp_path / "run", "--max_train_steps", 2, *options))
    vae = RQVAEModel.from_pretrained(tmp_path / "run" / "rqvae")
    assert {name: vae.config[name] for name in expected} == expected
    assert vae.get_codes(torch.zeros(1, 3, RESOLUTION, RESOLUTION)).shape == (1, GRID, GRID, vae.config.depth)


@pytest.mark.parametrize("script", [TEXT, CLASSES], ids=lambda path: path.stem)
@pytest.mark.parametrize("labels", [["--labels", "hard"], ["--no_stochastic_codes"]], ids=["hard", "nearest codes"])
def test_other_labels_train_too(script, labels, command, tmp_path):
    finish(script, command(script, tmp_path / "run", "--max_train_steps", 2, *labels))
    sample(RQPipeline.from_pretrained(tmp_path / "run" / "pipeline"))


def test_grey_images_named_by_a_table_train_classes_with_names(command, tmp_path):
    (tmp_path / "images").mkdir()
    lines = ["image,kind"]
    for number in range(COUNT):
        draw_shape(number, RESOLUTION).save(tmp_path / "images" / f"{number}.png")
        lines.append(f"images/{number}.png,{SHAPES[number % 3]}")
    (tmp_path / "shapes.csv").write_text("\n".join(lines))
    few = ["--data_files", tmp_path / "shapes.csv", "--max_train_steps", 3]

    finish(RQVAE, command(RQVAE, tmp_path / "rqvae", *few, "--in_channels", 1, *DISCRIMINATOR))
    rqvae = tmp_path / "rqvae" / "rqvae"
    assert RQVAEModel.from_pretrained(rqvae).config.in_channels == 1
    assert logged(tmp_path / "rqvae")[-1]["loss_discriminator"] > 0
    finish(CLASSES, command(CLASSES, tmp_path / "run", *few, "--label_column", "kind", "--rqvae", rqvae))
    pipe = RQPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    config = pipe.transformer.config
    assert (config.cond_vocab_size, config.null_cond_id) == (4, 3)
    assert config.id2label == {0: "circle", 1: "square", 2: "triangle"}
    assert config.label2id == {"circle": 0, "square": 1, "triangle": 2}
    assert sample(pipe).images[0].mode == "L"


def test_classes_that_the_data_set_declares_keep_their_names(command, tmp_path):
    finish(CLASSES, command(CLASSES, tmp_path / "run", "--max_train_steps", 1, "--image_logging_steps", 0))
    config = RQPipeline.from_pretrained(tmp_path / "run" / "pipeline").transformer.config
    assert config.id2label == dict(enumerate(SHAPES))


def test_without_a_label_column_the_model_is_unconditional(command, tmp_path):
    arguments = command(CLASSES, tmp_path / "run")
    at = arguments.index("--label_column")
    finish(CLASSES, arguments[:at] + arguments[at + 2 :])
    pipe = RQPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert not pipe.is_class_conditional
    assert sample(pipe).images[0].size == (RESOLUTION, RESOLUTION)
    assert sorted(path.name for path in (tmp_path / "run" / "images").iterdir())[-1] == "samples-0000006.png"


def test_defaults_of_stage_1_are_the_papers(command, tmp_path):
    lpips = LPIPS()
    torch.save({f"features.{n}": w for n, w in lpips.features.state_dict().items()}, tmp_path / "vgg16.pth")
    torch.save({f"lin{i}.model.1.weight": h.weight.detach() for i, h in enumerate(lpips.heads)}, tmp_path / "vgg.pth")
    arguments = command(RQVAE, tmp_path / "run", "--max_train_steps", 3)
    at = arguments.index("--perceptual_weight")
    files = ["--lpips_vgg", str(tmp_path / "vgg16.pth"), "--lpips_heads", str(tmp_path / "vgg.pth")]
    finish(RQVAE, arguments[:at] + arguments[at + 4 :] + files)
    for line in logged(tmp_path / "run"):
        reconstruction = line["loss_reconstruction"] + line["loss_perceptual"]
        adversarial = 0.75 * line["adaptive_weight"] * line["loss_generator"]
        assert line["loss"] == pytest.approx(reconstruction + 0.25 * line["loss_commitment"] + adversarial, rel=1e-4)
    assert line["learning_rate"] == 4e-5
    optimizer = torch.load(tmp_path / "run" / "checkpoint-3" / "optimizer.bin")["param_groups"]
    assert {(group["betas"], group["weight_decay"]) for group in optimizer} == {((0.5, 0.9), 0.0)}


def test_takes_a_tokenizer_from_a_folder(command, tmp_path):
    train_tokenizer(iter(["a green square"] * 3), 270, max_length=9).save_pretrained(tmp_path / "tokenizer")
    options = ["--tokenizer", tmp_path / "tokenizer", "--text_length", 12, "--max_train_steps", 1]
    finish(TEXT, command(TEXT, tmp_path / "run", *options))
    pipe = RQPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert len(pipe.tokenizer("a green square")["input_ids"]) == 3
    assert pipe.transformer.config.cond_length == 12


@pytest.mark.parametrize("resume", [[], ["--resume_from_checkpoint", "latest"]], ids=["new", "resumed if possible"])
def test_new_run_trains_a_new_tokenizer(resume, command, tmp_path):
    train_tokenizer(iter(["of other captions"]), 258, max_length=6).save_pretrained(tmp_path / "run" / "tokenizer")
    finish(TEXT, command(TEXT, tmp_path / "run", "--max_train_steps", 1, "--image_logging_steps", 0, *resume))
    tokenizer = RQPipeline.from_pretrained(tmp_path / "run" / "pipeline").tokenizer
    assert len(tokenizer("a small red circle")["input_ids"]) == 4


def test_bpe_dropout_lengthens_captions_in_training_only(command, tmp_path):
    for dropout in (0, 0.9):
        options = ["--bpe_dropout", dropout, "--max_train_steps", 1, "--image_logging_steps", 0]
        finish(TEXT, command(TEXT, tmp_path / str(dropout), *options))
    (whole,), (split,) = (logged(tmp_path / name) for name in ("0", "0.9"))
    assert "truncated_captions" not in whole and split["truncated_captions"] > 0
    tokenizer = RQPipeline.from_pretrained(tmp_path / "0.9" / "pipeline").tokenizer
    assert [len(tokenizer("a small red circle")["input_ids"]) for _ in range(5)] == [4] * 5


def test_bpe_dropout_needs_bpe(command, tmp_path):
    words = Tokenizer(WordLevel({"[PAD]": 0, "circle": 1}, unk_token="[PAD]"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(tmp_path / "tokenizer")
    options = ["--tokenizer", tmp_path / "tokenizer", "--bpe_dropout", 0.1]
    outcome = start(TEXT, command(TEXT, tmp_path / "run", *options))
    assert "bpe_dropout needs a BPE tokenizer of the tokenizers library, got WordLevel" in outcome.output


def test_refused_run_leaves_the_tokenizer_of_the_old_one(command, tmp_path):
    finish(TEXT, command(TEXT, tmp_path / "run", "--max_train_steps", 1))
    tokenizer = (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_text()
    outcome = start(TEXT, command(TEXT, tmp_path / "run", "--tokenizer_vocab_size", 258, "--text_length", 20))
    assert "already holds checkpoint-1" in outcome.output
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_text() == tokenizer


@streaming_or_not
@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([*CAPTIONS[:7], None, *CAPTIONS[8:COUNT]], "the caption of example 7 must be a string, got None"),
        ([5] * COUNT, "the caption of example 0 must be a string, got 5"),
    ],
    ids=["one missing", "numbers"],
)
def test_tokenizer_is_trained_on_strings_only(streaming, captions, message, command, tmp_path):
    rows = create_shapes(COUNT, RESOLUTION).remove_columns("text").add_column("text", captions)
    files = write_parquet(rows, tmp_path / "captions")
    outcome = start(TEXT, command(TEXT, tmp_path / "run", "--data_files", files, *streaming))
    assert outcome.code == 1
    assert message in outcome.output
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_numbers_that_are_not_declared_as_classes_need_their_number(command, tmp_path):
    rows = create_shapes(COUNT, RESOLUTION).remove_columns("label").add_column("kind", [n % 3 for n in range(COUNT)])
    options = ["--data_files", write_parquet(rows, tmp_path / "numbers"), "--label_column", "kind"]
    options += ["--max_train_steps", 1, "--image_logging_steps", 0]
    outcome = start(CLASSES, command(CLASSES, tmp_path / "run", *options))
    assert "does not declare the classes of 'kind': pass --num_classes" in outcome.output
    finish(CLASSES, command(CLASSES, tmp_path / "run", *options, "--num_classes", 3))


@each_script
def test_help_shows_the_manual(script):
    outcome = run_script(script, "--help")
    manual = script.read_text().split('"""')[1].replace("\\\\", "\\")
    assert outcome.code == 0
    assert manual in outcome.output
    assert "--output_dir" in outcome.output


@pytest.fixture(scope="module")
def corrupt_files(tmp_path_factory):
    """Example 13 has an image that cannot be decoded."""
    rows = create_shapes(COUNT, RESOLUTION).cast_column("image", datasets.Image(decode=False)).to_list()
    rows[13]["image"]["bytes"] = b"no image"
    features = create_shapes(1).features
    return write_parquet(datasets.Dataset.from_list(rows, features=features), tmp_path_factory.mktemp("corrupt"))


@each_script
@streaming_or_not
class TestCorruptImage:
    def test_stops_the_run_and_is_named(self, script, streaming, command, corrupt_files, tmp_path):
        outcome = start(script, command(script, tmp_path / "run", "--data_files", corrupt_files, *streaming))
        assert outcome.code == 1
        assert "the image of example 13 cannot be decoded" in outcome.output
        assert "skip_corrupt_images leaves such examples out" in outcome.output

    def test_can_be_skipped_and_is_counted(self, script, streaming, command, corrupt_files, tmp_path):
        further = ["--data_files", corrupt_files, *streaming, "--skip_corrupt_images"]
        finish(script, command(script, tmp_path / "run", *further))
        assert logged(tmp_path / "run")[-1]["skipped_images"] == 2


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (RQVAE, ["--image_column", "photo"], r"no column 'photo'; its columns are ['image', 'text', 'label']"),
        (TEXT, ["--text_column", "caption"], r"no column 'caption'; its columns are ['image', 'text', 'label']"),
        (CLASSES, ["--label_column", "kind"], r"no column 'kind'; its columns are ['image', 'text', 'label']"),
        (RQVAE, ["--resolution", "18"], "--resolution must be divisible by 4, got 18"),
        (RQVAE, ["--dataset_name", "user/images"], "expected either dataset_name or data_files"),
        (RQVAE, ["--push_to_hub"], "--push_to_hub needs --hub_model_id"),
        (RQVAE, ["--push_to_hub", "--hub_model_id", "a/b"], "--push_to_hub cannot write to a/b (there is no token"),
        (RQVAE, ["--perceptual_weight", "1"], "--perceptual_weight 0 disables it"),
        (RQVAE, ["--quantizer_dropout", "2"], "quantizer_dropout must lie in [0, 1], got 2.0"),
        (RQVAE, ["--validation_split", "a", "--validation_files", "b"], "at most one of --validation_split"),
        (RQVAE, ["--attention_levels", "1", "3"], "--attention_levels must lie in [0, 3), the levels of"),
        (RQVAE, ["--codebook_size", "0"], "--codebook_size must be at least 1, got 0"),
        (RQVAE, ["--commitment_weight", "nan"], "--commitment_weight must be at least 0, got nan"),
        (RQVAE, ["--perceptual_weight", "-1"], "--perceptual_weight must be at least 0, got -1.0"),
        (RQVAE, ["--discriminator_weight", "-1"], "--discriminator_weight must be at least 0, got -1.0"),
        (RQVAE, ["--discriminator_start", "-1"], "--discriminator_start must be at least 0, got -1"),
        (RQVAE, ["--max_adaptive_weight", "-1"], "--max_adaptive_weight must be greater than 0, got -1.0"),
        (RQVAE, ["--validation_images", "0"], "--validation_images must be at least 1, got 0"),
        (RQVAE, ["--validation_split", "test"], "got 'test' with --data_files: pass --validation_files"),
        (TEXT, ["--text_length", "1"], "--text_length must be at least 2, got 1"),
        (TEXT, ["--tokenizer_vocab_size", "0"], "--tokenizer_vocab_size must be at least 257"),
        (CLASSES, ["--num_classes", "0"], "--num_classes must be at least 1, got 0"),
        (CLASSES, ["--num_samples", "0"], "--num_samples must be at least 1, got 0"),
        (TEXT, ["--cond_dropout", "1"], "--cond_dropout must lie in [0, 1), got 1.0"),
        (TEXT, ["--soft_label_temperature", "0"], "--soft_label_temperature must be greater than 0, got 0.0"),
        (TEXT, ["--labels", "weak"], "invalid choice: 'weak'"),
        (TEXT, ["--validation_prompts", "a" * 9], "a prompt may have at most 6 tokens"),
        (RQVAE, ["--in_channels", "4"], "invalid choice: 4 (choose from 1, 3)"),
        (CLASSES, ["--num_classes", "2"], "must lie in [0, 2), got 2"),
        (CLASSES, ["--labl_column", "label"], "labl_column"),
    ],
)
def test_wrong_options_stop_the_run_before_it_trains(script, options, message, command, tmp_path):
    outcome = start(script, command(script, tmp_path / "run", *options))
    assert outcome.code
    assert message in outcome.output
    assert not logged(tmp_path / "run")
