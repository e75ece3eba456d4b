import json
import runpy
import sys

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from processes import run_group
from scripts import EXAMPLES, run_example
from shapes import draw_shape, write_shapes
from tiny import D, tiny_kl, tiny_vae

from rq_hf.evaluation.report import Report
from rq_hf.files import checksum
from rq_hf.images import to_pixels
from rq_hf.metrics import psnr

SCRIPT = EXAMPLES / "evaluate_reconstruction.py"
COUNT, SIDE = 20, 16


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Arguments that name the images."""
    files = write_shapes(tmp_path_factory.mktemp("shapes"), COUNT, SIDE, num_shards=3)
    return ["--data_files", files, "--resolution", SIDE, "--batch_size", 6]


@pytest.fixture(scope="module")
def rqvae(tmp_path_factory):
    """Folder of an RQ-VAE."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("rqvae")
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluate(source, rqvae):
    """(output folder, further options) -> the outcomes of the processes."""

    def run(output_dir, *further, world_size=1, vae=rqvae):
        arguments = ["--cpu", "--vae", vae, *source, "--output_dir", output_dir, *further]
        return run_group(world_size, run_example, SCRIPT, arguments, output_dir.parent)

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, evaluate):
    """Output folder and output of an evaluation at all depths."""
    folder = tmp_path_factory.mktemp("finished") / "report"
    (outcome,) = evaluate(folder, "--network", "cifar10-small", "--all_depths")
    assert outcome.code == 0, outcome.output
    return folder, outcome.output


def figures(folder):
    """Values by name and depth."""
    report = Report.load(folder / "report.json")
    return {(figure.name, figure.settings.get("depth")): figure.value for figure in report.figures}


@pytest.mark.slow
class TestEvaluation:
    def test_reports_all_figures_at_every_depth_with_what_they_depend_on(self, finished, rqvae):
        folder, output = finished
        names = ("PSNR", "SSIM", "Fréchet distance (cifar10-small)", "codebook usage", "codebook perplexity")
        assert set(figures(folder)) == {(name, depth) for name in names for depth in range(1, D + 1)}
        report = Report.load(folder / "report.json")
        assert report.model == str(rqvae)
        (weights,) = rqvae.glob("*.safetensors")
        assert report.weights == {weights.name: checksum(weights)}
        assert report.transform == "centre crop and bilinear resize to 16×16"
        assert all(figure.n == COUNT for figure in report.figures)
        for line in ("PSNR", "Fréchet distance (cifar10-small)", f"saved {folder / 'report.json'}"):
            assert line in output

    def test_measures_the_images_of_the_data_set(self, finished, rqvae):
        vae = type(tiny_vae()).from_pretrained(rqvae)
        pixels = torch.stack([to_pixels(draw_shape(number, SIDE), SIDE) for number in range(COUNT)])
        expected = psnr(pixels, vae.decode_codes(vae.get_codes(pixels)).sample).mean().item()
        assert figures(finished[0])["PSNR", D] == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("options", [(), ("--streaming",)], ids=["prepared", "streaming"])
    def test_two_processes_find_the_same(self, finished, evaluate, tmp_path, options):
        further = ("--network", "cifar10-small", "--all_depths", *options)
        for outcome in evaluate(tmp_path / "report", *further, world_size=2):
            assert outcome.code == 0, outcome.output
        assert figures(tmp_path / "report") == figures(finished[0])

    def test_updates_a_card(self, evaluate, tmp_path):
        card = tmp_path / "README.md"
        card.write_text("---\nlibrary_name: rq_hf\n---\n# Mine\n")
        options = ("--model_card", card, "--dataset_type", "tester/shapes", "--num_images", 7, "--name", "shapes")
        (outcome,) = evaluate(tmp_path / "report", *options)
        assert outcome.code == 0, outcome.output
        results = ModelCard.load(card).data.eval_results
        assert {result.metric_type for result in results} == {
            *("psnr", "ssim", "codebook_usage", "codebook_perplexity")
        }
        assert {(result.dataset_name, result.dataset_split) for result in results} == {("shapes", "train[:7]")}
        assert "# Mine" in card.read_text()

    def test_autoencoder_kl(self, evaluate, tmp_path):
        tiny_kl(scaling_factor=1.0).save_pretrained(tmp_path / "kl")
        (outcome,) = evaluate(tmp_path / "report", "--mixed_precision", "bf16", vae=tmp_path / "kl")
        assert outcome.code == 0, outcome.output
        assert set(figures(tmp_path / "report")) == {("PSNR", None), ("SSIM", None)}
        settings = [figure.settings for figure in Report.load(tmp_path / "report" / "report.json").figures]
        assert settings == [{"mixed_precision": "bf16"}] * 2
        (outcome,) = evaluate(tmp_path / "other", "--all_depths", vae=tmp_path / "kl")
        assert "--all_depths needs an RQ-VAE, got an AutoencoderKL" in outcome.output

    def test_counts_images_that_cannot_be_decoded(self, evaluate, tmp_path):
        examples = [{"image": {"bytes": b"broken", "path": None}}] * 7
        features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
        datasets.Dataset.from_list(examples, features=features).to_parquet(tmp_path / "broken.parquet")
        arguments = ("--data_files", tmp_path / "broken.parquet")
        for outcome in evaluate(tmp_path / "report", *arguments, world_size=2):
            assert "the image of example" in outcome.output
            assert outcome.code == 1
        (outcome,) = evaluate(tmp_path / "report", *arguments, "--skip_corrupt_images")
        assert "there are no images to reconstruct" in outcome.output
        assert not (tmp_path / "report").exists()


def test_keeps_an_earlier_report(tmp_path, source, rqvae, monkeypatch):
    (tmp_path / "report.json").write_text(json.dumps({"mine": 1}))
    monkeypatch.setattr(
        sys, "argv", [str(SCRIPT), "--vae", str(rqvae), *map(str, source), "--output_dir", str(tmp_path)]
    )
    with pytest.raises(ValueError, match=r"report\.json exists; choose another --output_dir"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert json.loads((tmp_path / "report.json").read_text()) == {"mine": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lpips_vgg", "vgg.pth"], "LPIPS needs both --lpips_vgg and --lpips_heads"),
        (["--model_card", "README.md"], "--model_card and --dataset_type go together"),
        (["--model_card", "nowhere.md", "--dataset_type", "x"], "--model_card must be a file, got 'nowhere.md'"),
        (["--num_images", 0], "--num_images must be at least 1, got 0"),
    ],
)
def test_refuses_by_name(tmp_path, source, monkeypatch, options, message):
    arguments = [SCRIPT, "--vae", "none", *source, "--output_dir", tmp_path, *options]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    with pytest.raises(ValueError, match=message):
        runpy.run_path(str(SCRIPT), run_name="__main__")
