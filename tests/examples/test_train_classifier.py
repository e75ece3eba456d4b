import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from processes import run_script
from safetensors.torch import load_file
from shapes import write_shapes

from rq_hf.metrics import SmallClassifier

SCRIPT = Path(__file__).parents[2] / "examples" / "train_classifier.py"
COUNT = 24


@pytest.fixture(scope="module")
def augment():
    return runpy.run_path(str(SCRIPT), run_name="imported")["augment"]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """(output folder, further options) -> its command line."""
    files = write_shapes(tmp_path_factory.mktemp("shapes"), COUNT, 32)

    def arguments(output_dir, *further):
        return [
            *("--cpu", "--data_files", files, "--validation_files", files, "--output_dir", output_dir),
            *("--train_batch_size", 8, "--max_train_steps", 6, "--lr_warmup_steps", 2, "--logging_steps", 1),
            *("--image_logging_steps", 3, "--checkpointing_steps", 2, "--report_to", "none", *further),
        ]

    return arguments


def train(arguments):
    outcome = run_script(SCRIPT, *arguments)
    assert outcome.code == 0, outcome.output
    return outcome.output


@pytest.fixture(scope="module")
def finished(tmp_path_factory, command):
    """Output folder and output of a run."""
    folder = tmp_path_factory.mktemp("classifier")
    return folder, train(command(folder))


class TestAugment:
    def test_shifts_every_image_by_some_pixels_in_each_direction(self, augment):
        pixels = torch.rand(40, 3, 12, 10) + 1
        offsets = set()
        for image, original in zip(augment(pixels, max_shift=2, cutout=0), F.pad(pixels, [2] * 4)):
            found = [
                (y, x) for y in range(5) for x in range(5) if torch.equal(image, original[:, y : y + 12, x : x + 10])
            ]
            assert len(found) == 1
            offsets.add(found[0])
        assert {y for y, _ in offsets} == {x for _, x in offsets} == set(range(5))

    def test_erases_a_square_of_every_image(self, augment):
        pixels = torch.rand(40, 3, 12, 10) + 1
        erased = augment(pixels, max_shift=0, cutout=4) == 0
        assert torch.equal(erased, erased[:, :1].expand_as(erased))
        corners = set()
        for mask in erased[:, 0]:
            rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
            assert len(rows) == len(columns) == 4
            assert mask.sum() == 16
            corners.add((int(rows[0]), int(columns[0])))
        assert {y for y, _ in corners} == set(range(9))
        assert {x for _, x in corners} == set(range(7))

    def test_nothing_asked_changes_nothing(self, augment):
        pixels = torch.rand(3, 3, 12, 10)
        assert torch.equal(augment(pixels, max_shift=0, cutout=0), pixels)


@pytest.mark.slow
class TestTraining:
    def test_saves_half_precision_of_the_classes_of_the_data_set(self, finished):
        folder = finished[0] / "classifier"
        weights = load_file(folder / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float16, torch.int64}
        assert SmallClassifier.from_pretrained(folder)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
        assert "Classes: circle, square, triangle." in (folder / "README.md").read_text()
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == "rq_hf" and "| momentum | " in card.text
        (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
        variables = {}
        exec(code, variables)
        assert variables["logits"].shape == (4, 3)

    def test_logs_accuracy_and_says_that_of_the_saved_file(self, finished):
        folder, output = finished
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "validation/accuracy" in line] == [3, 6]
        assert all(0 <= line["accuracy"] <= 1 for line in lines if "accuracy" in line)
        (said,) = (line for line in output.splitlines() if line.startswith("validation/accuracy in half precision"))
        assert 0 <= float(said.split()[-1]) <= 1

    def test_resumed_run_has_the_same_weights(self, finished, command, tmp_path):
        train(command(tmp_path, "--max_train_steps", 6))
        first = load_file(tmp_path / "classifier" / "model.safetensors")
        train(command(tmp_path, "--resume_from_checkpoint", tmp_path / "checkpoint-4"))
        again = load_file(tmp_path / "classifier" / "model.safetensors")
        expected = load_file(finished[0] / "classifier" / "model.safetensors")
        for name, tensor in expected.items():
            assert torch.equal(first[name], tensor)
            assert torch.equal(again[name], tensor)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--momentum", 1.5), r"--momentum must lie in (0, 1]"),
        (("--cutout", 33), "--cutout must be at most 32, got 33"),
        (("--max_shift", -1), "--max_shift must be at least 0"),
        (("--label_smoothing", 1), r"--label_smoothing must lie in [0, 1), got 1"),
    ],
)
def test_refuses_by_name(command, tmp_path, monkeypatch, option, message):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, command(tmp_path, *option))])
    with pytest.raises(ValueError) as error:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert message in str(error.value)
