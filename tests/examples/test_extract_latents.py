import functools
import json
import signal
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import VQModel
from processes import die_while_saving, run, run_group, run_script
from safetensors.torch import load_file
from scripts import CLASSES, EXAMPLES, TEXT, run_example
from shapes import CAPTIONS, create_shapes, draw_shape, write_parquet, write_shapes
from tiny import C, tiny_kl, tiny_vae

from rq_hf import RQPipeline, RQVAEModel
from rq_hf.data import (
    LatentCollator,
    describe_latents,
    find_class_names,
    load_latents,
    stored_dtype,
    stored_shape,
)
from rq_hf.images import to_pixels
from rq_hf.models.continuous_latents import encode_moments

EXTRACT = EXAMPLES / "extract_latents.py"
COUNT, RESOLUTION, GRID = 20, 8, 4
TRAIN = [
    *("--cpu", "--max_train_steps", 6, "--train_batch_size", 8, "--lr_warmup_steps", 2, "--logging_steps", 1),
    *("--image_logging_steps", 6, "--checkpointing_steps", 2, "--shuffle_buffer_size", 6, "--report_to", "none"),
    *("--hidden_size", 16, "--spatial_layers", 1, "--depth_layers", 1, "--num_attention_heads", 2),
]
OWN = {
    TEXT: ["--text_length", 6, "--validation_prompts", "a red circle"],
    CLASSES: ["--label_column", "label", "--num_samples", 2],
}


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 seconds after every stream


@pytest.fixture(scope="module")
def rqvae(tmp_path_factory):
    """Folder of an RQ-VAE."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("rqvae")
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shape_files(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), COUNT, 16, num_shards=3)


@pytest.fixture(scope="module")
def extract(rqvae, shape_files):
    """(output folder, further options) -> the outcomes of the processes."""

    def run(output_dir, *further, world_size=1):
        source = [] if "--data_files" in further else ["--data_files", shape_files]
        columns = ["--text_column", "text", "--label_column", "label"]
        arguments = ["--cpu", "--rqvae", rqvae, "--output_dir", output_dir, "--batch_size", 7, *source, *columns]
        return run_group(world_size, run_example, EXTRACT, [*arguments, *further], output_dir.parent)

    return run


@pytest.fixture(scope="module")
def latents(tmp_path_factory, extract):
    """Folder of the latents of all shapes, in files of 8 rows."""
    folder = tmp_path_factory.mktemp("extracted") / "latents"
    (outcome,) = extract(folder, "--rows_per_file", 8)
    assert outcome.code == 0, outcome.output
    assert f"saved 20 rows in {folder}; 0 images could not be decoded" in outcome.output
    return folder


def stored(folder):
    """Latents `(N, H, W, C)`, captions and labels of all rows."""
    dataset = datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train")
    rows = [torch.frombuffer(bytearray(row), dtype=torch.bfloat16) for row in dataset["latents"]]
    return torch.stack(rows).view(len(rows), GRID, GRID, C), list(dataset["text"]), list(dataset["label"])


def shape_pixels(numbers=range(COUNT)):
    """Pixels `(N, 3, 8, 8)` of shapes."""
    return torch.stack([to_pixels(draw_shape(number, 16), RESOLUTION) for number in numbers])


@torch.no_grad()
def encoded(vae, pixels):
    return vae.encode_to_vectors(pixels)


def assert_rounded(actual, expected):
    torch.testing.assert_close(actual.float(), expected, rtol=2**-8, atol=1e-6)


@pytest.fixture(scope="module")
def vae(rqvae):
    return RQVAEModel.from_pretrained(rqvae)


class TestExtraction:
    def test_stores_what_the_encoder_gives_with_captions_and_classes(self, latents, vae):
        vectors, captions, labels = stored(latents)
        assert_rounded(vectors, encoded(vae, shape_pixels()))
        assert captions == CAPTIONS[:COUNT]
        assert labels == [number % 3 for number in range(COUNT)]

    def test_writes_files_of_so_many_rows_and_says_what_they_are(self, latents, vae):
        files = sorted(path.name for path in latents.iterdir())
        assert files == ["latents-000-00000.parquet", "latents-000-00001.parquet", "latents-000-00002.parquet"] + [
            "latents.json"
        ]
        description = json.loads((latents / "latents.json").read_text())
        assert description == describe_latents(vae)
        assert description["shape"] == [GRID, GRID, C]
        assert [path.name for path in latents.parent.iterdir() if path.name != "cache"] == ["latents"]

    @pytest.mark.parametrize("options", [["--streaming"], ["--dataloader_num_workers", 2]], ids=["stream", "workers"])
    def test_reads_in_other_ways(self, extract, latents, tmp_path, options):
        (outcome,) = extract(tmp_path / "latents", *options)
        assert outcome.code == 0, outcome.output
        (actual, *conditions), (expected, *expected_conditions) = stored(tmp_path / "latents"), stored(latents)
        torch.testing.assert_close(actual, expected)
        assert conditions == expected_conditions

    def test_mirrors(self, extract, vae, tmp_path):
        (outcome,) = extract(tmp_path / "latents", "--mirror", "--batch_size", COUNT)
        assert outcome.code == 0, outcome.output
        vectors, captions, labels = stored(tmp_path / "latents")
        assert_rounded(vectors, encoded(vae, torch.cat([shape_pixels(), shape_pixels().flip(-1)])))
        assert captions == CAPTIONS[:COUNT] * 2
        assert labels == [number % 3 for number in range(COUNT)] * 2

    def test_two_processes_share_the_images(self, extract, latents, tmp_path):
        for outcome in extract(tmp_path / "latents", "--streaming", world_size=2):
            assert outcome.code == 0, outcome.output
        assert len(list((tmp_path / "latents").glob("*.parquet"))) == 2
        (actual, captions, _), (expected, expected_captions, _) = stored(tmp_path / "latents"), stored(latents)
        assert sorted(captions) == sorted(expected_captions)
        order = [expected_captions.index(caption) for caption in captions]
        torch.testing.assert_close(actual, expected[order])

    def test_bfloat16_arithmetic(self, extract, vae, tmp_path):
        (outcome,) = extract(tmp_path / "latents", "--mixed_precision", "bf16")
        assert outcome.code == 0, outcome.output
        actual, expected = stored(tmp_path / "latents")[0].float(), encoded(vae, shape_pixels())
        assert 0 < (actual - expected).norm() / expected.norm() < 0.02

    def test_refuses_a_folder_with_files(self, extract, tmp_path):
        (tmp_path / "latents").mkdir()
        (tmp_path / "latents" / "notes.txt").write_text("mine")
        (outcome,) = extract(tmp_path / "latents")
        assert outcome.code == 1
        assert f"--output_dir must be a new or an empty folder; there are files in {tmp_path}" in outcome.output
        assert [path.name for path in (tmp_path / "latents").iterdir()] == ["notes.txt"]

    def test_refuses_a_file_instead_of_a_folder(self, extract, tmp_path):
        (tmp_path / "latents").write_text("mine")
        (outcome,) = extract(tmp_path / "latents")
        assert f"--output_dir must be a new or an empty folder; {tmp_path / 'latents'} is a file" in outcome.output
        assert (tmp_path / "latents").read_text() == "mine"

    def test_keeps_names_of_classes(self, extract, tmp_path):
        (outcome,) = extract(tmp_path / "latents", "--label_column", "text")
        assert outcome.code == 0, outcome.output
        dataset = datasets.load_dataset("parquet", data_files=str(tmp_path / "latents" / "*.parquet"), split="train")
        assert list(dataset["text"]) == CAPTIONS[:COUNT]
        assert find_class_names(dataset.add_column("example_index", range(COUNT)), "text") == sorted(CAPTIONS[:COUNT])

    def test_encodes_grey_images(self, extract, tmp_path):
        grey = tiny_vae(in_channels=1, out_channels=1)
        grey.save_pretrained(tmp_path / "rqvae")
        (outcome,) = extract(tmp_path / "latents", "--rqvae", tmp_path / "rqvae")
        assert outcome.code == 0, outcome.output
        pixels = [to_pixels(draw_shape(number, 16).convert("L"), RESOLUTION) for number in range(COUNT)]
        assert_rounded(stored(tmp_path / "latents")[0], encoded(grey, torch.stack(pixels)))

    def test_stores_the_moments_of_an_autoencoder_kl(self, extract, tmp_path):
        kl = tiny_kl()
        kl.save_pretrained(tmp_path / "kl")
        options = ["--vae", tmp_path / "kl", "--mirror", "--dtype", "float32", "--batch_size", COUNT]
        (outcome,) = extract(tmp_path / "latents", *options)
        assert outcome.code == 0, outcome.output
        collate = LatentCollator(stored_shape(kl), dtype=stored_dtype(tmp_path / "latents"), label_column="label")
        batch = collate(list(load_latents(tmp_path / "latents", kl)))
        with torch.no_grad():
            expected = encode_moments(kl, torch.cat([shape_pixels(), shape_pixels().flip(-1)]))
        torch.testing.assert_close(batch["latents"].permute(0, 3, 1, 2), expected)
        assert batch["cond_ids"].flatten().tolist() == [number % 3 for number in range(COUNT)] * 2

    def test_refuses_another_class(self, extract, tmp_path):
        VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vq")
        (outcome,) = extract(tmp_path / "latents", "--vae", tmp_path / "vq")
        assert outcome.code == 1
        assert "must be an AutoencoderKL or an RQVAEModel, got 'VQModel'" in outcome.output

    def test_fills_an_empty_folder(self, extract, tmp_path):
        (tmp_path / "latents").mkdir()
        (outcome,) = extract(tmp_path / "latents")
        assert outcome.code == 0, outcome.output
        assert len(stored(tmp_path / "latents")[0]) == COUNT

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--text_column", "caption"], "no column 'caption'; its columns are ['image', 'text', 'label']"),
            (["--batch_size", 0], "--batch_size must be at least 1, got 0"),
            (["--rows_per_file", 0], "--rows_per_file must be at least 1, got 0"),
            (["--text_column", "label"], "the caption of example 0 must be a string, got 0"),
            (["--mixed_precision", "fp16"], "--mixed_precision fp16 needs a GPU"),
            (["--dataset_name", "user/images"], "expected either dataset_name or data_files"),
            (["--random_flip"], "random_flip"),
        ],
    )
    def test_refuses_wrong_options(self, extract, tmp_path, options, message):
        (outcome,) = extract(tmp_path / "latents", *options)
        assert outcome.code
        assert message in outcome.output
        assert not (tmp_path / "latents").exists()

    def test_help_shows_the_manual(self):
        outcome = run_script(EXTRACT, "--help")
        assert outcome.code == 0
        assert EXTRACT.read_text().split('"""')[1].replace("\\\\", "\\") in outcome.output


class TestCorruptImage:
    @pytest.fixture
    def corrupt_files(self, tmp_path):
        """Example 13 has an image that cannot be decoded."""
        rows = create_shapes(COUNT, 16).cast_column("image", datasets.Image(decode=False)).to_list()
        rows[13]["image"]["bytes"] = b"no image"
        dataset = datasets.Dataset.from_list(rows, features=create_shapes(1).features)
        return write_parquet(dataset, tmp_path / "corrupt")

    def test_is_named_and_leaves_no_folder(self, extract, corrupt_files, tmp_path):
        (outcome,) = extract(tmp_path / "latents", "--data_files", corrupt_files, "--rows_per_file", 5)
        assert outcome.code == 1
        assert "the image of example 13 cannot be decoded" in outcome.output
        assert not (tmp_path / "latents").exists()

    def test_can_be_left_out_and_is_counted(self, extract, latents, corrupt_files, tmp_path):
        # Batches of one: one batch is left without images.
        options = ["--data_files", corrupt_files, "--streaming", "--skip_corrupt_images", "--batch_size", 1]
        (outcome,) = extract(tmp_path / "latents", *options)
        assert "saved 19 rows" in outcome.output
        assert "; 1 images could not be decoded" in outcome.output
        actual, expected = stored(tmp_path / "latents"), stored(latents)
        torch.testing.assert_close(actual[0], torch.cat([expected[0][:13], expected[0][14:]]))
        assert actual[1] == CAPTIONS[:13] + CAPTIONS[14:COUNT]


@pytest.mark.parametrize(("script", "options"), [(TEXT, []), (CLASSES, ["--streaming"])], ids=["captions", "classes"])
def test_resumed_training_ends_with_the_weights_of_an_unbroken_one(script, options, rqvae, latents, tmp_path):
    def train(output_dir, *further, die=()):
        arguments = [*TRAIN, *OWN[script], *options, "--rqvae", rqvae, "--latents", latents, *further]
        arguments += ["--output_dir", output_dir]
        return run(run_example, script, arguments, tmp_path, *die)

    outcome = train(tmp_path / "unbroken")
    assert outcome.code == 0, outcome.output
    resume = ["--resume_from_checkpoint", "latest"]
    die = functools.partial(die_while_saving, "checkpoint-4/optimizer.bin")
    assert train(tmp_path / "killed", *resume, die=[die]).code == -signal.SIGKILL
    outcome = train(tmp_path / "killed", *resume)
    assert outcome.code == 0, outcome.output

    model = Path("pipeline", "transformer", "model.safetensors")
    actual, expected = load_file(tmp_path / "killed" / model), load_file(tmp_path / "unbroken" / model)
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]
    lines = [json.loads(line) for line in (tmp_path / "unbroken" / "log.jsonl").read_text().splitlines()[1:]]
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert all(line["images_per_second"] > 0 for line in lines)
    assert (tmp_path / "unbroken" / "images" / "samples-0000006.png").exists()
    pipe = RQPipeline.from_pretrained(tmp_path / "unbroken" / "pipeline")
    condition = {"prompt": "a red circle"} if script == TEXT else {"class_labels": [0]}
    assert pipe(**condition).images[0].size == (RESOLUTION, RESOLUTION)


def test_training_stops_before_it_starts_with_another_rqvae(rqvae, latents, tmp_path):
    torch.manual_seed(1)
    tiny_vae().save_pretrained(tmp_path / "other")
    arguments = [*TRAIN, *OWN[CLASSES], "--latents", latents, "--rqvae", tmp_path / "other", "--output_dir"]
    outcome = run(run_example, CLASSES, [*arguments, tmp_path / "run"], tmp_path)
    assert outcome.code == 1
    assert "was extracted with another autoencoder" in outcome.output
