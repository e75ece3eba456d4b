import json
import re
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from rq_hf.evaluation import Report
from rq_hf.metrics.feature_networks import INCEPTION_SHA256
from rq_hf.metrics.moments import FeatureMoments
from rq_hf.metrics.statistics import FeatureStatistics

CARDS = Path(__file__).parents[2] / "model_cards"
INCEPTION = {"network": "inception-2015-12-05", "protocol": "pytorch-fid", "network_sha256": INCEPTION_SHA256}
SMALL = {"network": "cifar10-small", "protocol": "32×32", "network_sha256": "1" * 64}
PROVENANCE = {
    "model": "models/imagenet-1.4b",
    "weights": {"transformer/model.safetensors": "a" * 64, "vae/diffusion_pytorch_model.safetensors": "b" * 64},
    "dataset": "ImageNet 256×256",
    "split": "train",
    "transform": "none",
    "uint8_rule": "round",
    "sampler": {"top_k": 16384, "top_p": 0.92},
    "seeds": [0, 50000],
}


def reference(network=INCEPTION, folder=None, **changes):
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    provenance = {"dataset": "imagenet", "split": "train", "transform": "centre crop", "count": 9}
    statistics = FeatureStatistics(
        FeatureMoments.of(features), provenance | {"uint8_rule": "stored", **network} | changes
    )
    if folder is not None:
        statistics.save(folder / "imagenet.safetensors")
    return statistics


@pytest.fixture
def report(tmp_path):
    """With an FID, an Inception Score and a class accuracy."""
    report = Report(**PROVENANCE)
    report.add("fid", 11.56, 50_000, reference=reference(folder=tmp_path))
    report.add("inception_score", torch.tensor(112.4), 50_000, std=2.5, network=INCEPTION, splits=10)
    report.add("class_accuracy", 0.734, 50_000, network=SMALL)
    return report


class TestProvenance:
    def test_is_completed_with_versions_command_and_date(self, report):
        assert set(report.versions) == {"python", "rq_hf", "torch", "diffusers", "transformers"} | {
            "huggingface_hub",
            "numpy",
        }
        assert report.versions["torch"] == torch.__version__
        assert sys.argv[0] in report.command
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", report.date)

    @pytest.mark.parametrize("name", PROVENANCE)
    def test_must_be_given(self, name):
        with pytest.raises(TypeError, match=f"missing 1 required keyword-only argument: '{name}'"):
            Report(**{key: value for key, value in PROVENANCE.items() if key != name})

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"model": ""}, ValueError, "model must not be empty"),
            ({"weights": {}}, ValueError, "weights must have the SHA-256 of at least one file, got none"),
            ({"weights": {"vae": "abc"}}, ValueError, r"weights\[vae\] must be a SHA-256 .*, got abc"),
            ({"transform": None}, TypeError, "transform must be of type str, got None"),
            ({"uint8_rule": "stored"}, ValueError, "uint8_rule must be one of .*, got 'stored'"),
            ({"seeds": []}, ValueError, "seeds must have the first seed of every repeat"),
            ({"seeds": 3}, TypeError, "seeds must be a list or tuple, got 3"),
            ({"seeds": [-1]}, ValueError, "seeds must lie in .*, got -1"),
        ],
    )
    def test_that_is_wrong_is_refused(self, changes, error, message):
        with pytest.raises(error, match=message):
            Report(**PROVENANCE | changes)

    def test_reconstructions_are_not_sampled(self):
        Report(**PROVENANCE | {"sampler": {}, "seeds": []}).add("psnr", 21.5, 500)


class TestFigures:
    def test_fid_has_the_reference_with_its_file(self, report):
        figure = report.figures[0]
        expected = reference()
        assert figure.network == INCEPTION
        assert figure.reference["file"] == "imagenet.safetensors"
        assert re.fullmatch("[0-9a-f]{64}", figure.reference["sha256"])
        assert {name: figure.reference[name] for name in expected.provenance} == expected.provenance

    @pytest.mark.parametrize(
        ("metric", "network", "name"),
        [
            ("fid", INCEPTION, "FID (pytorch-fid)"),
            ("kid", INCEPTION | {"protocol": "clean-fid"}, "KID (clean-fid)"),
            ("frechet_distance", SMALL, "Fréchet distance (cifar10-small)"),
            ("recall", SMALL, "recall (cifar10-small)"),
        ],
    )
    def test_are_named_with_their_network(self, metric, network, name):
        report = Report(**PROVENANCE)
        report.add(metric, 3.5, 100, reference=reference(network))
        assert report.figures[0].name == name

    @pytest.mark.parametrize(("metric", "network"), [("fid", SMALL), ("frechet_distance", INCEPTION)])
    def test_fid_is_that_of_inception_only(self, metric, network):
        with pytest.raises(ValueError, match=f"fid is the distance of the Inception network, .*; got {metric} of"):
            Report(**PROVENANCE).add(metric, 3.5, 100, reference=reference(network))

    @pytest.mark.parametrize(
        ("metric", "options", "message"),
        [
            ("fid", {}, "fid needs network"),
            ("fid", {"network": INCEPTION}, "fid needs reference, the statistics that it compares with"),
            ("inception_score", {}, "inception_score needs network"),
            ("FID", {}, "metric must be one of .*, got 'FID'"),
            ("psnr", {"value": float("nan")}, "psnr must be finite, got nan"),
            ("psnr", {"n": 0}, "n must be at least 1, got 0"),
            ("psnr", {"std": -1.0}, "std must be at least 0, got -1.0"),
            ("lpips", {"network": {"network": "vgg16"}}, "must have network, protocol, network_sha256, got network"),
        ],
    )
    def test_without_what_they_depend_on_are_refused(self, metric, options, message):
        with pytest.raises(ValueError, match=message):
            Report(**PROVENANCE).add(metric, **{"value": 1.0, "n": 10} | options)

    def test_statistics_of_another_network_are_refused(self):
        other = INCEPTION | {"protocol": "clean-fid"}
        with pytest.raises(ValueError, match="the protocol of the network: got pytorch-fid and clean-fid"):
            Report(**PROVENANCE).add("fid", 3.5, 100, network=other, reference=reference())

    def test_statistics_by_another_uint8_rule_are_refused(self):
        with pytest.raises(ValueError, match="must have the uint8_rule round or stored, got truncate"):
            Report(**PROVENANCE).add("fid", 3.5, 100, reference=reference(uint8_rule="truncate"))

    def test_settings_that_json_cannot_hold_are_refused(self):
        with pytest.raises(TypeError, match="settings must be plain values, as JSON can hold them: .* set"):
            Report(**PROVENANCE).add("psnr", 21.5, 10, split={1})
        with pytest.raises(TypeError, match="sampler must be plain values"):
            Report(**PROVENANCE | {"sampler": {"top_p": float("nan")}})

    def test_cannot_be_there_twice(self, report):
        with pytest.raises(ValueError, match=r"has a figure of Inception Score \(pytorch-fid\) .* already"):
            report.add("inception_score", 113.0, 50_000, network=INCEPTION, splits=10)
        report.add("inception_score", 113.0, 50_000, network=INCEPTION, splits=5)


class TestSaving:
    def test_everything_comes_back(self, report, tmp_path):
        report.save(tmp_path / "new" / "report.json")
        assert Report.load(tmp_path / "new" / "report.json") == report
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.json"]

    def test_the_file_is_plain_json(self, report, tmp_path):
        report.save(tmp_path / "report.json")
        content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        assert content["weights"] == PROVENANCE["weights"]
        assert content["figures"][1]["value"] == pytest.approx(112.4)
        assert content["figures"][1]["settings"] == {"splits": 10}

    def test_needs_figures_and_a_json_file(self, report, tmp_path):
        with pytest.raises(ValueError, match="the report has no figures"):
            Report(**PROVENANCE).save(tmp_path / "report.json")
        with pytest.raises(ValueError, match=r"a report must end in \.json, got .*report\.txt"):
            report.save(tmp_path / "report.txt")
        assert not list(tmp_path.glob("report*"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda text: text[: len(text) // 2], "is not a whole report"),
            (lambda text: "", "is empty"),
            (lambda text: "[]", r"it must be of type dict, got \[\]"),
            (lambda text: text.replace('"date"', '"day"'), "missing: date; unknown: day"),
            (lambda text: text.replace('"transform": "none"', '"transform": null'), "transform must be of type str"),
            (lambda text: text.replace('"value": 11.56', '"value": NaN'), "fid must be finite, got nan"),
            (lambda text: text.replace('"count": 9,', ""), "missing: count"),
            (lambda text: text.replace("a" * 64, "a" * 63), "must be a SHA-256"),
        ],
    )
    def test_changed_files_are_refused_by_name(self, report, tmp_path, change, message):
        path = tmp_path / "report.json"
        report.save(path)
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"report\.json.* {message}"):
            Report.load(path)


def test_the_table_shows_figures_and_provenance(report):
    lines = report.table().splitlines()
    assert re.fullmatch(
        r"FID \(pytorch-fid\) +11\.56 +50,000 +imagenet \(train\), 9 images, imagenet\.safetensors [0-9a-f]{8}…",
        lines[2],
    )
    assert re.fullmatch(r"Inception Score \(pytorch-fid\) +112\.4 ± 2\.5 +50,000 +splits 10", lines[3])
    text = "\n".join(lines)
    assert "aaaaaaaa…" in text and "bbbbbbbb…" in text
    assert "top_k 16384, top_p 0.92" in text
    assert "transform none, uint8 rule round" in text
    assert f"inception-2015-12-05, pytorch-fid ({INCEPTION_SHA256[:8]}…)" in text
    assert f"torch {torch.__version__}" in text


class TestCard:
    TASK = {"task_type": "unconditional-image-generation", "dataset_type": "ILSVRC/imagenet-1k"}

    @pytest.fixture
    def card(self, tmp_path):
        """A copy of the card of a published model."""
        path = tmp_path / "README.md"
        path.write_bytes((CARDS / "imagenet-1.4b.md").read_bytes())
        return path

    def test_other_entries_and_the_text_stay(self, report, card):
        before = ModelCard.load(card)
        report.update_card(card, **self.TASK)
        after = ModelCard.load(card)
        assert after.text == before.text
        ours = after.data.eval_results[len(before.data.eval_results) :]
        assert after.data.eval_results[: len(before.data.eval_results)] == before.data.eval_results
        assert [(result.metric_type, result.metric_name, result.metric_value) for result in ours] == [
            ("fid", "FID (pytorch-fid)", 11.56),
            ("inception_score", "Inception Score (pytorch-fid)", pytest.approx(112.4)),
            ("class_accuracy", "class accuracy (cifar10-small)", 0.734),
        ]
        assert {(result.dataset_type, result.dataset_split) for result in ours} == {("ILSVRC/imagenet-1k", "train")}
        assert {result.source_url for result in ours} == {None}
        fields = ("license", "tags", "datasets", "pipeline_tag", "library_name", "model_name")
        assert [getattr(after.data, name) for name in fields] == [getattr(before.data, name) for name in fields]
        assert [path.name for path in card.parent.iterdir() if path.suffix == ".md"] == ["README.md"]

    def test_figures_say_what_they_depend_on(self, report, card):
        report.update_card(card, **self.TASK)
        arguments = ModelCard.load(card).data.eval_results[4].metric_args
        assert arguments["n"] == 50_000
        assert arguments["network_sha256"] == INCEPTION_SHA256
        assert arguments["reference_sha256"] == report.figures[0].reference["sha256"]
        assert arguments["weights_sha256"] == PROVENANCE["weights"]
        assert (arguments["seeds"], arguments["uint8_rule"]) == ([0, 50_000], "round")
        assert arguments["sampler"] == PROVENANCE["sampler"]

    def test_a_new_value_replaces_the_one_before(self, report, card):
        report.update_card(card, **self.TASK)
        again = Report(**PROVENANCE)
        again.add("fid", 11.42, 50_000, reference=reference())
        again.update_card(card, **self.TASK)
        results = ModelCard.load(card).data.eval_results
        values = [(result.metric_name, result.metric_value) for result in results]
        assert ("FID (pytorch-fid)", 11.42) in values and ("FID (pytorch-fid)", 11.56) not in values
        assert ("FID", 11.56) in values  # the authors'
        assert ("class accuracy (cifar10-small)", 0.734) in values
        assert len(values) == 7
        text = card.read_text(encoding="utf-8")
        again.date = report.date
        again.update_card(card, **self.TASK)
        assert len(ModelCard.load(card).data.eval_results) == 7
        assert card.read_text(encoding="utf-8").count("split: train") == text.count("split: train")

    def test_another_split_is_another_figure(self, report, card):
        report.update_card(card, **self.TASK)
        other = Report(**PROVENANCE | {"split": "validation"})
        other.add("fid", 12.1, 50_000, reference=reference())
        other.update_card(card, **self.TASK)
        values = [result.metric_value for result in ModelCard.load(card).data.eval_results]
        assert 11.56 in values and 12.1 in values and len(values) == 8

    @pytest.mark.parametrize("text", ["# My model\n", "---\nlicense: mit\n---\n\n# My model\n"])
    def test_a_card_without_results_gets_them(self, report, tmp_path, text):
        (tmp_path / "README.md").write_text(text)
        report.update_card(tmp_path / "README.md", **self.TASK)
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.model_name == "imagenet-1.4b"
        assert len(card.data.eval_results) == 3
        assert card.text.strip() == "# My model"
        assert card.data.license == ("mit" if "mit" in text else None)

    @pytest.mark.parametrize(
        "text", ["---\nmodel-index: 3\n---\n", "---\nmodel-index:\n- name: x\n---\n", "---\nlicense: [mit\n---\n", ""]
    )
    def test_a_card_with_invalid_metadata_stays_as_it_is(self, report, tmp_path, text):
        path = tmp_path / "README.md"
        path.write_text(text)
        with pytest.raises(ValueError, match="README.md (has invalid metadata|is empty)"):
            report.update_card(path, **self.TASK)
        assert path.read_text() == text
        assert not list(tmp_path.glob("unfinished*"))

    def test_a_missing_card_is_named(self, report, tmp_path):
        with pytest.raises(FileNotFoundError, match="README.md"):
            report.update_card(tmp_path / "README.md", **self.TASK)
