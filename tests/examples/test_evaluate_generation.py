import functools
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_group, run_script
from safetensors import safe_open
from scripts import EXAMPLES, run_example
from shapes import draw_shape, write_shapes
from tiny import MAR_CALL, NUM_CLASSES, L, tiny_mar_pipeline, tiny_pipeline, tiny_tokenizer
from transformers import CLIPConfig, CLIPModel

import rq_hf.evaluation.generation
from rq_hf import RQPipeline
from rq_hf.evaluation.report import Report
from rq_hf.images import to_uint8
from rq_hf.metrics import FeatureMoments, frechet_distance, load_feature_network
from rq_hf.metrics.feature_networks import SMALL_CLASSIFIER
from rq_hf.metrics.statistics import FeatureStatistics

EVALUATE = EXAMPLES / "evaluate_generation.py"
NUM_IMAGES, SHARD_SIZE = 36, 8
IMAGES = ["--cpu", "--num_images", NUM_IMAGES, "--shard_size", SHARD_SIZE, "--batch_size", 5]
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def kill_at(kind, number, rank=0):
    """From now on, the process of this rank kills itself: half-way through writing a shard, or before sampling a batch
    of it."""
    if int(os.environ.get("RANK", 0)) != rank:
        return
    save_file, call = rq_hf.evaluation.generation.save_file, RQPipeline.__call__
    calls = iter(range(1, 1000))

    def save_half(tensors, path, metadata):
        save_file(tensors, path, metadata)
        if f"{number:05d}" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(call)
    def call_and_stop(pipe, **arguments):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(pipe, **arguments)

    if kind == "writing":
        rq_hf.evaluation.generation.save_file = save_half
    else:
        RQPipeline.__call__ = call_and_stop


def evaluate(output_dir, *arguments, world_size=1, place=None):
    arguments = [*arguments, "--output_dir", output_dir]
    die = [functools.partial(kill_at, *place)] if place else []
    return run_group(world_size, run_example, EVALUATE, arguments, output_dir.parent, *die)


def finish(output_dir, *arguments, **options):
    for outcome in evaluate(output_dir, *arguments, **options):
        assert outcome.code == 0, outcome.output
    return outcome


def stored(folder):
    """The tensors of all shards, by shard and name."""
    tensors = {}
    for path in sorted((folder / "shards").iterdir()):
        with safe_open(path, "pt") as file:
            tensors |= {(path.name, name): file.get_tensor(name) for name in file.keys()}
    return tensors


def assert_same_shards(folder, expected_folder):
    actual, expected = stored(folder), stored(expected_folder)
    assert actual.keys() == expected.keys()
    assert not [key for key in expected if not torch.equal(actual[key], expected[key])]


def figures(folder):
    return Report.load(folder / "report.json").figures


def moments_of(folder):
    moments = FeatureMoments(6)
    for (_, name), features in stored(folder).items():
        if name == "network.features":
            moments.update(features)
    return moments


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folder of a CLIP model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "clip"
    tokenizer = tiny_tokenizer()
    text = {**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": 77, "pad_token_id": 0}
    vision = {**TINY, "image_size": 8, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).save_pretrained(folder)
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder)
    settings = {"image_processor_type": "CLIPImageProcessor", "size": 8}
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory, clip):
    """File of the statistics of shapes."""
    path = tmp_path_factory.mktemp("statistics") / "shapes.safetensors"
    network = load_feature_network(str(clip))
    pixels = np.stack([np.asarray(draw_shape(number, 8)) for number in range(48)])
    features = network(torch.from_numpy(pixels).permute(0, 3, 1, 2)).features
    provenance = {"dataset": "shapes", "split": "train", "transform": "none", "count": 48, "uint8_rule": "stored"}
    FeatureStatistics(FeatureMoments.of(features), provenance | network.identity(), features).save(path)
    return path


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Folders of pipelines."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipelines")
    for kind in ("none", "class", "text"):
        tiny_pipeline(kind).save_pretrained(folder / kind)
    tiny_mar_pipeline("class").save_pretrained(folder / "mar")
    return folder


@pytest.fixture(scope="module")
def network(clip, reference):
    return ["--network", clip, "--reference", reference, "--metrics", "fid", "precision_recall"]


@pytest.fixture(scope="module")
def classes(pipelines, network):
    return ["--model", pipelines / "class", *network, *IMAGES]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, classes):
    """Output folder of the evaluation of a class-conditional model by one process, without interruption."""
    folder = tmp_path_factory.mktemp("unbroken") / "evaluation"
    finish(folder, *classes, "--save_samples", "npz")
    return folder


class TestReport:
    def test_figures_are_those_of_the_samples(self, unbroken, clip, reference):
        samples = [np.load(path)["arr_0"] for path in sorted((unbroken / "samples").iterdir())]
        images = torch.from_numpy(np.concatenate(samples)).permute(0, 3, 1, 2)
        assert len(images) == NUM_IMAGES
        features = load_feature_network(str(clip))(images).features
        expected = frechet_distance(features, FeatureStatistics.load(reference).moments)
        distance, precision, recall = figures(unbroken)
        assert distance.metric == "frechet_distance"  # FID is that of Inception
        assert distance.value == pytest.approx(expected, rel=1e-4) and distance.n == NUM_IMAGES
        assert (precision.metric, recall.metric) == ("precision", "recall")

    def test_samples_are_those_of_their_seeds_and_classes(self, unbroken, pipelines):
        pipe = RQPipeline.from_pretrained(pipelines / "class")
        last = np.load(sorted((unbroken / "samples").iterdir())[-1])
        images = pipe(class_labels=last["arr_1"], generator=[32, 33, 34, 35], output_type="pt").images
        assert last["arr_1"].tolist() == [number % NUM_CLASSES for number in range(32, 36)]
        assert np.array_equal(to_uint8(images, "round").permute(0, 2, 3, 1).numpy(), last["arr_0"])

    def test_says_what_figures_depend_on(self, unbroken, reference):
        report = Report.load(unbroken / "report.json")
        assert set(report.weights) == {"transformer/model.safetensors", "vae/diffusion_pytorch_model.safetensors"}
        assert report.sampler["temperature"] == 1.0 and report.sampler["dtype"] == "float32"
        assert report.seeds == [0] and report.uint8_rule == "round" and report.dataset == "shapes"
        distance = report.figures[0]
        assert distance.network["network"] == "clip" and distance.reference["file"] == reference.name

    def test_two_processes_make_the_same_shards(self, unbroken, classes, tmp_path):
        options = [*classes, "--save_samples", "npz"]
        finish(tmp_path / "evaluation", *options, world_size=2)
        assert_same_shards(tmp_path / "evaluation", unbroken)
        actual, expected = moments_of(tmp_path / "evaluation"), moments_of(unbroken)
        assert torch.equal(actual.mean, expected.mean) and torch.equal(actual.covariance, expected.covariance)
        assert figures(tmp_path / "evaluation") == figures(unbroken)

    def test_a_run_whose_second_process_died_goes_on_with_one(self, unbroken, classes, tmp_path):
        options = [*classes, "--save_samples", "npz"]
        first, second = evaluate(tmp_path / "evaluation", *options, world_size=2, place=("writing", 3, 1))
        assert second.code == -signal.SIGKILL and first.code not in (0, None)  # it waited for the other one
        finished = {path.stem for path in (tmp_path / "evaluation" / "shards").glob("0*.safetensors")}
        assert {"00000", "00001"} <= finished and "00003" not in finished
        finish(tmp_path / "evaluation", *options)
        assert_same_shards(tmp_path / "evaluation", unbroken)
        assert figures(tmp_path / "evaluation") == figures(unbroken)

    @pytest.mark.parametrize("place", [("writing", 2), ("sampling", 5)], ids=["SIGKILL", "SIGTERM"])
    def test_a_killed_run_goes_on_to_the_same_figures(self, unbroken, classes, tmp_path, place):
        options = [*classes, "--save_samples", "npz"]
        (outcome,) = evaluate(tmp_path / "evaluation", *options, place=place)
        assert outcome.code == -(signal.SIGKILL if place[0] == "writing" else signal.SIGTERM)
        finished = sorted((tmp_path / "evaluation" / "shards").glob("0*.safetensors"))
        assert [path.name for path in finished] == ["00000.safetensors", "00001.safetensors"]
        before = [path.stat().st_mtime_ns for path in finished]
        outcome = finish(tmp_path / "evaluation", *options)
        assert "2 of 5 shards are there already" in outcome.output
        assert [path.stat().st_mtime_ns for path in finished] == before
        assert_same_shards(tmp_path / "evaluation", unbroken)
        assert figures(tmp_path / "evaluation") == figures(unbroken)

    def test_another_batch_size_samples_the_same_images(self, unbroken, classes, tmp_path):
        finish(tmp_path / "evaluation", *classes, "--save_samples", "npz", "--batch_size", 3)
        for path in sorted((unbroken / "samples").iterdir()):
            assert np.array_equal(
                np.load(tmp_path / "evaluation/samples" / path.name)["arr_0"], np.load(path)["arr_0"]
            )
        assert_same_shards(tmp_path / "evaluation", unbroken)


@pytest.fixture
def evaluated(unbroken, tmp_path):
    """A copy of the output folder, to go on with."""
    import shutil

    return Path(shutil.copytree(unbroken, tmp_path / "evaluation"))


class TestResume:
    def test_a_finished_run_only_computes_the_figures(self, evaluated, unbroken, classes):
        before = (evaluated / "report.json").read_text()
        outcome = finish(evaluated, *classes, "--save_samples", "npz", "--metrics", "fid")
        assert "5 of 5 shards are there already" in outcome.output and "images/s" not in outcome.output
        assert figures(evaluated) == figures(unbroken)[:1]
        (earlier,) = evaluated.glob("report-*.json")
        assert earlier.read_text() == before

    def test_more_repeats_keep_the_first(self, evaluated, unbroken, classes):
        outcome = finish(evaluated, *classes, "--save_samples", "npz", "--repeats", 3)
        assert "5 of 15 shards are there already" in outcome.output
        report = Report.load(evaluated / "report.json")
        assert report.seeds == [0, 36, 72]
        repeated, single = report.figures[0], figures(unbroken)[0]
        assert repeated.settings["values"][0] == single.value and repeated.settings["std_of"] == "repeats"
        values = torch.tensor(repeated.settings["values"], dtype=torch.double)
        assert len(values.unique()) == 3
        assert (repeated.value, repeated.std) == pytest.approx((values.mean().item(), values.std().item()))

    def test_names_a_truncated_shard_and_makes_it_again(self, evaluated, unbroken, classes):
        shard = evaluated / "shards" / "00003.safetensors"
        os.truncate(shard, shard.stat().st_size - 1)
        outcome = finish(evaluated, *classes, "--save_samples", "npz")
        assert f"{shard} is truncated or damaged" in outcome.output and "it is made again" in outcome.output
        assert_same_shards(evaluated, unbroken)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--seed", 1], "seed was 0, got 1"),
            (["--top_k", 3], "sampling.top_k was 12, got 3"),
            (["--dtype", "bfloat16"], "dtype was float32, got bfloat16"),
            (["--save_samples", "png"], "samples was npz, got png"),
            (["--num_images", 40], "num_images was 36, got 40"),
        ],
    )
    def test_refuses_another_plan(self, evaluated, unbroken, classes, options, message):
        (outcome,) = evaluate(evaluated, *classes, "--save_samples", "npz", *options)
        assert outcome.code == 1
        assert "holds the shards of another plan" in outcome.output and message in outcome.output
        assert_same_shards(evaluated, unbroken)

    def test_refuses_another_model(self, evaluated, classes, tmp_path):
        torch.manual_seed(1)
        tiny_pipeline("class").save_pretrained(tmp_path / "other")
        (outcome,) = evaluate(evaluated, *classes, "--save_samples", "npz", "--model", tmp_path / "other")
        assert outcome.code == 1 and "weights.transformer/model.safetensors was " in outcome.output

    def test_all_processes_stop(self, evaluated, classes):
        for outcome in evaluate(evaluated, *classes, "--save_samples", "npz", "--seed", 1, world_size=2):
            assert outcome.code == 1 and "holds the shards of another plan" in outcome.output


class TestCaptions:
    def test_one_image_per_caption(self, pipelines, clip, tmp_path):
        captions = ["red apple", "fire engine", "red apple"]
        (tmp_path / "captions.txt").write_text("\n".join(captions))
        options = ["--model", pipelines / "text", "--captions", tmp_path / "captions.txt", "--cpu"]
        options += ["--clip_model", clip, "--metrics", "clip_score", "--save_samples", "png"]
        finish(tmp_path / "evaluation", *options)
        (score,) = figures(tmp_path / "evaluation")
        assert score.metric == "clip_score" and -1 <= score.value <= 1 and score.n == 3
        conditions = json.loads((tmp_path / "evaluation" / "plan.json").read_text())["conditions"]
        assert (conditions["count"], conditions["distinct"]) == (3, 2)
        pipe = RQPipeline.from_pretrained(pipelines / "text")
        images = to_uint8(pipe(captions, generator=[0, 1, 2], output_type="pt").images, "round")
        for number, image in enumerate(images):
            path = tmp_path / "evaluation" / "samples" / f"{number:07d}.png"
            assert np.array_equal(np.asarray(rq_hf.evaluation.generation.Image.open(path)), image.permute(1, 2, 0))

    def test_best_of_several_by_clip_has_a_higher_score(self, pipelines, clip, tmp_path):
        (tmp_path / "captions.txt").write_text("red apple\nfire engine\nred fire")
        options = ["--model", pipelines / "text", "--captions", tmp_path / "captions.txt", "--cpu"]
        options += ["--clip_model", clip, "--metrics", "clip_score", "--images_per_caption", 4]
        finish(tmp_path / "all", *options)
        finish(tmp_path / "best", *options, "--acceptance_rate", 0.25, "--scorer", clip)
        (every,), (best,) = figures(tmp_path / "all"), figures(tmp_path / "best")
        assert every.n == best.n == 12 and best.value > every.value
        assert Report.load(tmp_path / "best" / "report.json").sampler["num_candidates"] == 4

    def test_long_captions_can_be_truncated(self, pipelines, clip, tmp_path):
        files = write_shapes(tmp_path / "shapes", 6, 8)
        options = ["--model", pipelines / "text", "--data_files", files, "--cpu", "--caption_seed", 1]
        options += ["--clip_model", clip, "--metrics", "clip_score", "--num_images", 4]
        (outcome,) = evaluate(tmp_path / "evaluation", *options)
        assert outcome.code == 1 and f"captions may have at most {L} tokens, but 4 of 4 have more" in outcome.output
        finish(tmp_path / "evaluation", *options, "--truncate_captions")
        assert figures(tmp_path / "evaluation")[0].n == 4

    def test_more_images_than_captions_are_refused(self, pipelines, clip, tmp_path):
        (tmp_path / "captions.txt").write_text("red apple\nfire engine")
        options = ["--model", pipelines / "text", "--captions", tmp_path / "captions.txt", "--cpu"]
        options += ["--clip_model", clip, "--metrics", "clip_score", "--num_images", 3]
        (outcome,) = evaluate(tmp_path / "evaluation", *options)
        message = "--num_images 3 is more than the 2 captions at --images_per_caption 1"
        assert outcome.code == 1 and message in outcome.output


@pytest.fixture(scope="module")
def classified(pipelines):
    options = ["--model", pipelines / "class", "--cpu", "--num_images", 12, "--save_samples", "npz"]
    return [*options, "--metrics", "class_accuracy", "--classifier", SMALL_CLASSIFIER]


class TestClassifier:
    def test_accuracy_and_rejection_sampling(self, classified, tmp_path):
        finish(tmp_path / "all", *classified)
        finish(tmp_path / "best", *classified, "--acceptance_rate", 0.25, "--scorer", SMALL_CLASSIFIER)
        network = load_feature_network(SMALL_CLASSIFIER)
        means = []
        for name in ("all", "best"):
            samples = [np.load(path) for path in sorted((tmp_path / name / "samples").iterdir())]
            images = torch.from_numpy(np.concatenate([file["arr_0"] for file in samples])).permute(0, 3, 1, 2)
            labels = torch.from_numpy(np.concatenate([file["arr_1"] for file in samples]))
            logits = network(images).logits
            (accuracy,) = figures(tmp_path / name)
            assert accuracy.value == (logits.argmax(dim=-1) == labels).double().mean().item()
            means.append(logits.log_softmax(dim=-1).gather(-1, labels[:, None]).mean())
        assert means[1] > means[0]
        assert Report.load(tmp_path / "best" / "report.json").sampler["scorer"] == network.identity()

    def test_one_network_for_features_and_classes_sees_images_once(self, classified, tmp_path):
        finish(
            tmp_path / "evaluation",
            *classified,
            "--network",
            SMALL_CLASSIFIER,
            "--metrics",
            "class_accuracy",
            "inception_score",
        )
        assert {name for _, name in stored(tmp_path / "evaluation")} == {"network.features", "network.logits"}
        assert [figure.metric for figure in figures(tmp_path / "evaluation")] == ["class_accuracy", "inception_score"]


def test_mar(pipelines, network, tmp_path):
    options = [f for name, value in MAR_CALL.items() for f in (f"--{name}", value)]
    finish(tmp_path / "evaluation", "--model", pipelines / "mar", *network, *IMAGES, *options)
    sampler = Report.load(tmp_path / "evaluation" / "report.json").sampler
    assert sampler["num_inference_steps"] == MAR_CALL["num_inference_steps"]
    assert sampler["scheduler"]["class"] == "DDPMScheduler"


def test_bfloat16_and_a_model_card(pipelines, network, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    options = ["--model", pipelines / "none", *network, *IMAGES, "--dtype", "bfloat16", "--compile"]
    outcome = finish(tmp_path / "evaluation", *options, "--model_card", tmp_path / "README.md")
    assert "Fréchet distance (clip)" in outcome.output
    card = (tmp_path / "README.md").read_text()
    assert "frechet_distance" in card and "license: apache-2.0" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_images", 0], "--num_images must be at least 1, got 0"),
        (["--acceptance_rate", 0.3, "--scorer", "clip"], "--acceptance_rate must be 1 divided by a number"),
        (["--acceptance_rate", 0.5], "--acceptance_rate below 1 and --scorer go together"),
        (["--metrics", "clip_score"], "--metrics clip_score needs --clip_model"),
        (["--metrics", "cmmd"], "--metrics cmmd needs --cmmd_network and --cmmd_reference"),
        (["--classifier", "cifar10-small"], "--classifier is given, but none of --metrics"),
        (["--uint8_rule", "ceil"], "invalid choice"),
        (["--protocol", "imagenet"], "invalid choice"),
    ],
)
def test_refuses_wrong_options(classes, tmp_path, monkeypatch, capsys, options, message):
    arguments = [*classes, "--output_dir", tmp_path / "evaluation", *options]
    monkeypatch.setattr(sys, "argv", [str(EVALUATE), *map(str, arguments)])
    with pytest.raises((ValueError, SystemExit)) as caught:
        runpy.run_path(str(EVALUATE), run_name="__main__")
    assert message in str(caught.value) + capsys.readouterr().err
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_iterations", 4], "RQPipeline samples with temperature"),
        (["--captions", "captions.txt"], "this model takes no captions, got --captions"),
        (["--metrics", "kid"], "kid needs at least 1,000 images, those of shapes (train) have 48"),
        (["--metrics", "inception_score", "fid"], "inception_score needs logits, which clip does not have"),
        (["--model", "no such folder"], "--model must be a folder or user/name on the Hub"),
        (["--seed", 2**32 - 4], "seeds must lie in [0, 2**32)"),
    ],
)
def test_refuses_what_does_not_fit(classes, tmp_path, options, message):
    (outcome,) = evaluate(tmp_path / "evaluation", *classes, *options)
    assert outcome.code == 1
    assert message in outcome.output
    assert not (tmp_path / "evaluation").exists()


def test_a_protocol_sets_the_defaults(pipelines, network, tmp_path):
    moments = FeatureStatistics.load(network[3]).moments
    np.savez(tmp_path / "authors.npz", mu=moments.mean.numpy(), sigma=moments.covariance.numpy())
    options = ["--model", pipelines / "class", "--network", network[1], "--reference", tmp_path / "authors.npz"]
    options += ["--cpu", "--metrics", "fid", "--num_images", 12]
    (outcome,) = evaluate(tmp_path / "evaluation", *options)
    assert outcome.code == 1 and "authors.npz does not say what it was computed from" in outcome.output
    finish(tmp_path / "evaluation", *options, "--protocol", "imagenet-50k")
    report = Report.load(tmp_path / "evaluation" / "report.json")
    assert report.dataset == "ILSVRC/imagenet-1k" and report.uint8_rule == "round"
    changed = {"num_images": 12, "metrics": ["fid"], "network": str(network[1])}
    assert report.sampler["protocol"] == {"name": "imagenet-50k", "changed": changed}


def test_refuses_statistics_of_another_network(classes, reference, tmp_path):
    statistics = FeatureStatistics.load(reference)
    provenance = statistics.provenance | {"network_sha256": "0" * 64}
    FeatureStatistics(statistics.moments, provenance, statistics.features).save(tmp_path / "other.safetensors")
    (outcome,) = evaluate(tmp_path / "evaluation", *classes, "--reference", tmp_path / "other.safetensors")
    assert outcome.code == 1 and "must have the same network_sha256" in outcome.output


def test_help_shows_the_manual():
    outcome = run_script(EVALUATE, "--help")
    assert outcome.code == 0
    assert EVALUATE.read_text().split('"""')[1].replace("\\\\", "\\") in outcome.output
