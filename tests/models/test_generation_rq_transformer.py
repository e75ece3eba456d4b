import math

import numpy as np
import pytest
import torch
from generation import GREEDY, chi_square, greedy_by_forward, variants
from tiny import D, H, K, L, LargestTensor, T, W, kinds, tiny_codes, tiny_condition, tiny_transformer
from transformers import GenerationConfig

from rq_hf import RQTransformerModel


def seeded_generator(seed=0):
    return torch.Generator().manual_seed(seed)


@kinds
@variants
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_greedy_codes_equal_uncached_ones(kind, overrides, attention):
    model, ids = tiny_transformer(kind, **overrides), tiny_condition(kind)
    expected = greedy_by_forward(model, ids)
    model.set_attn_implementation(attention)
    codes = model.generate(ids, num_images=2, **GREEDY)
    assert codes.dtype == torch.long
    assert torch.equal(codes, expected)


@kinds
@pytest.mark.parametrize("start", [1, T - 1, T])
def test_greedy_codes_continue_a_prefix(kind, start):
    model, ids, prefix = tiny_transformer(kind), tiny_condition(kind), tiny_codes()
    codes = model.generate(ids, prefix_codes=prefix, start=start, **GREEDY)
    assert torch.equal(codes.flatten(1, 2)[:, :start], prefix.flatten(1, 2)[:, :start])
    assert torch.equal(codes, greedy_by_forward(model, ids, prefix_codes=prefix, start=start))
    assert torch.equal(codes, prefix) == (start == T)


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("start", [0, 2])
def test_guided_greedy_codes_equal_the_manual_combination(kind, scale, start):
    model, ids, prefix = tiny_transformer(kind), tiny_condition(kind), tiny_codes() if start else None
    codes = model.generate(ids, prefix_codes=prefix, start=start, guidance_scale=scale, **GREEDY)
    expected = greedy_by_forward(model, ids, prefix_codes=prefix, start=start, scale=scale)
    assert torch.equal(codes, expected)
    assert not torch.equal(codes, model.generate(ids, prefix_codes=prefix, start=start, **GREEDY))


def test_guidance_forms_the_logits_of_each_image_once():
    batch_size, codebook_size = 64, 512  # so that no other tensor is as large as the logits
    model, ids = tiny_transformer("class", codebook_size=codebook_size), tiny_condition("class", batch_size)
    with LargestTensor() as largest:
        model.generate(ids, guidance_scale=3.0, **GREEDY)
    assert largest.bytes == 4 * batch_size * codebook_size


def test_guidance_of_one_is_none():
    model, ids = tiny_transformer("class"), tiny_condition("class")
    assert torch.equal(model.generate(ids, guidance_scale=1.0, **GREEDY), model.generate(ids, **GREEDY))


def test_conditions_may_be_flat_when_they_are_single_ids():
    model, ids = tiny_transformer("class"), torch.tensor([0, 2, 1])
    assert torch.equal(model.generate(ids, **GREEDY), model.generate(ids[:, None], **GREEDY))


@pytest.mark.parametrize("num_images", [None, 1, 3])
def test_an_unconditional_model_draws_as_many_images_as_asked_for(num_images):
    codes = tiny_transformer().generate(num_images=num_images)
    assert codes.shape == (num_images or 1, H, W, D)
    assert 0 <= codes.min() <= codes.max() < K


@kinds
def test_the_generator_alone_decides(kind):
    model, ids = tiny_transformer(kind), tiny_condition(kind)
    torch.manual_seed(1)
    first = model.generate(ids, num_images=2, generator=seeded_generator())
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = model.generate(ids, num_images=2, generator=seeded_generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, model.generate(ids, num_images=2, generator=seeded_generator(1)))


def test_without_a_generator_the_global_seed_decides():
    model, drawn = tiny_transformer(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(num_images=2))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    "setting", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}], ids=["top_k", "top_p", "temperature"]
)
def test_extreme_settings_are_greedy(setting):
    model = tiny_transformer()
    codes = model.generate(num_images=5, **setting)
    assert torch.equal(codes, model.generate(num_images=5, **GREEDY))


@pytest.mark.parametrize("name, greedy, free", [("top_k", 1, K), ("top_p", 1e-6, 1.0), ("temperature", 1e-6, 3.0)])
@pytest.mark.parametrize("greedy_depths", [[0], [0, 1], [1, 2, 3]])
def test_settings_per_depth(name, greedy, free, greedy_depths):
    model = tiny_transformer()
    values = [greedy if d in greedy_depths else free for d in range(D)]
    codes = model.generate(num_images=20, **{name: values})
    most_likely = model(codes).logits.argmax(dim=-1)
    is_greedy = [torch.equal(codes[..., d], most_likely[..., d]) for d in range(D)]
    assert is_greedy == [d in greedy_depths for d in range(D)]


@pytest.mark.parametrize("kind, scale", [("none", 1.0), ("class", 1.0), ("class", 2.5)])
def test_drawn_codes_follow_the_probabilities_of_the_model(kind, scale):
    model = tiny_transformer(kind, code_shape=(1, 1, 2), codebook_size=5)
    num_images = 5000
    ids = None if kind == "none" else torch.full((num_images, 1), 2)
    codes = model.generate(
        ids, num_images=num_images, generator=seeded_generator(), temperature=1.5, guidance_scale=scale
    )
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))  # all code maps there are
    logits = model(pairs.view(25, 1, 1, 2), None if ids is None else ids[:25]).logits
    if kind == "class":
        null = model(pairs.view(25, 1, 1, 2), torch.full((25, 1), model.config.null_cond_id)).logits
        logits = null + scale * (logits - null)
    log_probabilities = (logits / 1.5).log_softmax(dim=-1).view(25, 2, 5)
    joint = log_probabilities.gather(-1, pairs[..., None]).sum(dim=(1, 2)).exp()
    torch.testing.assert_close(joint.sum(), torch.tensor(1.0))
    counts = torch.bincount(codes.view(-1, 2) @ torch.tensor([5, 1]), minlength=25)
    assert chi_square(counts, joint) < 60  # 24 degrees of freedom


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [GREEDY, {}, {"top_k": 3}, {"top_p": 0.9}, {"top_p": 0.1}])
def test_logits_that_are_no_numbers_are_an_error(value, settings):
    model = tiny_transformer()
    torch.nn.init.constant_(model.classifier.bias, value)
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.generate(num_images=2, **settings)


class TestGeneratorPerImage:
    SETTINGS = {"top_k": 15, "top_p": 0.8, "temperature": 1.3}

    @kinds
    def test_codes_depend_on_condition_and_seed_alone(self, kind):
        model, ids, seeds = tiny_transformer(kind), tiny_condition(kind, 6), [7, 3, 7, 0, 5, 2**32 - 1]
        if ids is not None:
            ids[2] = ids[0]
        whole = model.generate(ids, num_images=6, generator=seeds, **self.SETTINGS)
        for rows in ([0], [1, 2, 3], [5, 4], [4, 0, 1]):
            part = None if ids is None else ids[rows]
            codes = model.generate(part, num_images=len(rows), generator=[seeds[i] for i in rows], **self.SETTINGS)
            assert torch.equal(codes, whole[rows])
        assert torch.equal(whole[0], whole[2])
        assert not torch.equal(whole[0], whole[1])

    def test_a_seed_stands_for_a_generator(self):
        model = tiny_transformer()
        codes = model.generate(generator=[seeded_generator(4), seeded_generator(5)], num_images=2, **self.SETTINGS)
        assert torch.equal(codes, model.generate(generator=[4, 5], num_images=2, **self.SETTINGS))

    def test_one_generator_for_two_images_is_an_error(self):
        with pytest.raises(ValueError, match="each image needs its own generator"):
            tiny_transformer().generate(num_images=2, generator=[seeded_generator()] * 2)


class TestKeptDepths:
    @kinds
    @pytest.mark.parametrize("keep_depth", range(1, D))
    @pytest.mark.parametrize("start", [0, 3])
    def test_the_first_codes_stay_and_the_others_are_as_likely_as_the_model_says(self, kind, keep_depth, start):
        model, ids, given = tiny_transformer(kind), tiny_condition(kind), tiny_codes()
        codes = model.generate(ids, prefix_codes=given, start=start, keep_depth=keep_depth, **GREEDY)
        assert torch.equal(codes[..., :keep_depth], given[..., :keep_depth])
        assert torch.equal(codes.flatten(1, 2)[:, :start], given.flatten(1, 2)[:, :start])
        most_likely = model(codes, ids).logits.argmax(dim=-1)
        assert torch.equal(
            codes.flatten(1, 2)[:, start:, keep_depth:], most_likely.flatten(1, 2)[:, start:, keep_depth:]
        )

    def test_survive_what_on_position_returns(self):
        model, given = tiny_transformer(), tiny_codes()

        def change_the_first(position, codes):
            codes[:, 0, 0] = (codes[:, 0, 0] + 1) % K if position == 2 else codes[:, 0, 0]
            return codes

        codes = model.generate(prefix_codes=given, keep_depth=2, on_position=change_the_first, **GREEDY)
        assert torch.equal(codes.flatten(1, 2)[:, 3:, :2], given.flatten(1, 2)[:, 3:, :2])
        most_likely = model(codes).logits.argmax(dim=-1)
        assert torch.equal(codes.flatten(1, 2)[:, 3:, 2:], most_likely.flatten(1, 2)[:, 3:, 2:])


class TestGuidance:
    def teacher_forced(self, model, codes, ids, negative_ids, scales):
        conditional, null = model(codes, ids).logits, model(codes, negative_ids).logits
        return null + scales * (conditional - null)

    @pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
    def test_schedules_grow_over_the_positions(self, schedule):
        model, ids = tiny_transformer("class"), tiny_condition("class")
        codes = model.generate(ids, guidance_scale=3.0, guidance_schedule=schedule, **GREEDY)
        progress = torch.linspace(0, 1, T).view(1, H, W, 1, 1)
        share = {"constant": 1.0, "linear": progress, "cosine": (1 - torch.cos(math.pi * progress)) / 2}[schedule]
        null = torch.full_like(ids, model.config.null_cond_id)
        logits = self.teacher_forced(model, codes, ids, null, 1 + 2.0 * share)
        assert torch.equal(codes, logits.argmax(dim=-1))

    def test_scale_per_depth(self):
        model, ids = tiny_transformer("class"), tiny_condition("class")
        codes = model.generate(ids, guidance_scale=[1.0, 4.0, 2.0, 1.0], **GREEDY)
        null = torch.full_like(ids, model.config.null_cond_id)
        logits = self.teacher_forced(model, codes, ids, null, torch.tensor([1.0, 4.0, 2.0, 1.0])[:, None])
        assert torch.equal(codes, logits.argmax(dim=-1))

    def test_away_from_another_condition(self):
        model, ids = tiny_transformer("class"), tiny_condition("class")
        away = (ids + 1) % 3
        codes = model.generate(ids, guidance_scale=2.5, negative_cond_ids=away, **GREEDY)
        assert torch.equal(codes, self.teacher_forced(model, codes, ids, away, 2.5).argmax(dim=-1))
        assert not torch.equal(codes, model.generate(ids, guidance_scale=2.5, **GREEDY))

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"guidance_schedule": "linear"}, "guidance_schedule needs a guidance_scale other than 1"),
            ({"negative_cond_ids": torch.tensor([1])}, "negative_cond_ids .*needs a guidance_scale other than 1"),
            ({"guidance_scale": 2.0, "guidance_schedule": "steep"}, "guidance_schedule must be one of .* got 'steep'"),
            ({"guidance_scale": 2.0, "negative_cond_ids": torch.tensor([1, 2])}, r"shape \(1, 1\)"),
            ({"guidance_scale": 2.0, "negative_cond_ids": torch.tensor([99])}, "cond_ids must lie in"),
            ({"guidance_scale": [2.0, 1.0]}, "one per depth"),
        ],
    )
    def test_bad_arguments_are_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            tiny_transformer("class").generate(torch.tensor([0]), **arguments)


@kinds
def test_images_of_one_condition_share_its_prefix(kind):
    model, ids = tiny_transformer(kind), tiny_condition(kind, 2)
    ids = None if ids is None else ids.repeat_interleave(3, dim=0)[torch.tensor([0, 3, 1, 4, 2, 5])]
    rows = []
    model.spatial_stack.register_forward_pre_hook(lambda stack, args: rows.append(len(args[0])))
    codes = model.generate(ids, num_images=6, **GREEDY)
    assert rows == [1 if ids is None else 2] + [6] * (T - 1)
    assert torch.equal(codes, model(codes, ids).logits.argmax(dim=-1))


def test_on_position_sees_every_position_in_raster_order():
    model, seen = tiny_transformer(), []
    codes = model.generate(num_images=2, on_position=lambda position, codes: seen.append((position, codes.clone())))
    assert [position for position, _ in seen] == list(range(T))
    for position, so_far in seen:
        assert torch.equal(so_far.flatten(1, 2)[:, : position + 1], codes.flatten(1, 2)[:, : position + 1])
        assert not so_far.flatten(1, 2)[:, position + 1 :].any()


@pytest.mark.parametrize("kind, scale", [("none", 1.0), ("class", 2.0)])
@pytest.mark.parametrize("first_replaced", [1, 0], ids=["last position", "earlier positions too"])
def test_replaced_codes_are_continued_from(kind, scale, first_replaced):
    model, ids, other = tiny_transformer(kind), tiny_condition(kind), tiny_codes()
    settings = GREEDY | {"num_images": 2, "guidance_scale": scale}
    plain = model.generate(ids, **settings)
    other.flatten(1, 2)[:, :first_replaced] = plain.flatten(1, 2)[:, :first_replaced]
    changed = model.generate(ids, on_position=lambda i, codes: other if i == 1 else None, **settings)
    assert torch.equal(changed, model.generate(ids, prefix_codes=other, start=2, **settings))
    assert not torch.equal(changed, plain)


@pytest.mark.parametrize("returned", [True, False])
def test_codes_edited_in_place_count_when_returned(returned):
    model = tiny_transformer()

    def edit(position, codes):
        codes[:, 0, 0] = 3
        return codes if returned else None

    plain = model.generate(**GREEDY)
    codes = model.generate(on_position=edit, **GREEDY)
    edited = plain.clone()
    edited[:, 0, 0] = 3
    assert not torch.equal(edited, plain)
    assert torch.equal(codes, model.generate(prefix_codes=edited, start=1, **GREEDY) if returned else plain)


def test_replaced_codes_are_not_written_to():
    other = tiny_codes()
    before = other.clone()
    tiny_transformer().generate(num_images=2, on_position=lambda position, codes: other if position == 0 else None)
    assert torch.equal(other, before)


def test_prefix_is_not_written_to():
    prefix = tiny_codes()
    before = prefix.clone()
    tiny_transformer().generate(prefix_codes=prefix, start=2)
    assert torch.equal(prefix, before)


def test_replaced_codes_are_checked():
    with pytest.raises(ValueError, match=rf"what on_position .* returns must lie in \[0, {K}\)"):
        tiny_transformer().generate(on_position=lambda position, codes: codes + K)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_replaced_codes_of_another_batch_size_are_an_error(batch_size):
    with pytest.raises(ValueError, match=rf"what on_position .* must have the shape \(2, .*got \({batch_size}, "):
        tiny_transformer().generate(num_images=2, on_position=lambda position, codes: tiny_codes(batch_size))


SETTINGS = {
    "greedy": {"do_sample": False},
    "numbers": {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "guidance_scale": 2.0},
    "per depth": {"temperature": [1.0, 0.9, 0.8, 0.7], "top_k": [K, 9, 6, 3], "top_p": [1.0, 0.9, 0.9, 0.8]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_saved_generation_config_is_the_default(tmp_path, settings):
    model, ids = tiny_transformer("class"), torch.arange(4)
    plain = model.generate(ids, generator=seeded_generator())
    expected = model.generate(ids, generator=seeded_generator(), **settings)
    model.generation_config = GenerationConfig(**{"do_sample": True} | settings)
    model.save_pretrained(tmp_path)
    loaded = RQTransformerModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(ids, generator=seeded_generator()), expected)
    assert not torch.equal(expected, plain)


def test_generation_config_may_hold_what_changes_no_codes():
    model = tiny_transformer("class", output_hidden_states=True)
    assert model.generation_config.output_hidden_states
    harmless = GenerationConfig(do_sample=False, num_beams=1, early_stopping=False, eos_token_id=2, use_cache=True)
    ids = tiny_condition("class")
    assert torch.equal(model.generate(ids, generation_config=harmless), model.generate(ids, **GREEDY))


def test_seeds_may_be_integers_of_numpy():
    model = tiny_transformer()
    seeds = [7, 2**32 - 1]
    expected = model.generate(num_images=2, generator=seeds)
    assert torch.equal(model.generate(num_images=2, generator=list(np.array(seeds))), expected)


def test_arguments_override_the_generation_config():
    model, ids = tiny_transformer("class"), torch.arange(4)
    plain = {"do_sample": True, "temperature": 1.0, "top_k": K, "top_p": 1.0, "guidance_scale": 1.0}
    expected = model.generate(ids, generator=seeded_generator())
    model.generation_config = GenerationConfig(
        do_sample=False, temperature=0.1, top_k=2, top_p=0.5, guidance_scale=3.0
    )
    assert torch.equal(model.generate(ids, generator=seeded_generator(), **plain), expected)
    assert torch.equal(
        model.generate(ids, generation_config=GenerationConfig(**plain), generator=seeded_generator()), expected
    )
    assert not torch.equal(model.generate(ids), expected)


def test_default_settings_draw_from_the_whole_distribution():
    model = tiny_transformer(code_shape=(1, 1, 1), codebook_size=100, initializer_range=0.01)
    codes = model.generate(num_images=5000)
    assert len(codes.unique()) == 100


def test_generation_leaves_training_state_alone():
    model = tiny_transformer().train()
    codes = model.generate(num_images=2)
    assert model.training
    assert not codes.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_autocast_generation_runs():
    model = tiny_transformer("class")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = model.generate(torch.tensor([0, 1]), guidance_scale=2.0)
    assert codes.shape == (2, H, W, D)


def test_half_precision_generation_agrees_at_first():
    model = tiny_transformer()
    expected = model.generate(**GREEDY)
    codes = model.bfloat16().generate(**GREEDY)
    assert codes[0, 0, 0, 0] == expected[0, 0, 0, 0]


def test_unknown_argument_is_an_error():
    with pytest.raises(TypeError, match="max_new_tokens"):
        tiny_transformer().generate(max_new_tokens=5)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"temperature": 0.0}, ValueError, "temperature must be greater than 0.*do_sample=False is greedy"),
        ({"temperature": -1.0}, ValueError, "temperature must be greater than 0"),
        ({"temperature": math.inf}, ValueError, "temperature must be greater than 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be greater than 0"),
        ({"temperature": [1.0, 1.0, 1.0, 0.0]}, ValueError, "temperature must be greater than 0"),
        ({"temperature": [1.0] * (D - 1)}, ValueError, rf"temperature must be .* one per depth \({D}\), got {D - 1}"),
        ({"top_k": 0}, ValueError, "top_k must be an integer of at least 1"),
        ({"top_k": -1}, ValueError, "top_k must be an integer of at least 1"),
        ({"top_k": 2.5}, ValueError, "top_k must be an integer of at least 1"),
        ({"top_k": True}, ValueError, "top_k must be an integer of at least 1, got .*True"),
        ({"top_k": [1, 1, 1, True]}, ValueError, "top_k must be an integer of at least 1, got True"),
        ({"do_sample": "False"}, TypeError, "do_sample must be True or False, got 'False'"),
        ({"do_sample": 0}, TypeError, "do_sample must be True or False, got 0"),
        (
            {"generation_config": {"do_sample": False}},
            TypeError,
            r"generation_config must be a GenerationConfig of transformers, got \{'do_sample': False\}",
        ),
        ({"generation_config": "greedy"}, TypeError, "must be a GenerationConfig of transformers, got 'greedy'"),
        (
            {"generation_config": GenerationConfig(num_beams=4, max_new_tokens=1, repetition_penalty=2.0)},
            ValueError,
            "config may set do_sample, .*got {'max_new_tokens': 1, 'num_beams': 4, 'repetition_penalty': 2.0}",
        ),
        ({"generation_config": GenerationConfig(guidance=3.0)}, ValueError, "may set .*got {'guidance': 3.0}"),
        ({"top_k": [1] * (D + 1)}, ValueError, rf"top_k must be .* one per depth \({D}\), got {D + 1}"),
        ({"top_p": 0.0}, ValueError, r"top_p must lie in \(0, 1\]"),
        ({"top_p": 1.1}, ValueError, r"top_p must lie in \(0, 1\]"),
        ({"top_p": math.nan}, ValueError, r"top_p must lie in \(0, 1\]"),
        ({"top_p": [0.5]}, ValueError, rf"top_p must be .* one per depth \({D}\), got 1"),
        ({"guidance_scale": 2.0}, ValueError, "null condition"),
        ({"guidance_scale": math.nan}, ValueError, "guidance_scale must be finite"),
        ({"start": 1}, ValueError, "got no prefix_codes, start=1, keep_depth=0"),
        (
            {"prefix_codes": tiny_codes(1)},
            ValueError,
            "got prefix_codes, start=0, keep_depth=0",
        ),
        ({"prefix_codes": tiny_codes(1), "start": -1}, ValueError, rf"start must lie in \[0, {T}\].*got -1"),
        ({"prefix_codes": tiny_codes(1), "start": T + 1}, ValueError, rf"start must lie in \[0, {T}\].*got {T + 1}"),
        ({"prefix_codes": tiny_codes(1) + K, "start": 1}, ValueError, rf"codes must lie in \[0, {K}\)"),
        ({"prefix_codes": tiny_codes(1, (W, H, D)), "start": 1}, ValueError, "codes must have the shape"),
        ({"prefix_codes": tiny_codes(2), "start": 1, "num_images": 3}, ValueError, "disagree on the batch size"),
        ({"num_images": 0}, ValueError, "num_images must be at least 1"),
        ({"generator": 0}, TypeError, "a torch.Generator, or a list of them or of seeds, got 0"),
        ({"generator": [0, 1]}, ValueError, r"expected one generator per image \(1\), got 2"),
        ({"generator": [2**32]}, ValueError, r"seeds in generator must lie in \[0, 2\*\*32\), got \[4294967296\]"),
        ({"generator": [-1]}, ValueError, r"seeds in generator must lie in \[0, 2\*\*32\), got \[-1\]"),
        ({"generator": [True]}, TypeError, r"a list of them or of seeds, got \[True\]"),
    ],
)
def test_bad_arguments_are_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        tiny_transformer().generate(**arguments)


@pytest.mark.parametrize(
    "kind, arguments, message",
    [
        ("class", {}, "this model is conditional"),
        ("class", {"num_images": 2}, "this model is conditional"),
        ("class", {"cond_ids": torch.tensor([0, 1]), "num_images": 3}, "disagree on the batch size"),
        ("class", {"cond_ids": torch.tensor([0]), "prefix_codes": tiny_codes(2), "start": 1}, "on the batch size"),
        ("class", {"cond_ids": torch.tensor([5])}, r"cond_ids must lie in \[0, 5\)"),
        ("text", {"cond_ids": torch.zeros(1, L - 1, dtype=torch.long)}, rf"shape \(1, {L}\), got \(1, {L - 1}\)"),
    ],
)
def test_bad_conditions_are_errors(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer(kind).generate(**arguments)


def test_arguments_are_checked_before_any_work():
    seen = []
    with pytest.raises(ValueError, match="top_p"):
        tiny_transformer().generate(top_p=[1.0, 1.0, 1.0, 2.0], on_position=lambda *position: seen.append(position))
    assert seen == []
