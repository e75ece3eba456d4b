"""Arguments of unusual types: natural ones mean what they say, the others are refused by name."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    CALLS,
    C,
    D,
    K,
    kinds,
    tiny_codes,
    tiny_condition,
    tiny_config,
    tiny_pipeline,
    tiny_pixels,
    tiny_transformer,
    tiny_vae,
)

from rq_hf import RQPipeline, RQTransformerModel, RQVAEModel
from rq_hf.argument_checks import check_floating, check_number, check_size, check_source

LATENT = {"output_type": "latent"}


@pytest.mark.parametrize(
    "value, error, message",
    [
        (True, TypeError, "n must be an integer, got True"),
        ("1", TypeError, "n must be an integer, got '1'"),
        (1.0, TypeError, "n must be an integer, got 1.0"),
        (0, ValueError, "n must be at least 1, got 0"),
        (2**31, ValueError, "n must lie in .* got 2147483648"),
    ],
)
def test_sizes(value, error, message):
    check_size("n", np.int64(1))
    with pytest.raises(error, match=message):
        check_size("n", value)


@pytest.mark.parametrize(
    "value, error, message",
    [
        (True, TypeError, "x must be a number, got True"),
        ("0.5", TypeError, "x must be a number, got '0.5'"),
        (None, TypeError, "x must be a number, got None"),
        (np.ones(2), TypeError, "x must be a number"),
        (0, ValueError, "x must be greater than 0, got 0"),
        (math.nan, ValueError, "x must be greater than 0, got nan"),
        (math.inf, ValueError, "x must be greater than 0 and be finite, got inf"),
    ],
)
def test_numbers(value, error, message):
    check_number("x", np.float32(0.5), "be greater than 0")
    with pytest.raises(error, match=message):
        check_number("x", value, "be greater than 0")


@pytest.mark.parametrize(
    "value, error, message",
    [
        (np.zeros((1, 2)), TypeError, "x must be a torch.Tensor"),
        (torch.zeros(1, 2).to_sparse(), TypeError, "x must be a dense tensor"),
        (torch.zeros(1, 2, dtype=torch.int), TypeError, "x must be floating point, got torch.int32"),
        (torch.zeros(1, 3), ValueError, r"x must have the shape \(B, 2\), got \(1, 3\)"),
        (torch.zeros(2), ValueError, r"x must have the shape \(B, 2\), got \(2,\)"),
        (torch.zeros(0, 2), ValueError, r"x must have the shape \(B, 2\), not empty, got \(0, 2\)"),
    ],
)
def test_tensors(value, error, message):
    check_floating("x", torch.zeros(1, 2), "B", 2)
    check_floating("x", torch.zeros(3, 1, 2), "...", 2)
    with pytest.raises(error, match=message):
        check_floating("x", value, "B", 2)


def test_names_of_models(tmp_path):
    check_source("a model", tmp_path)
    check_source("a model", "user/name")
    for name in ("/nope", "a/b/c", ""):
        with pytest.raises(FileNotFoundError, match=f"a model must be a folder or user/name on the Hub.*'{name}'"):
            check_source("a model", name)
    with pytest.raises(TypeError, match="a model must be"):
        check_source("a model", 3)


@pytest.mark.parametrize("model", [RQPipeline, RQVAEModel, RQTransformerModel])
def test_a_folder_that_is_not_there_is_named(model):
    with pytest.raises(FileNotFoundError, match="no folder '/nope'"):
        model.from_pretrained("/nope")


@pytest.mark.parametrize("name", ["temperature", "top_p", "guidance_scale"])
@pytest.mark.parametrize("form", [tuple, np.array, torch.tensor, lambda x: np.array(x, dtype=object)])
def test_settings_per_depth_in_any_form(name, form):
    model, ids, values = tiny_transformer("class"), tiny_condition("class"), [0.25, 0.5, 0.75, 1.0]
    plain, given = (model.generate(ids, generator=[1, 2], **{name: v}) for v in (values, form(values)))
    assert torch.equal(given, plain)


@pytest.mark.parametrize("form", [np.float32, np.array, torch.tensor])
def test_one_setting_in_any_form(form):
    model, ids = tiny_transformer("class"), tiny_condition("class")
    plain, given = (model.generate(ids, generator=[1, 2], temperature=t) for t in (0.5, form(0.5)))
    assert torch.equal(given, plain)


def test_a_tiny_temperature_does_not_overflow():
    model, ids = tiny_transformer("class"), tiny_condition("class")
    assert torch.equal(model.generate(ids, temperature=1e-20), model.generate(ids, do_sample=False))
    with pytest.raises(ValueError, match=r"temperature must lie in \[1e-20, 1e\+20\], got 1e-30"):
        model.generate(ids, temperature=1e-30)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"temperature": np.ones(3)}, ValueError, r"temperature must be a number or one per depth \(4\)"),
        ({"top_k": "5"}, ValueError, "top_k must be an integer of at least 1, got '5'"),
        ({"top_p": [0.5, None, 0.5, 0.5]}, TypeError, "top_p must be a number, got None"),
        ({"guidance_scale": True}, TypeError, "guidance_scale must be a number, got True"),
        ({"num_images": True}, TypeError, "num_images must be an integer, got True"),
        ({"num_images": "2"}, TypeError, "num_images must be an integer, got '2'"),
        ({"cond_ids": [[1], [2]]}, TypeError, "cond_ids must be a torch.Tensor"),
        ({"cond_ids": torch.zeros(2, 1)}, TypeError, "cond_ids must be int64"),
        ({"cond_ids": torch.tensor(1)}, ValueError, "cond_ids must have at least one row"),
        ({"generator": [True, 2]}, TypeError, "generator must be"),
        ({"generator": [2**70, 2]}, ValueError, r"seeds in generator must lie in \[0, 2"),
        ({"on_position": 3}, TypeError, "on_position must be a function, got 3"),
        (
            {"on_position": lambda position, codes: True},
            TypeError,
            "what on_position .* returns must be a torch.Tensor",
        ),
        ({"on_position": lambda position, codes: codes[:1]}, ValueError, "what on_position .* returns must have"),
    ],
)
def test_arguments_of_generate_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        tiny_transformer("class").generate(**{"cond_ids": tiny_condition("class")} | arguments)


@kinds
def test_numpy_counts(kind):
    pipe, call = tiny_pipeline(kind), CALLS[kind] | LATENT | {"do_sample": False}
    plain = pipe(**call, num_images_per_prompt=2, max_batch_size=1).codes
    assert torch.equal(pipe(**call, num_images_per_prompt=np.int64(2), max_batch_size=np.int64(1)).codes, plain)


@pytest.mark.parametrize(
    "kind, arguments, error, message",
    [
        ("none", {"batch_size": True}, TypeError, "batch_size must be an integer, got True"),
        ("none", {"start": "1"}, TypeError, "start must be an integer, got '1'"),
        ("none", {"output_type": np.ones(2)}, ValueError, "output_type must be one of"),
        ("none", {"prefix_codes": 3, "start": 1}, TypeError, "prefix_codes must be a torch.Tensor, got 3"),
        ("none", {"callback_on_step_end": "print"}, TypeError, "callback_on_step_end must be a function"),
        (
            "none",
            {"callback_on_step_end_tensor_inputs": None},
            TypeError,
            "callback_on_step_end_tensor_inputs must be",
        ),
        (
            "none",
            {"callback_on_step_end": lambda *args: True},
            TypeError,
            "callback_on_step_end must return None or a",
        ),
        ("none", {"callback_on_step_end": lambda *args: torch.ones(2)}, TypeError, "callback_on_step_end must return"),
        ("none", {"callback_on_step_end": lambda *args: {"codes": 3}}, TypeError, "callback_on_step_end.* must be a"),
        ("none", {"scorer": 3, "num_candidates": 2}, TypeError, "scorer must be a function, got 3"),
        (
            "text",
            {"prompt": "red", "negative_prompt": "apple"},
            ValueError,
            "negative_prompt.* needs a guidance_scale",
        ),
    ],
)
def test_arguments_of_the_pipeline_are_named(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        tiny_pipeline(kind)(**arguments)


def test_components_of_other_types_are_errors():
    vae, transformer = tiny_vae(), tiny_transformer()
    for arguments, name in (
        ((transformer, None), "vae"),
        ((None, vae), "transformer"),
        ((vae, None, vae), "tokenizer"),
    ):
        with pytest.raises(TypeError, match=f"^{name} must be"):
            RQPipeline(*arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pixels_in_other_precision(dtype):
    vae, pixels = tiny_vae(), tiny_pixels().to(dtype)
    assert torch.equal(vae.get_codes(pixels), vae.get_codes(pixels.float()))
    assert torch.equal(vae(pixels).sample, vae(pixels.float()).sample)
    latents = torch.randn(2, C, 2, 3).to(dtype)
    assert torch.equal(vae.decode(latents).sample, vae.decode(latents.float()).sample)


def test_images_in_a_tuple():
    pipe, images = tiny_pipeline(), list(torch.rand(2, 3, 4, 6))
    assert torch.equal(pipe.encode_image(tuple(images)), pipe.encode_image(images))
    arrays = [image.permute(1, 2, 0).double().numpy() for image in images]
    assert torch.equal(pipe.encode_image(arrays), pipe.encode_image(images))


@pytest.mark.parametrize(
    "image, error",
    [
        ([], ValueError),
        (torch.rand(4, 6), ValueError),
        (torch.rand(1, 4, 6), ValueError),
        (torch.rand(0, 3, 4, 6), ValueError),
    ],
)
def test_what_is_no_image_is_named(image, error):
    with pytest.raises(error, match="^image must"):
        tiny_pipeline().encode_image(image)


@pytest.mark.parametrize("method", ["__call__", "encode", "get_soft_codes"])
@pytest.mark.parametrize("vectors", [torch.zeros(0, C), torch.full((2, C), math.nan), torch.full((2, C), math.inf)])
def test_vectors_without_codes_are_errors(method, vectors):
    with pytest.raises(ValueError, match="^vectors must"):
        getattr(tiny_vae().quantizer, method)(vectors)


def test_images_that_are_not_finite_are_errors():
    pipe = tiny_pipeline()
    pipe.vae.decoder.conv_out.bias.data.fill_(math.nan)
    for call in (lambda: pipe(), lambda: pipe.decode_codes(tiny_codes())):
        with pytest.raises(ValueError, match="the vae gave pixels that are NaN or infinite"):
            call()


SIZES = ["codebook_size", "codebook_dim", "cond_vocab_size", "cond_length"]
STACK_SIZES = ["hidden_size", "num_attention_heads", "intermediate_size"]


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", SIZES + STACK_SIZES)
def test_sizes_of_the_transformer(name, value):
    change = {"depth_config": {"hidden_size": 16, name: value}} if name in STACK_SIZES else {name: value}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        tiny_config(**change)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["in_channels", "out_channels", "layers_per_block", "norm_num_groups"])
def test_sizes_of_the_vae(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        tiny_vae(**{name: value})


def test_numpy_numbers_in_a_configuration_can_be_saved(tmp_path):
    vae = tiny_vae(codebook_size=np.int64(K), depth=np.int64(D), dropout=np.float64(0.5), ema_decay=np.array([0.5]))
    vae.save_pretrained(tmp_path)
    config = RQVAEModel.from_pretrained(tmp_path).config
    assert (config.codebook_size, config.depth, config.dropout, config.ema_decay) == (K, D, 0.5, [0.5])


@pytest.mark.parametrize(
    "create, file",
    [(tiny_vae, "diffusion_pytorch_model.safetensors"), (tiny_transformer, "model.safetensors")],
    ids=["vae", "transformer"],
)
def test_weights_that_are_not_those_of_the_configuration(tmp_path, create, file):
    model = create()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / file)
    name = min(weights)
    for changed, message in (
        ({n: w for n, w in weights.items() if n != name}, f"lacks weights, .*{name}"),
        (weights | {"other": torch.zeros(2)}, "has unknown weights, .*other"),
        (weights | {name: torch.zeros(3, 5, 7)}, f"{name}|do not fit its config.json"),
    ):
        save_file(changed, tmp_path / file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            type(model).from_pretrained(tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-10])
    with pytest.raises((ValueError, OSError), match=str(tmp_path)):
        type(model).from_pretrained(tmp_path)


def test_a_codebook_of_an_average_can_be_trained_by_gradient(tmp_path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path)
    loaded = RQVAEModel.from_pretrained(tmp_path, codebook_update="gradient")
    assert torch.equal(loaded.quantizer.codebook, vae.quantizer.codebook)
    with pytest.raises(ValueError, match="lacks weights, .*quantizer.cluster_size"):
        loaded.save_pretrained(tmp_path)
        RQVAEModel.from_pretrained(tmp_path, codebook_update="ema")
