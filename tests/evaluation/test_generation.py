import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import MAR_CALL, NUM_CLASSES, D, L, tiny_mar_pipeline, tiny_pipeline, tiny_vae

from rq_hf.evaluation.generation import (
    CHUNK,
    GenerationFolder,
    GenerationPlan,
    generate_shard,
    resolve_sampling,
    sample_images,
)
from rq_hf.images import to_uint8
from rq_hf.metrics.moments import FeatureMoments

CAPTIONS = ["red apple", "fire engine", "red fire"]  # of at most L tokens
CONDITIONS = {"none": None, "class": list(range(NUM_CLASSES)), "text": CAPTIONS}
PIPELINES = {"rq": (tiny_pipeline, {"temperature": 0.9}), "mar": (tiny_mar_pipeline, MAR_CALL)}
NUM_IMAGES = 21  # more than a chunk, and no multiple of the conditions


def make(method, kind):
    create, sampling = PIPELINES[method]
    return create(kind), sampling


def plan_of(kind="class", **options):
    return GenerationPlan(**{"num_images": NUM_IMAGES, "conditions": CONDITIONS[kind], "shard_size": 8} | options)


def sampled(pipe, plan, images, batch_size=5, **options):
    return torch.cat(list(sample_images(pipe, plan, images, batch_size=batch_size, **options)))


def mean_color(images, conditions):
    return {"color": images.float().mean(dim=(2, 3))}


def brightest(images, conditions):
    return images.mean(dim=(1, 2, 3))


def fill(pipe, folder, shards, batch_size=4):
    for shard in shards:
        generate_shard(pipe, folder, shard, [mean_color], batch_size=batch_size)


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return tiny_pipeline("class")


class TestPlan:
    def test_classes_are_balanced(self):
        labels = plan_of().conditions_of(range(NUM_IMAGES))
        assert [labels.count(label) for label in range(NUM_CLASSES)] == [6, 5, 5, 5]

    def test_shards_have_every_image_of_a_repeat_once(self):
        plan = plan_of()
        assert [tuple(shard) for shard in plan.shards(0)] == [(0, range(8)), (1, range(8, 16)), (2, range(16, 21))]
        assert [tuple(shard) for shard in plan.shards(1)] == [
            (3, range(21, 29)),
            (4, range(29, 37)),
            (5, range(37, 42)),
        ]

    def test_repeats_have_the_same_conditions_and_other_seeds(self):
        plan = plan_of(seed=5, num_candidates=3)
        first, second = (range(r * NUM_IMAGES, (r + 1) * NUM_IMAGES) for r in range(2))
        assert plan.conditions_of(first) == plan.conditions_of(second)
        assert plan.seeds(first) + plan.seeds(second) == list(range(5, 5 + 2 * 3 * NUM_IMAGES))

    def test_duplicate_captions_are_counted(self):
        description = plan_of("text", conditions=["red apple", "fire engine", "red apple"]).description()
        assert (description["conditions"]["count"], description["conditions"]["distinct"]) == (3, 2)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_images": 0}, "num_images must be at least 1, got 0"),
            ({"shard_size": 0}, "shard_size must be at least 1, got 0"),
            ({"num_candidates": 0}, "num_candidates must be at least 1, got 0"),
            ({"uint8_rule": "ceil"}, "uint8_rule must be one of"),
            ({"conditions": []}, "conditions must be at least one, or None"),
            ({"conditions": None, "cond_ids": torch.zeros(2, L).long()}, "cond_ids go with conditions"),
            ({"cond_ids": torch.zeros(2, L).long()}, r"cond_ids must have the shape \(4, L\), got \(2, 5\)"),
            ({"seed": -1}, "seed must lie in"),
            ({"seed": 2**32 - NUM_IMAGES + 1}, "seeds must lie in .*4294967276 and the 20 after it"),
        ],
    )
    def test_refuses_bad_values(self, options, message):
        with pytest.raises(ValueError, match=message):
            plan_of(**options)

    def test_refuses_conditions_of_two_kinds(self):
        with pytest.raises(TypeError, match="conditions must be strings or integers, got"):
            plan_of(conditions=[0, "red apple"])

    def test_refuses_more_repeats_than_there_are_seeds(self):
        plan = plan_of(seed=2**32 - NUM_IMAGES)
        with pytest.raises(ValueError, match="and the 41 after it"):
            plan.check_seeds(2)


class TestSampling:
    @pytest.mark.parametrize("kind", list(CONDITIONS))
    @pytest.mark.parametrize("method", list(PIPELINES))
    def test_every_image_is_that_of_its_seed_and_condition(self, method, kind):
        pipe, sampling = make(method, kind)
        plan = plan_of(kind, seed=7)
        images = sampled(pipe, plan, range(3, NUM_IMAGES), sampling=sampling)
        name = {"none": None, "class": "class_labels", "text": "prompt"}[kind]
        for number in (3, 11, 20):
            condition = {} if name is None else {name: CONDITIONS[kind][number % len(CONDITIONS[kind])]}
            alone = pipe(**condition, **sampling, generator=[7 + number], output_type="pt").images
            torch.testing.assert_close(images[number - 3], to_uint8(alone, "round")[0], atol=1, rtol=0)

    @pytest.mark.parametrize("method", list(PIPELINES))
    def test_the_batch_size_does_not_change_the_images(self, method):
        pipe, sampling = make(method, "class")
        plan = plan_of()
        expected = sampled(pipe, plan, range(NUM_IMAGES), batch_size=1, sampling=sampling)
        assert len(expected) == NUM_IMAGES
        for batch_size in (4, CHUNK, 100):
            actual = sampled(pipe, plan, range(NUM_IMAGES), batch_size=batch_size, sampling=sampling)
            assert torch.equal(actual, expected)

    def test_keeps_the_best_candidate(self, pipe):
        plan = plan_of(num_candidates=3, seed=4)
        kept = sampled(pipe, plan, range(2, 6), batch_size=2, scorer=brightest)
        labels = [label for label in (2, 3, 0, 1) for _ in range(3)]
        candidates = pipe(class_labels=labels, generator=list(range(10, 22)), output_type="pt").images
        best = [3 * i + candidates[3 * i : 3 * i + 3].mean(dim=(1, 2, 3)).argmax() for i in range(4)]
        assert torch.equal(kept, to_uint8(candidates[torch.stack(best)], "round"))
        assert not torch.equal(kept, sampled(pipe, plan_of(seed=4), range(2, 6)))

    def test_samples_truncated_captions_by_their_ids(self):
        pipe = tiny_pipeline("text")
        ids = pipe.encode_prompt(CAPTIONS)
        plan = plan_of("text", conditions=[f"{caption} and much more" for caption in CAPTIONS], cond_ids=ids)
        assert torch.equal(sampled(pipe, plan, range(7)), sampled(pipe, plan_of("text"), range(7)))

    def test_grey_images_become_rgb(self):
        pipe = tiny_pipeline("none")
        pipe.vae = tiny_vae(in_channels=1, out_channels=1)
        images = sampled(pipe, plan_of("none"), range(2))
        assert images.shape[1] == 3 and torch.equal(images[:, 0], images[:, 2])

    def test_pixels_that_are_nan_are_named(self):
        pipe = tiny_pipeline("class")
        pipe.vae.decoder.conv_out.bias.data[0] = torch.nan
        with pytest.raises(ValueError, match="NaN or infinite") as caught:
            sampled(pipe, plan_of(seed=100), range(20), batch_size=18)
        assert "images 0-15, seeds from 100 on" in caught.value.__notes__[0]

    def test_features_that_are_nan_are_named(self, pipe, tmp_path):
        plan = plan_of()
        folder = GenerationFolder(tmp_path, plan)
        folder.open()

        def nan_features(images, conditions):
            return {"features": torch.tensor([[1.0, torch.nan if label == 1 else 0.0] for label in conditions])}

        with pytest.raises(ValueError, match="features must be finite, got .* in 2 of 8") as caught:
            generate_shard(pipe, folder, plan.shards(0)[1], [nan_features], batch_size=4)
        assert "images 8-15" in caught.value.__notes__[0]
        assert folder.missing(plan.shards(0))[0] == plan.shards(0)

    def test_refuses_no_images_at_a_time(self, pipe):
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            sampled(pipe, plan_of(), range(2), batch_size=0)


class TestResolveSampling:
    def test_fills_in_what_the_model_says(self, pipe):
        pipe.transformer.generation_config.temperature = 0.5
        settings = resolve_sampling(pipe, top_k=[3] * D, guidance_scale=2)
        pipe.transformer.generation_config.temperature = 1.0
        assert settings["temperature"] == 0.5 and settings["top_k"] == 3 and settings["guidance_scale"] == 2.0
        assert settings["guidance_schedule"] == "constant" and settings["do_sample"] is True

    def test_keeps_one_value_per_depth(self, pipe):
        assert resolve_sampling(pipe, temperature=[1, 0.5, 0.5, 0.5])["temperature"] == [1.0, 0.5, 0.5, 0.5]

    def test_of_mar(self):
        settings = resolve_sampling(tiny_mar_pipeline("class"), num_inference_steps=(2, 4))
        assert settings["num_iterations"] == 6 and settings["num_inference_steps"] == (2, 4)

    @pytest.mark.parametrize(
        ("method", "given", "message"),
        [
            ("rq", {"num_iterations": 3}, "RQPipeline samples with temperature, .*, got num_iterations"),
            ("mar", {"top_k": 3}, "MARPipeline samples with temperature, .*, got top_k"),
            ("rq", {"output_type": "pil"}, "got output_type"),
            ("rq", {"top_p": 0.0}, "top_p must lie in"),
            ("rq", {"guidance_schedule": "linear"}, "guidance_schedule needs a guidance_scale other than 1"),
            ("mar", {"num_iterations": 7}, "num_iterations must be at most"),
            ("mar", {"guidance_scale": -1.0}, "guidance_scale must be at least 0"),
        ],
    )
    def test_refuses_others(self, method, given, message):
        with pytest.raises(ValueError, match=message):
            resolve_sampling(make(method, "class")[0], **given)


class TestFolder:
    def test_resumes_where_it_stopped(self, pipe, tmp_path):
        plan = plan_of()
        shards = plan.shards(0)
        unbroken, stopped = (GenerationFolder(tmp_path / name, plan) for name in ("unbroken", "stopped"))
        for folder in (unbroken, stopped):
            folder.open()
        fill(pipe, unbroken, shards)
        fill(pipe, stopped, shards[1:2])
        resumed = GenerationFolder(tmp_path / "stopped", plan)
        resumed.open()
        missing, damaged = resumed.missing(shards)
        assert missing == [shards[0], shards[2]] and not damaged
        fill(pipe, resumed, reversed(missing))
        assert resumed.missing(shards) == ([], [])
        assert torch.equal(resumed.gather(shards, "color"), unbroken.gather(shards, "color"))
        actual, expected = (folder.moments(shards, "color") for folder in (resumed, unbroken))
        assert actual.count == NUM_IMAGES
        assert torch.equal(actual.mean, expected.mean) and torch.equal(actual.covariance, expected.covariance)

    def test_moments_are_those_of_all_images(self, pipe, tmp_path):
        plan = plan_of()
        folder = GenerationFolder(tmp_path, plan)
        folder.open()
        fill(pipe, folder, plan.shards(0) + plan.shards(1))
        colors = sampled(pipe, plan, range(NUM_IMAGES, 2 * NUM_IMAGES)).float().mean(dim=(2, 3))
        actual, expected = folder.moments(plan.shards(1), "color"), FeatureMoments.of(colors)
        torch.testing.assert_close(actual.mean, expected.mean)
        torch.testing.assert_close(actual.covariance, expected.covariance)

    def test_counts_the_images_of_unfinished_shards(self, pipe, tmp_path):
        plan = plan_of()
        shards = plan.shards(0)
        folder = GenerationFolder(tmp_path, plan)
        folder.open()
        fill(pipe, folder, shards[:1])
        assert folder.count_images(shards) == 8
        folder.note_progress(shards[2], 3)
        assert folder.count_images(shards) == 11
        GenerationFolder(tmp_path, plan).open()  # the process that made shard 2 was killed
        assert folder.count_images(shards) == 8

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"seed": 1}, "seed was 0, got 1"),
            ({"num_images": 22}, "num_images was 21, got 22"),
            ({"conditions": [0, 1]}, "conditions.count was 4, got 2"),
            ({"uint8_rule": "truncate"}, "uint8_rule was round, got truncate"),
            ({"settings": {"sampling": {"top_k": 4}, "dtype": "float32"}}, "sampling.top_k was 2, got 4$"),
            ({"settings": {"sampling": {"top_k": 2}}}, "dtype was float32, got None"),
        ],
    )
    def test_refuses_another_plan(self, pipe, tmp_path, changes, message):
        settings = {"sampling": {"top_k": 2}, "dtype": "float32"}
        plan = plan_of(settings=settings)
        folder = GenerationFolder(tmp_path, plan)
        folder.open()
        fill(pipe, folder, plan.shards(0)[:1])
        before = (tmp_path / "plan.json").read_text()
        other = GenerationFolder(tmp_path, plan_of(**{"settings": settings} | changes))
        with pytest.raises(ValueError, match="holds the shards of another plan: .*") as caught:
            other.open()
        text = str(caught.value).split(". Go on")[0]
        assert text.endswith(message.rstrip("$")) or message in text
        assert (tmp_path / "plan.json").read_text() == before

    def test_replaces_a_plan_without_shards(self, tmp_path):
        GenerationFolder(tmp_path, plan_of(seed=1)).open()
        GenerationFolder(tmp_path, plan_of(seed=2)).open()
        assert json.loads((tmp_path / "plan.json").read_text())["seed"] == 2

    def test_names_damaged_shards_and_makes_them_again(self, pipe, tmp_path):
        plan = plan_of()
        shards = plan.shards(0)
        folder = GenerationFolder(tmp_path, plan)
        folder.open()
        fill(pipe, folder, shards)
        expected = folder.gather(shards, "color")
        contents = folder.path(shards[0]).read_bytes()
        folder.path(shards[0]).write_bytes(contents[:-5])
        changed = bytearray(folder.path(shards[2]).read_bytes())
        changed[-1] ^= 1
        folder.path(shards[2]).write_bytes(changed)
        missing, damaged = folder.missing(shards)
        assert missing == [shards[0], shards[2]]
        assert str(folder.path(shards[0])) in damaged[0] and "truncated or damaged" in damaged[0]
        assert "do not match their checksum" in damaged[1]
        fill(pipe, folder, missing)
        assert torch.equal(folder.gather(shards, "color"), expected)

    def test_an_empty_file_is_damaged(self, pipe, tmp_path):
        plan = plan_of()
        folder = GenerationFolder(tmp_path, plan)
        folder.open()
        folder.path(plan.shards(0)[1]).touch()
        missing, damaged = folder.missing(plan.shards(0))
        assert missing == plan.shards(0) and len(damaged) == 1

    def test_refuses_a_shard_of_another_plan(self, pipe, tmp_path):
        plan, other = plan_of(), plan_of(seed=1)
        for name, which in (("a", plan), ("b", other)):
            folder = GenerationFolder(tmp_path / name, which)
            folder.open()
            fill(pipe, folder, which.shards(0)[:1])
        (tmp_path / "b/shards/00000.safetensors").replace(tmp_path / "a/shards/00000.safetensors")
        with pytest.raises(ValueError, match="00000.safetensors is not shard 0 of this plan"):
            GenerationFolder(tmp_path / "a", plan).missing(plan.shards(0))

    def test_refuses_a_folder_of_something_else(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="holds notes.txt but no plan.json"):
            GenerationFolder(tmp_path, plan_of()).open()
        with pytest.raises(ValueError, match="notes.txt is a file"):
            GenerationFolder(tmp_path / "notes.txt", plan_of()).open()
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    @pytest.mark.parametrize("text", ["{", "[1]", ""])
    def test_refuses_a_plan_that_is_none(self, tmp_path, text):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ValueError, match="plan.json is not the plan of a run"):
            GenerationFolder(tmp_path, plan_of()).open()

    def test_names_what_a_shard_does_not_have(self, pipe, tmp_path):
        plan = plan_of()
        folder = GenerationFolder(tmp_path, plan)
        folder.open()
        fill(pipe, folder, plan.shards(0)[:1])
        with pytest.raises(ValueError, match="has no 'network.logits'; it has color"):
            folder.load(plan.shards(0)[0], "network.logits")


class TestSamples:
    def saved(self, pipe, folder, sample_type, plan):
        folder = GenerationFolder(folder, plan, sample_type)
        folder.open()
        for shard in plan.shards(0):
            generate_shard(pipe, folder, shard, batch_size=4)
        return sampled(pipe, plan, range(NUM_IMAGES)).permute(0, 2, 3, 1).numpy()

    def test_png(self, pipe, tmp_path):
        expected = self.saved(pipe, tmp_path, "png", plan_of())
        names = sorted(path.name for path in (tmp_path / "samples").iterdir())
        assert names == [f"{number:07d}.png" for number in range(NUM_IMAGES)]
        actual = np.stack([np.asarray(Image.open(tmp_path / "samples" / name)) for name in names])
        assert np.array_equal(actual, expected)

    def test_png_is_a_data_set(self, pipe, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        expected = self.saved(pipe, tmp_path / "evaluation", "png", plan_of())
        GenerationFolder(tmp_path / "evaluation", plan_of(), "png").describe_samples(plan_of().shards(0))
        dataset = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "evaluation/samples"), split="train")
        assert list(dataset["label"]) == plan_of().conditions_of(range(NUM_IMAGES))
        assert np.array_equal(np.stack([np.asarray(image) for image in dataset["image"]]), expected)

    def test_npz(self, pipe, tmp_path):
        expected = self.saved(pipe, tmp_path, "npz", plan_of())
        files = [np.load(path) for path in sorted((tmp_path / "samples").iterdir())]
        assert np.array_equal(np.concatenate([file["arr_0"] for file in files]), expected)
        labels = np.concatenate([file["arr_1"] for file in files])
        assert labels.tolist() == plan_of().conditions_of(range(NUM_IMAGES))

    def test_refuses_another_kind(self, tmp_path):
        with pytest.raises(ValueError, match="sample_type must be one of"):
            GenerationFolder(tmp_path, plan_of(), "jpg")
