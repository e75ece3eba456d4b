import io
import re

import numpy as np
import PIL.Image
import pytest
import torch
from shapes import draw_shape
from tiny import (
    CALLS,
    CONDITIONS,
    HEIGHT,
    NUM_CLASSES,
    WIDTH,
    C,
    D,
    F,
    H,
    K,
    L,
    T,
    W,
    kinds,
    tiny_codes,
    tiny_pipeline,
    tiny_tokenizer,
    tiny_transformer,
    tiny_vae,
)

from rq_hf import RQPipeline
from rq_hf.data import ImageCollator
from rq_hf.images import to_pixels

GREEDY = {"do_sample": False, "output_type": "latent"}


@pytest.fixture
def pipe():
    return tiny_pipeline()


def seeded_generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_pictures(count=2, height=HEIGHT, width=WIDTH):
    pixels = np.random.default_rng(0).integers(256, size=(count, height, width, 3), dtype=np.uint8)
    return [PIL.Image.fromarray(array) for array in pixels]


@kinds
def test_all_output_types_show_the_same_pictures(kind):
    pipe = tiny_pipeline(kind)
    draw = {t: pipe(**CALLS[kind], generator=seeded_generator(), output_type=t) for t in ("pil", "np", "pt", "latent")}
    codes = draw["latent"].codes
    count = 1 if kind == "none" else 2
    assert codes.shape == (count, H, W, D)
    assert all(torch.equal(out.codes, codes) for out in draw.values())
    assert torch.equal(draw["latent"].images, codes)

    pixels = draw["pt"].images
    assert pixels.shape == (count, 3, HEIGHT, WIDTH)
    torch.testing.assert_close(pixels, (pipe.vae.decode_codes(codes).sample / 2 + 0.5).clamp(0, 1))
    array = draw["np"].images
    assert array.shape == (count, HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(array, pixels.permute(0, 2, 3, 1), atol=1e-6)
    assert [picture.size for picture in draw["pil"].images] == [(WIDTH, HEIGHT)] * count
    for picture, values in zip(draw["pil"].images, array):
        assert picture.mode == "RGB"
        np.testing.assert_allclose(np.asarray(picture), values * 255, atol=0.51)


@pytest.mark.parametrize("kind, argument", [("class", "class_labels"), ("text", "prompt")])
def test_pictures_of_one_prompt_stand_together(kind, argument):
    pipe, (first, second) = tiny_pipeline(kind), CALLS[kind][argument]
    one, other = (pipe(**{argument: x}, **GREEDY).codes for x in (first, second))
    codes = pipe(**{argument: [first, second]}, num_images_per_prompt=3, **GREEDY).codes
    assert not torch.equal(one, other)
    assert torch.equal(codes, torch.cat([one, one, one, other, other, other]))


@pytest.mark.parametrize(
    "class_labels",
    [
        (2, 0),
        [np.int64(2), np.int32(0)],
        np.array([2, 0]),
        np.array([2, 0], dtype=np.uint8),
        torch.tensor([2, 0]),
        [torch.tensor(2), torch.tensor(0)],
    ],
    ids=["tuple", "numpy integers", "array", "bytes", "tensor", "scalar tensors"],
)
def test_class_labels_may_be_those_of_a_data_set(class_labels):
    pipe, seen = tiny_pipeline("class"), []

    def scorer(images, conditions):
        seen.append(conditions)
        return images.mean(dim=(1, 2, 3))

    expected = pipe(class_labels=[2, 0], **GREEDY).codes
    assert torch.equal(pipe(class_labels=class_labels, **GREEDY).codes, expected)
    pipe(class_labels=class_labels, num_candidates=2, scorer=scorer)
    assert seen == [[2, 2, 0, 0]]
    assert all(type(label) is int for label in seen[0])


@pytest.mark.parametrize("class_label", [np.int64(2), np.array(2), torch.tensor(2)])
def test_one_class_label_may_be_that_of_a_data_set(class_label):
    pipe = tiny_pipeline("class")
    assert torch.equal(pipe(class_labels=class_label, **GREEDY).codes, pipe(class_labels=2, **GREEDY).codes)


def test_pictures_of_one_prompt_differ():
    codes = tiny_pipeline("class")(class_labels=1, num_images_per_prompt=2, output_type="latent").codes
    assert not torch.equal(codes[0], codes[1])


def test_condition_ids_stand_for_prompts_and_labels():
    pipe = tiny_pipeline("text")
    ids, negative = pipe.encode_prompt(["red", "fire engine"]), pipe.encode_prompt(["apple", "apple"])
    expected = pipe(["red", "fire engine"], negative_prompt="apple", guidance_scale=3.0, **GREEDY).codes
    given = RQPipeline(pipe.vae, pipe.transformer)
    assert torch.equal(given(cond_ids=ids, negative_cond_ids=negative, guidance_scale=3.0, **GREEDY).codes, expected)
    pipe = tiny_pipeline("class")
    expected = pipe(class_labels=[2, 0], **GREEDY).codes
    assert torch.equal(pipe(cond_ids=torch.tensor([[2], [0]]), **GREEDY).codes, expected)


def test_prompts_are_encoded_without_a_transformer():
    pipe = tiny_pipeline("text")
    alone = RQPipeline(None, None, pipe.tokenizer)
    assert torch.equal(alone.encode_prompt(["red", "fire engine"]), pipe.encode_prompt(["red", "fire engine"]))
    with pytest.raises(ValueError, match=f"at most {L} tokens"):
        alone.encode_prompt("red apple green fire engine")
    with pytest.raises(TypeError, match="prompt must be a string or a list of strings, got 3"):
        alone.encode_prompt(3)


@kinds
def test_codes_are_those_that_generate_draws(kind):
    pipe = tiny_pipeline(kind)
    settings = {"temperature": [1.0, 0.9, 0.8, 0.7], "top_k": 9, "top_p": 0.9}
    settings["guidance_scale"] = 1.0 if kind == "none" else 2.0
    ids = None
    if kind == "class":
        ids = torch.tensor([[0], [2]])
    elif kind == "text":
        ids = pipe.encode_prompt(CALLS["text"]["prompt"])
    expected = pipe.transformer.generate(ids, generator=seeded_generator(), **settings)
    assert torch.equal(pipe(**CALLS[kind], generator=seeded_generator(), **settings).codes, expected)
    assert not torch.equal(pipe(**CALLS[kind], generator=seeded_generator()).codes, expected)


def test_settings_left_out_come_from_the_generation_config(pipe):
    pipe.transformer.generation_config.do_sample = False
    expected = pipe(**GREEDY).codes
    assert torch.equal(pipe(output_type="latent").codes, expected)


@pytest.mark.parametrize("side", ["right", "left"])
def test_prompts_are_padded_on_the_right_as_in_training(side):
    pipe = tiny_pipeline("text")
    pipe.tokenizer.padding_side = pipe.tokenizer.truncation_side = side
    ids = pipe.encode_prompt(["red", "red apple"])
    words = pipe.tokenizer(["red", "red apple"])["input_ids"]
    assert ids.tolist() == [row + [0] * (L - len(row)) for row in words]
    assert pipe.encode_prompt("red").tolist() == ids[:1].tolist()
    image = PIL.Image.new("RGB", (8, 8))
    examples = [{"text": text, "image": image} for text in ("red", "red apple")]
    collate = ImageCollator("image", 8, text_column="text", tokenizer=pipe.tokenizer)
    assert torch.equal(collate(examples)["cond_ids"], ids)


def test_a_tokenizer_without_a_padding_token_is_refused():
    pipe = tiny_pipeline("text")
    pipe.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="the tokenizer needs a padding token"):
        pipe.encode_prompt("red")


@pytest.mark.parametrize("start", [0, 2])
def test_progress_bar_counts_the_positions(pipe, start):
    shown = io.StringIO()
    pipe.set_progress_bar_config(file=shown)
    pipe(start=start, prefix_codes=tiny_codes(1) if start else None)
    assert f" {T - start}/{T - start} " in shown.getvalue()


@pytest.mark.parametrize("start", [0, 2])
def test_callback_sees_every_step(pipe, start):
    seen = []

    def callback(pipeline, step, position, tensors):
        seen.append((pipeline, step, position, tensors["codes"].clone()))
        return tensors

    codes = pipe(start=start, prefix_codes=tiny_codes(1) if start else None, callback_on_step_end=callback).codes
    assert [(p, step, position) for p, step, position, _ in seen] == [(pipe, i, start + i) for i in range(T - start)]
    for _, _, position, so_far in seen:
        assert torch.equal(so_far.flatten(1, 2)[:, : position + 1], codes.flatten(1, 2)[:, : position + 1])


def test_codes_that_the_callback_returns_are_continued_from(pipe):
    plain, other = pipe(**GREEDY).codes, tiny_codes(1)
    codes = pipe(**GREEDY, callback_on_step_end=lambda p, step, i, tensors: {"codes": other} if i == 0 else {}).codes
    assert torch.equal(codes, pipe(**GREEDY, prefix_codes=other, start=1).codes)
    assert not torch.equal(codes, plain)


def test_interrupted_image_is_a_preview_of_the_whole(pipe):
    whole = pipe(generator=[1], output_type="pt").codes.flatten(1, 2)

    def stop(pipeline, step, position, tensors):
        pipeline._interrupt = position == 3
        return tensors

    output = pipe(generator=[1], callback_on_step_end=stop, output_type="pt")
    assert torch.equal(output.codes.flatten(1, 2)[:, :4], whole[:, :4])
    assert not output.codes.flatten(1, 2)[:, 4:].any()
    assert torch.equal(output.images, pipe.decode_codes(output.codes, num_positions=4, output_type="pt"))


def test_guidance_cannot_be_switched_off_by_a_callback():
    pipe = tiny_pipeline("class")

    def switch_off(pipeline, step, position, tensors):
        assert pipeline.guidance_scale == 2.0
        pipeline._guidance_scale = 0.0
        return tensors

    with pytest.raises(ValueError, match="guidance cannot change while sampling; see guidance_schedule"):
        pipe(class_labels=1, guidance_scale=2.0, callback_on_step_end=switch_off)
    pipe.transformer.generation_config.guidance_scale = 3.0
    pipe(class_labels=1)
    assert pipe.guidance_scale == 3.0


def test_prefix_is_kept_in_the_picture(pipe):
    prefix = tiny_codes(2)
    codes = pipe(num_images_per_prompt=2, prefix_codes=prefix, start=4).codes
    assert torch.equal(codes.flatten(1, 2)[:, :4], prefix.flatten(1, 2)[:, :4])


NULL = CONDITIONS["class"]["null_cond_id"]
BAD_CALLS = [
    ("text", {"prompt": "red", "class_labels": 1}, ValueError, "either prompt or class_labels, not both"),
    ("none", {"prompt": "red"}, ValueError, "takes neither a prompt nor class_labels, got prompt='red'"),
    ("none", {"class_labels": 0}, ValueError, "takes neither a prompt nor class_labels, got class_labels=0"),
    ("class", {"prompt": "red"}, ValueError, "takes class_labels, got prompt='red'"),
    ("text", {"class_labels": 0}, ValueError, "needs a prompt"),
    ("text", {}, ValueError, "needs a prompt"),
    ("class", {}, ValueError, "needs class_labels"),
    ("class", {"class_labels": NUM_CLASSES + 1}, ValueError, rf"in \[0, {NUM_CLASSES}\), got \[5\]"),
    ("class", {"class_labels": [0, -1]}, ValueError, rf"in \[0, {NUM_CLASSES}\), got \[-1\]"),
    ("class", {"class_labels": [0, NULL]}, ValueError, rf"in \[0, {NUM_CLASSES}\), got \[{NULL}\]"),
    ("class", {"class_labels": "0"}, TypeError, "must be an integer, or a list, .*, got '0'"),
    ("class", {"class_labels": [0.0]}, TypeError, r"of integers, got \[0.0\]"),
    ("class", {"class_labels": []}, TypeError, r"of integers, got \[\]"),
    ("class", {"class_labels": True}, TypeError, "of integers, got True"),
    ("class", {"class_labels": [0, False]}, TypeError, r"of integers, got \[0, False\]"),
    ("class", {"class_labels": torch.tensor([0.0])}, TypeError, r"of integers, got tensor\(\[0.\]\)"),
    ("class", {"class_labels": np.array([[0, 1]])}, TypeError, r"of integers, got array\(\[\[0, 1\]\]\)"),
    ("class", {"class_labels": np.array([0, 5])}, ValueError, rf"in \[0, {NUM_CLASSES}\), got \[5\]"),
    ("text", {"prompt": []}, TypeError, r"string or a list of strings, got \[\]"),
    ("text", {"prompt": ["red", 1]}, TypeError, "string or a list of strings"),
    ("text", {"prompt": ("red",)}, TypeError, "string or a list of strings"),
    ("text", {"prompt": "red apple green fire engine"}, ValueError, f"at most {L} tokens, got .* 'red apple green"),
    ("none", {"output_type": "jpg"}, ValueError, "output_type must be one of .*'latent'.*, got 'jpg'"),
    ("none", {"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt must be at least 1, got 0"),
    ("none", {"top_p": 0.0}, ValueError, "top_p must lie in"),
    ("none", {"top_k": 0}, ValueError, "top_k must be an integer of at least 1"),
    ("none", {"temperature": 0.0}, ValueError, "temperature must be greater than 0"),
    ("none", {"guidance_scale": 2.0}, ValueError, "null condition"),
    ("none", {"start": T + 1}, ValueError, "start must lie in"),
    ("none", {"prefix_codes": tiny_codes(1)}, ValueError, "prefix_codes go with start > 0 or keep_depth > 0"),
    ("none", {"generator": [0, 1]}, ValueError, r"expected one generator per image \(1\), got 2"),
    (
        "class",
        {"class_labels": 0, "prefix_codes": tiny_codes(2), "start": 1},
        ValueError,
        "prefix_codes must be one map per sampled image",
    ),
    ("none", {"callback_on_step_end_tensor_inputs": ["latents"]}, ValueError, r"among \['codes'\], got \['latents'\]"),
    ("class", {"class_labels": 0, "batch_size": 2}, ValueError, "either class_labels or batch_size, not both"),
    ("class", {"batch_size": 2}, ValueError, "needs class_labels"),
    ("none", {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ("none", {"cond_ids": torch.zeros(1, 1).long()}, ValueError, "neither a prompt nor class_labels, got cond_ids"),
    ("class", {"cond_ids": [[0]]}, TypeError, "cond_ids must be a torch.Tensor, got"),
    ("class", {"cond_ids": torch.zeros(1, 1)}, TypeError, "cond_ids must be int64, got torch.float32"),
    (
        "class",
        {"cond_ids": torch.zeros(0, 1).long()},
        ValueError,
        r"must have the shape \(P, 1\), not empty, got \(0, 1\)",
    ),
    ("text", {"cond_ids": torch.zeros(1, L + 1).long()}, ValueError, rf"must have the shape \(P, {L}\)"),
    ("class", {"cond_ids": torch.tensor([[NUM_CLASSES + 1]])}, ValueError, "cond_ids must lie in"),
    ("class", {"class_labels": 0, "negative_cond_ids": torch.zeros(1, 1).long()}, ValueError, "go with cond_ids"),
    ("none", {"prefix_codes": tiny_codes(1)[:, 1:], "start": 1}, ValueError, "codes must have the shape"),
    ("none", {"num_inference_steps": 5}, TypeError, "num_inference_steps"),
]


@pytest.mark.parametrize("kind, arguments, error, message", BAD_CALLS)
def test_bad_calls_are_errors(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        tiny_pipeline(kind)(**arguments)


def test_a_prompt_without_a_tokenizer_is_an_error():
    pipe = tiny_pipeline("text")
    pipe = RQPipeline(pipe.vae, pipe.transformer)
    for call in (pipe, pipe.encode_prompt):
        with pytest.raises(ValueError, match="no tokenizer.*pass tokenizer="):
            call("red apple")
    pipe.tokenizer = tiny_tokenizer()
    assert len(pipe("red apple").images) == 1


def test_pictures_arrays_and_tensors_have_the_same_codes(pipe):
    pictures = random_pictures()
    codes = pipe.encode_image(pictures)
    arrays = np.stack([np.asarray(picture) for picture in pictures]).astype(np.float32) / 255
    tensor = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    assert torch.equal(codes, pipe.vae.get_codes(tensor * 2 - 1))
    assert not torch.equal(codes[0], codes[1])
    for image in (arrays, list(arrays), tensor, list(tensor)):
        assert torch.equal(pipe.encode_image(image), codes)
    assert torch.equal(pipe.encode_image(pictures[0]), codes[:1])
    assert torch.equal(pipe.encode_image(arrays[0]), codes[:1])
    assert torch.equal(pipe.encode_image(tensor[0]), codes[:1])


@pytest.mark.parametrize("as_tensor", [False, True], ids=["array", "tensor"])
def test_integer_pixels_are_an_error(pipe, as_tensor):
    pixels = np.stack(random_pictures())
    with pytest.raises((ValueError, TypeError), match="uint8"):
        pipe.encode_image(torch.from_numpy(pixels).permute(0, 3, 1, 2) if as_tensor else pixels)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["array", "tensor"])
@pytest.mark.parametrize(
    "value, found",
    [
        (254.0, "0 to 254"),
        (1.01, "0 to 1.01"),
        (-0.5, "-0.5 to 0"),
        (float("nan"), "nan to nan"),
        (float("inf"), "0 to inf"),
    ],
)
@pytest.mark.parametrize("method", ["encode_image", "reconstruct"])
def test_pixels_outside_the_unit_range_are_errors(pipe, method, value, found, as_tensor):
    pixels = np.zeros((2, HEIGHT, WIDTH, 3), np.float32)
    pixels[1, 0, 1, 2] = value
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2) if as_tensor else pixels
    for given in (image, list(image)):
        with pytest.raises(ValueError, match=rf"must lie in \[0, 1\], got values from {found}$"):
            getattr(pipe, method)(given)


@pytest.mark.parametrize("image", ["cat.png", (0.5,), None])
def test_what_is_no_image_is_an_error(pipe, image):
    with pytest.raises(TypeError, match="image must be a PIL image, array or tensor"):
        pipe.encode_image(image)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_pictures_of_other_modes_become_rgb(pipe, mode):
    picture = random_pictures(1)[0].convert(mode)
    assert torch.equal(pipe.encode_image(picture), pipe.encode_image(picture.convert("RGB")))


def test_transparent_parts_of_a_picture_are_white(pipe):
    opaque = random_pictures(1)[0]
    transparent, on_white = opaque.copy(), opaque.copy()
    transparent.putalpha(0)
    on_white.paste("white", (0, 0, WIDTH, HEIGHT))
    assert torch.equal(pipe.encode_image(transparent), pipe.encode_image(on_white))
    assert not torch.equal(pipe.encode_image(opaque), pipe.encode_image(on_white))


def test_pictures_need_not_have_the_size_of_the_model(pipe):
    assert pipe.encode_image(random_pictures(1, height=6, width=10)).shape == (1, 3, 5, D)


AS_INPUT = {
    "pil": lambda pictures: pictures,
    "np": lambda pictures: np.stack(pictures).astype(np.float32) / 255,
    "pt": lambda pictures: torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255,
}


@pytest.mark.parametrize("as_input", AS_INPUT.values(), ids=AS_INPUT)
@pytest.mark.parametrize("height, width", [(5, 4), (4, 7)])
@pytest.mark.parametrize("method", ["encode_image", "reconstruct"])
def test_sizes_that_the_encoder_cannot_divide_are_errors(pipe, as_input, height, width, method):
    image = as_input(random_pictures(2, height, width))
    with pytest.raises(ValueError, match=f"must be divisible by {F}"):
        getattr(pipe, method)(image)


def test_pictures_of_different_sizes_are_an_error(pipe):
    with pytest.raises(ValueError, match=r"the same size, got \[\(4, 2\), \(4, 4\)\]"):
        pipe.encode_image([PIL.Image.new("RGB", (4, 4)), PIL.Image.new("RGB", (4, 2))])


def test_resized_pictures_are_those_of_training(pipe):
    pictures = [draw_shape(n, side) for n, side in enumerate((8, 21, 40))]
    pictures[1] = pictures[1].crop((0, 3, 21, 16)).convert("RGBA")
    examples = [{"image": picture, "example_index": n} for n, picture in enumerate(pictures)]
    expected = pipe.vae.get_codes(ImageCollator("image", pipe.vae.config.sample_size)(examples)["pixels"])
    assert torch.equal(pipe.encode_image(pictures, resize=True), expected)
    assert torch.equal(pipe.encode_image(pictures[1], resize=True), expected[1:2])
    reconstructed = pipe.reconstruct(pictures, resize=True, output_type="np")
    assert np.array_equal(reconstructed, pipe.decode_codes(expected, output_type="np"))


def test_errors_about_the_size_of_pictures_name_resize(pipe):
    for pictures in ([draw_shape(0, 7)], [draw_shape(0, 8), draw_shape(0, 16)]):
        with pytest.raises(ValueError, match="resize=True"):
            pipe.encode_image(pictures)
        assert pipe.encode_image(pictures, resize=True).shape == (len(pictures), 4, 4, D)


@pytest.mark.parametrize("method", ["encode_image", "reconstruct"])
@pytest.mark.parametrize(
    ("image", "resize", "error", "message"),
    [
        (torch.rand(1, 3, 9, 9), True, TypeError, "resize=True takes PIL images, got .*Tensor"),
        (np.zeros((9, 9, 3)), True, TypeError, "resize=True takes PIL images, got .*ndarray"),
        (PIL.Image.new("RGB", (8, 8)), "crop", TypeError, "resize must be True or False, got 'crop'"),
        ([PIL.Image.new("RGB", (8, 8)), torch.rand(3, 8, 8)], False, TypeError, r"of one kind, got \['Image', 'Ten"),
        ([], False, ValueError, "got an empty list"),
        (PIL.Image.new("F", (8, 8)), False, ValueError, "32-bit floats do not say what is white"),
    ],
)
def test_images_that_cannot_be_prepared_are_errors(pipe, method, image, resize, error, message):
    with pytest.raises(error, match=message):
        getattr(pipe, method)(image, resize=resize)


@pytest.mark.parametrize("resize", [False, True])
def test_one_channel_is_grey(resize):
    vae = tiny_vae(in_channels=1, out_channels=1)
    pipe, picture = RQPipeline(vae, None), draw_shape(0, 20 if resize else 8)
    codes = pipe.encode_image(picture, resize=resize)
    assert torch.equal(codes, vae.get_codes(to_pixels(picture.convert("L"), 8)[None]))
    (grey,) = pipe.decode_codes(codes)
    assert (grey.mode, grey.size) == ("L", (8, 8))
    assert pipe.decode_codes(codes, output_type="np").shape == (1, 8, 8, 1)
    assert torch.equal(pipe.encode_image(torch.ones(1, 1, 8, 8)), vae.get_codes(torch.ones(1, 1, 8, 8)))


def test_pictures_of_four_channels_are_errors():
    vae = tiny_vae(in_channels=4, out_channels=4)
    with pytest.raises(ValueError, match=r"1 channel \(grey\) or 3 \(RGB\), got 4"):
        RQPipeline(vae, None).encode_image(PIL.Image.new("RGBA", (8, 8)))


@pytest.mark.parametrize("depth", [None, 1, D])
def test_decoded_codes_are_the_pixels_of_the_vae(pipe, depth):
    codes = tiny_codes()
    pixels = pipe.decode_codes(codes, depth=depth, output_type="pt")
    expected = pipe.vae.decode_codes(codes, depth=depth).sample
    torch.testing.assert_close(pixels, (expected / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("depth", [None, 1, D])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_reconstruction_is_encoding_and_decoding(pipe, depth, output_type):
    pictures = random_pictures()
    actual = pipe.reconstruct(pictures, depth=depth, output_type=output_type)
    expected = pipe.decode_codes(pipe.encode_image(pictures), depth=depth, output_type=output_type)
    assert type(actual) is type(expected)
    assert all(np.array_equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("output_type", ["PIL", "latent", None, 3])
def test_other_output_types_are_errors(pipe, output_type):
    message = re.escape(f"output_type must be one of ['pil', 'np', 'pt'], got {output_type!r}")
    with pytest.raises(ValueError, match=message):
        pipe.decode_codes(tiny_codes(), output_type=output_type)
    with pytest.raises(ValueError, match=message):
        pipe.reconstruct(random_pictures(), output_type=output_type)


def test_fewer_depths_give_other_pictures(pipe):
    coarse, full = (pipe.reconstruct(random_pictures(), depth=d, output_type="pt") for d in (1, D))
    assert not torch.allclose(coarse, full)


@pytest.mark.parametrize("depth", [0, D + 1])
def test_depth_outside_the_code_map_is_an_error(pipe, depth):
    with pytest.raises(ValueError, match=rf"depth must lie in \[1, {D}\], got {depth}"):
        pipe.decode_codes(tiny_codes(), depth=depth)
    with pytest.raises(ValueError, match=rf"depth must lie in \[1, {D}\], got {depth}"):
        pipe.reconstruct(random_pictures(), depth=depth)


@pytest.mark.parametrize(
    "overrides, theirs",
    [
        ({"code_shape": (H, W, D + 1)}, (D + 1, K, C, True)),
        ({"codebook_size": K + 1}, (D, K + 1, C, True)),
        ({"codebook_dim": C + 1}, (D, K, C + 1, True)),
        ({"shared_codebook": False}, (D, K, C, False)),
    ],
)
def test_vae_and_transformer_that_disagree_are_an_error(overrides, theirs):
    with pytest.raises(ValueError, match=re.escape(f"got {(D, K, C, True)} and {theirs}")):
        RQPipeline(tiny_vae(), tiny_transformer(**overrides))


@pytest.mark.parametrize("shared", [True, False])
def test_vae_and_transformer_with_different_codebooks_are_an_error(shared):
    vae, transformer = tiny_vae(shared_codebook=shared), tiny_transformer(shared_codebook=shared)
    with pytest.raises(ValueError, match="different codebooks.* call transformer.set_codebook"):
        RQPipeline(vae, transformer)
    transformer.set_codebook(vae.quantizer.codebook)
    assert RQPipeline(vae, transformer).transformer is transformer
    transformer.codebook[-1, -1, -1] += 1
    with pytest.raises(ValueError, match="different codebooks"):
        RQPipeline(vae, transformer)


def test_weights_that_are_not_in_memory_are_not_compared():
    with torch.device("meta"):
        transformer = tiny_transformer()
    assert RQPipeline(tiny_vae(), transformer).transformer is transformer
