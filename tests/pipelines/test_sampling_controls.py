"""What a caller of the pipeline controls: batches, seeds, guidance, candidates, variations, previews."""

import numpy as np
import pytest
import torch
from tiny import CALLS, HEIGHT, WIDTH, D, H, T, W, kinds, tiny_codes, tiny_pipeline

from rq_hf import RQPipeline


def brightness(images, conditions):
    return images.mean(dim=(1, 2, 3))


GREEDY = {"do_sample": False, "output_type": "latent"}


class TestBatches:
    @kinds
    @pytest.mark.parametrize("max_batch_size", [1, 2, 3, 100])
    def test_pictures_of_seeds_do_not_depend_on_them(self, kind, max_batch_size):
        pipe = tiny_pipeline(kind)
        count = 6 if kind == "none" else 3
        call = {**CALLS[kind], "num_images_per_prompt": count, "generator": [3, 1, 4, 1, 5, 9], "output_type": "pt"}
        expected, actual = pipe(**call), pipe(**call, max_batch_size=max_batch_size)
        assert torch.equal(actual.codes, expected.codes)
        torch.testing.assert_close(actual.images, expected.images)

    def test_bound_what_is_drawn_at_a_time(self):
        pipe, sizes = tiny_pipeline(), []
        pipe.transformer.spatial_stack.register_forward_pre_hook(lambda stack, args: sizes.append(len(args[0])))
        pipe.vae.decoder.register_forward_pre_hook(lambda decoder, args: sizes.append(len(args[0])))
        images = pipe(num_images_per_prompt=5, max_batch_size=2).images
        assert len(images) == 5
        assert max(sizes) == 2

    def test_progress_and_callback_go_over_all_of_them(self):
        seen = []
        tiny_pipeline()(
            num_images_per_prompt=3,
            max_batch_size=2,
            callback_on_step_end=lambda pipe, step, position, tensors: seen.append((step, position)) or {},
        )
        assert seen == [(step, step % T) for step in range(2 * T)]

    @pytest.mark.parametrize("scored", [False, True])
    def test_that_are_interrupted_keep_the_number_of_images(self, scored):
        pipe, prefix = tiny_pipeline(), tiny_codes(6 if scored else 3)

        def stop(pipe, step, position, tensors):
            pipe._interrupt = step == T + 1
            return tensors

        call = {"batch_size": 3, "max_batch_size": 2, "prefix_codes": prefix, "start": 1, "output_type": "pt"}
        scorer = {"scorer": brightness, "num_candidates": 2} if scored else {}
        output = pipe(**call, **scorer, callback_on_step_end=stop)
        assert output.images.shape == (3, 3, HEIGHT, WIDTH)
        if not scored:
            codes = output.codes.flatten(1, 2)
            assert torch.equal(codes[:, 0], prefix.flatten(1, 2)[:, 0])
            assert codes[:2, -1].any() and not codes[2, 4:].any()
            preview = pipe.decode_codes(output.codes[2:], num_positions=4, output_type="pt")
            assert torch.equal(output.images[2:], preview)

    def test_take_their_own_prefixes(self):
        pipe, prefix = tiny_pipeline(), tiny_codes(5)
        whole = pipe(num_images_per_prompt=5, prefix_codes=prefix, start=3, **GREEDY).codes
        parts = pipe(num_images_per_prompt=5, prefix_codes=prefix, start=3, max_batch_size=2, **GREEDY).codes
        assert torch.equal(whole, parts)


class TestCandidates:
    @kinds
    def test_the_best_of_each_prompt_are_returned_best_first(self, kind):
        pipe = tiny_pipeline(kind)
        count = len(next(iter(CALLS[kind].values()), [None]))
        call = {**CALLS[kind], "generator": list(range(count * 12)), "output_type": "pt"}
        every = pipe(**call, num_images_per_prompt=12)
        kept = pipe(**call, num_images_per_prompt=3, num_candidates=4, scorer=brightness, max_batch_size=5)
        scores = brightness(every.images, None).view(count, 12)
        best = scores.argsort(dim=-1, descending=True)[:, :3] + 12 * torch.arange(count)[:, None]
        assert torch.equal(kept.codes, every.codes[best.flatten()])
        torch.testing.assert_close(kept.images, every.images[best.flatten()])

    @kinds
    def test_scorer_sees_pictures_with_their_conditions(self, kind):
        seen = []

        def scorer(images, conditions):
            assert images.shape[1:] == (3, HEIGHT, WIDTH)
            assert 0 <= images.min() <= images.max() <= 1
            seen.append(conditions)
            return images.mean(dim=(1, 2, 3))

        tiny_pipeline(kind)(**CALLS[kind], num_candidates=2, scorer=scorer, max_batch_size=3)
        given = next(iter(CALLS[kind].values()), None)
        if given is None:
            assert seen == [None]
        else:
            assert seen == [[given[0], given[0], given[1]], [given[1]]]

    @pytest.mark.parametrize("score", [torch.zeros(1), torch.tensor([0.0, float("nan")]), [0.0, 1.0]])
    def test_scores_that_are_none_are_an_error(self, score):
        with pytest.raises(ValueError, match=r"scorer must return one number per image \(2\)"):
            tiny_pipeline()(num_candidates=2, scorer=lambda images, conditions: score)


class TestNegativePrompt:
    CALL = {"prompt": ["red", "fire engine"], "guidance_scale": 4.0, **GREEDY}

    def test_replaces_no_text(self):
        pipe = tiny_pipeline("text")
        ids, away = pipe.encode_prompt(self.CALL["prompt"]), pipe.encode_prompt(["apple", "apple"])
        settings = {"guidance_scale": 4.0, "do_sample": False}
        expected = pipe.transformer.generate(ids, negative_cond_ids=away, **settings)
        assert torch.equal(pipe(**self.CALL, negative_prompt="apple").codes, expected)
        assert torch.equal(pipe(**self.CALL, negative_prompt=["apple", "apple"], max_batch_size=1).codes, expected)
        assert not torch.equal(pipe(**self.CALL).codes, expected)

    @pytest.mark.parametrize(
        "kind, arguments, error, message",
        [
            ("text", {"prompt": "red", "negative_prompt": "apple"}, ValueError, "guidance_scale other than 1"),
            ("text", {**CALL, "negative_prompt": ["red"]}, ValueError, r"one per prompt \(2\), got 1"),
            ("text", {**CALL, "negative_prompt": 3}, TypeError, "negative_prompt must be a string or a list"),
            ("class", {"class_labels": 1, "negative_prompt": "red"}, ValueError, "negative_prompt goes with a prompt"),
        ],
    )
    def test_bad_ones_are_errors(self, kind, arguments, error, message):
        with pytest.raises(error, match=message):
            tiny_pipeline(kind)(**arguments)


class TestVariations:
    @pytest.mark.parametrize("keep_depth", range(1, D))
    def test_keep_the_coarse_codes_of_a_picture(self, keep_depth):
        pipe = tiny_pipeline()
        codes = pipe.encode_image(torch.rand(1, 3, HEIGHT, WIDTH))
        varied = pipe(prefix_codes=codes, keep_depth=keep_depth, output_type="pt", generator=[1])
        assert torch.equal(varied.codes[..., :keep_depth], codes[..., :keep_depth])
        assert not torch.equal(varied.codes, codes)
        coarse = pipe.decode_codes(codes, depth=keep_depth, output_type="pt")
        assert torch.equal(pipe.decode_codes(varied.codes, depth=keep_depth, output_type="pt"), coarse)


class TestPreview:
    def test_codes_that_are_not_drawn_yet_do_not_matter(self):
        pipe, codes = tiny_pipeline(), tiny_codes(2)
        others = tiny_codes(2).flatten(1, 2)
        others[:, :5] = codes.flatten(1, 2)[:, :5]
        previews = [pipe.decode_codes(c, num_positions=5, output_type="pt") for c in (codes, others.view_as(codes))]
        assert torch.equal(*previews)
        whole = pipe.decode_codes(codes, output_type="pt")
        assert not torch.equal(previews[0], whole)
        assert torch.equal(pipe.decode_codes(codes, num_positions=T, output_type="pt"), whole)

    def test_of_a_picture_that_is_being_drawn(self):
        pipe, previews = tiny_pipeline(), []

        def show(pipe, step, position, tensors):
            previews.append(pipe.decode_codes(tensors["codes"], num_positions=position + 1, output_type="pt"))
            return {}

        images = pipe(callback_on_step_end=show, output_type="pt").images
        assert torch.equal(previews[-1], images)
        assert len(previews) == T

    @pytest.mark.parametrize("num_positions", [-1, H * W + 1])
    def test_bad_numbers_of_positions_are_errors(self, num_positions):
        with pytest.raises(ValueError, match=rf"num_positions must lie in \[0, {T}\], got {num_positions}"):
            tiny_pipeline().decode_codes(tiny_codes(1), num_positions=num_positions)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_candidates": 0}, "num_candidates must be at least 1, got 0"),
        ({"num_candidates": 2}, "and vice versa; got no scorer and num_candidates=2"),
        ({"scorer": brightness}, "and vice versa; got a scorer and num_candidates=1"),
        ({"max_batch_size": 0}, "max_batch_size must be at least 1, got 0"),
        ({"num_candidates": 2, "scorer": brightness, "generator": [1]}, r"one generator per image \(2\), got 1"),
        ({"keep_depth": 1}, "got no prefix_codes, start=0, keep_depth=1"),
        ({"keep_depth": D, "prefix_codes": tiny_codes(1)}, rf"keep_depth must lie in \[0, {D - 1}\], got {D}"),
    ],
)
def test_contradictions_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(**arguments)


@pytest.mark.parametrize("name", ["num_images_per_prompt", "num_candidates", "batch_size", "max_batch_size"])
@pytest.mark.parametrize("value", [1.5, 2.0, True, "2"])
def test_numbers_of_images_are_integers(name, value):
    with pytest.raises(TypeError, match=f"{name} must be an integer, got {value!r}"):
        tiny_pipeline()(**{name: value})


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numbers_of_images_may_be_those_of_numpy(integer):
    pipe, call = tiny_pipeline(), {"scorer": brightness, "generator": list(range(6)), "output_type": "pt"}
    numbers = {"num_images_per_prompt": 2, "num_candidates": 3, "max_batch_size": 4}
    expected = pipe(**call, **numbers)
    actual = pipe(**call, **{name: integer(value) for name, value in numbers.items()})
    assert torch.equal(actual.codes, expected.codes)
    torch.testing.assert_close(actual.images, expected.images)


def test_compiled_pipeline_draws_the_same():
    pipe = tiny_pipeline("text")
    call = {"prompt": ["red", "fire engine"], "do_sample": False, "output_type": "pt"}
    expected = pipe(**call)
    pipe.compile()
    assert pipe.transformer.is_packed
    assert pipe.vae.use_slicing
    actual = pipe(**call)
    assert torch.equal(actual.codes, expected.codes)
    torch.testing.assert_close(actual.images, expected.images, rtol=1e-4, atol=1e-5)


def test_pipeline_of_another_device_is_compiled_for_it(monkeypatch):
    monkeypatch.setattr(RQPipeline, "_execution_device", torch.device("cuda"))
    pipe = tiny_pipeline()
    pipe.compile()
    assert not pipe.transformer.is_packed
    assert not pipe.vae.use_slicing
    with pytest.raises(ValueError, match="cannot pack a model after compile_steps"):
        pipe.transformer.pack_weights()
