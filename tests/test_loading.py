import importlib.metadata
import json
import os
import re
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import (
    CALLS,
    HEIGHT,
    WIDTH,
    K,
    kinds,
    same_state,
    tiny_codes,
    tiny_pipeline,
    tiny_tokenizer,
    tiny_transformer,
)
from transformers import AutoModel, GenerationConfig

import rq_hf
from rq_hf import RQPipeline, RQTransformerModel

MODELS = {"vae": ["rq_hf", "RQVAEModel"], "transformer": ["rq_hf", "RQTransformerModel"]}

loaders = pytest.mark.parametrize("loader", [RQPipeline, DiffusionPipeline])


def draw(pipe, kind):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**CALLS[kind], generator=torch.Generator().manual_seed(0), output_type="pt")


def assert_same_pipeline(loaded, pipe, kind):
    assert type(loaded) is RQPipeline
    assert same_state(loaded.vae, pipe.vae)
    assert same_state(loaded.transformer, pipe.transformer)
    assert not loaded.vae.training
    assert not loaded.transformer.training
    actual, expected = draw(loaded, kind), draw(pipe, kind)
    assert torch.equal(actual.codes, expected.codes)
    assert torch.equal(actual.images, expected.images)


@pytest.mark.parametrize("kind, tokenizer", [("text", ["transformers", "TokenizersBackend"]), ("class", [None, None])])
def test_model_index_names_components_by_their_public_names(tmp_path, kind, tokenizer):
    tiny_pipeline(kind).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.pop("_diffusers_version") == diffusers.__version__
    assert index == {"_class_name": "RQPipeline", **MODELS, "tokenizer": tokenizer}


def test_config_files_name_their_classes(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    vae, transformer = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("vae", "transformer"))
    assert vae["_class_name"] == "RQVAEModel"
    assert transformer["architectures"] == ["RQTransformerModel"]
    assert transformer["model_type"] == "rq_transformer"


SAVED = {
    "plain": ({}, {}),
    "sharded": ({"max_shard_size": "10KB"}, {}),
    "variant": ({"variant": "small"}, {"variant": "small"}),
    "sharded variant": ({"max_shard_size": "10KB", "variant": "small"}, {"variant": "small"}),
    "device map": ({}, {"device_map": "cpu"}),
}


@kinds
@loaders
@pytest.mark.parametrize("saving, loading", SAVED.values(), ids=SAVED)
def test_loaded_pipeline_draws_the_same(tmp_path, kind, loader, saving, loading):
    pipe = tiny_pipeline(kind)
    pipe.save_pretrained(tmp_path, **saving)
    shards = list(tmp_path.glob("*/*-00001-of-*.safetensors"))
    assert len(shards) == (2 if "max_shard_size" in saving else 0)
    assert all("small" in file.name for file in tmp_path.glob("*/*.safetensors")) == ("variant" in saving)
    assert_same_pipeline(loader.from_pretrained(tmp_path, **loading), pipe, kind)


@loaders
@pytest.mark.parametrize(
    "dtype, vae_dtype, transformer_dtype",
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ({"transformer": torch.bfloat16, "default": torch.float32}, torch.float32, torch.bfloat16),
        ({"vae": torch.bfloat16, "default": torch.float32}, torch.bfloat16, torch.float32),
    ],
    ids=["all", "transformer", "vae"],
)
def test_half_precision_loads_and_draws(tmp_path, loader, dtype, vae_dtype, transformer_dtype):
    pipe = tiny_pipeline("class")
    pipe.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.vae.encoder.conv_in.weight.dtype == vae_dtype
    assert loaded.transformer.classifier.weight.dtype == transformer_dtype
    assert torch.equal(loaded.vae.quantizer.codebook, pipe.vae.quantizer.codebook)
    out = draw(loaded, "class")
    assert out.images.shape == draw(pipe, "class").images.shape
    assert out.images.isfinite().all()
    assert torch.equal(loaded.encode_image(out.images), loaded.vae.get_codes((out.images * 2 - 1).to(vae_dtype)))


@loaders
def test_text_pipeline_without_tokenizer_takes_one_when_loading(tmp_path, loader):
    pipe = tiny_pipeline("text")
    RQPipeline(pipe.vae, pipe.transformer).save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert loaded.tokenizer is None
    with pytest.raises(ValueError, match="no tokenizer"):
        loaded("red apple")
    assert_same_pipeline(loader.from_pretrained(tmp_path, tokenizer=tiny_tokenizer()), pipe, "text")


@loaders
def test_components_may_be_passed(tmp_path, loader):
    saved, other = tiny_pipeline(), tiny_pipeline()
    other.vae.quantizer.load_state_dict(saved.vae.quantizer.state_dict())
    saved.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path, vae=other.vae)
    assert loaded.vae is other.vae
    assert same_state(loaded.transformer, saved.transformer)
    assert not same_state(loaded.vae, saved.vae)


def test_pipeline_without_a_transformer_encodes_and_decodes(tmp_path):
    whole, pixels = tiny_pipeline("class"), torch.rand(2, 3, HEIGHT, WIDTH)
    whole.save_pretrained(tmp_path)
    pipe = RQPipeline.from_pretrained(tmp_path, transformer=None, tokenizer=tiny_tokenizer())
    assert pipe.transformer is None
    codes = pipe.encode_image(pixels)
    assert torch.equal(codes, whole.encode_image(pixels))
    assert torch.equal(pipe.decode_codes(codes, output_type="pt"), whole.decode_codes(codes, output_type="pt"))
    assert torch.equal(pipe.reconstruct(pixels, output_type="pt"), whole.reconstruct(pixels, output_type="pt"))
    pipe.compile()
    assert torch.equal(pipe.encode_image(pixels), codes)
    message = "no transformer, which this call needs: pass transformer= when loading it"
    for call in (lambda: pipe(class_labels=1), lambda: pipe.is_class_conditional):
        with pytest.raises(ValueError, match=message):
            call()


@kinds
def test_pipeline_without_a_vae_samples_codes(tmp_path, kind):
    whole = tiny_pipeline(kind)
    whole.save_pretrained(tmp_path)
    pipe = RQPipeline.from_pretrained(tmp_path, vae=None)
    assert pipe.vae is None
    call = {**CALLS[kind], "output_type": "latent", "do_sample": False}
    assert torch.equal(pipe(**call).images, whole(**call).codes)
    pipe.compile()
    assert torch.equal(pipe(**call).images, whole(**call).codes)
    message = "no vae, which this call needs: pass vae= when loading it"
    for refused in (
        lambda: pipe(**CALLS[kind]),
        lambda: pipe(**call, num_candidates=2, scorer=lambda images, conditions: images.mean(dim=(1, 2, 3))),
        lambda: pipe.encode_image(torch.rand(1, 3, HEIGHT, WIDTH)),
        lambda: pipe.decode_codes(tiny_codes()),
        lambda: pipe.reconstruct(torch.rand(1, 3, HEIGHT, WIDTH)),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def test_component_that_does_not_fit_is_an_error(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vae and transformer must have the same"):
        RQPipeline.from_pretrained(tmp_path, transformer=tiny_transformer(codebook_size=K + 1))


def test_component_with_another_codebook_is_an_error(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="different codebooks.* call transformer.set_codebook"):
        RQPipeline.from_pretrained(tmp_path, transformer=tiny_transformer())


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
def test_codebooks_may_differ_by_rounding(tmp_path, saved, loaded):
    pipe = tiny_pipeline()
    pipe.transformer.to(saved)
    pipe.save_pretrained(tmp_path)
    half = RQPipeline.from_pretrained(tmp_path, dtype={"transformer": loaded, "default": torch.float32})
    assert half.transformer.codebook.dtype == loaded
    assert RQPipeline(half.vae.to(torch.bfloat16), half.transformer).transformer is half.transformer


@kinds
@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_pipeline_loads_with_a_device_map(tmp_path, kind, device_map):
    pipe = tiny_pipeline(kind)
    pipe.save_pretrained(tmp_path)
    assert_same_pipeline(RQPipeline.from_pretrained(tmp_path, device_map=device_map), pipe, kind)


def test_generation_config_is_saved_with_the_pipeline(tmp_path):
    pipe = tiny_pipeline("class")
    pipe.transformer.generation_config.update(do_sample=True, top_k=2, guidance_scale=3.0)
    pipe.save_pretrained(tmp_path)
    assert_same_pipeline(RQPipeline.from_pretrained(tmp_path), pipe, "class")
    pipe.transformer.generation_config.update(top_k=12)
    assert not torch.equal(draw(RQPipeline.from_pretrained(tmp_path), "class").codes, draw(pipe, "class").codes)


@pytest.mark.parametrize("content", ["", '{"do_sample": tr', "[]"])
def test_broken_generation_config_is_an_error(tmp_path, content):
    tiny_pipeline().save_pretrained(tmp_path)
    file = tmp_path / "transformer" / "generation_config.json"
    file.write_text(content)
    for load in (
        lambda: RQPipeline.from_pretrained(tmp_path),
        lambda: RQTransformerModel.from_pretrained(tmp_path / "transformer"),
        lambda: AutoModel.from_pretrained(tmp_path, subfolder="transformer"),
    ):
        with pytest.raises(ValueError, match=re.escape(str(file))):
            load()
    given = GenerationConfig(do_sample=False)
    loaded = RQTransformerModel.from_pretrained(tmp_path / "transformer", generation_config=given)
    assert loaded.generation_config.do_sample is False


def test_generation_config_may_be_missing(tmp_path):
    pipe = tiny_pipeline("class")
    pipe.save_pretrained(tmp_path)
    (tmp_path / "transformer" / "generation_config.json").unlink()
    assert_same_pipeline(RQPipeline.from_pretrained(tmp_path), pipe, "class")


def test_version_is_that_of_the_distribution():
    assert rq_hf.__version__ == importlib.metadata.version("rq_hf")


def test_registering_twice_is_harmless(tmp_path):
    rq_hf.register()
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    assert_same_pipeline(DiffusionPipeline.from_pretrained(tmp_path), pipe, "none")


OFFLINE_SCRIPT = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError(f"network: {args}")

socket.socket.connect = socket.getaddrinfo = refuse
import rq_hf
loaded = set(sys.modules)
pipe = rq_hf.RQPipeline.from_pretrained(sys.argv[1])
pipe(class_labels=0)
heavy = {"datasets", "diffusers.pipelines.auto_pipeline", "evaluate", "rq_hf.data", "rq_hf.training", "torchvision"}
print(*sorted(heavy & loaded))
"""


def test_import_and_local_loading_need_no_network_and_no_training_libraries(tmp_path):
    tiny_pipeline("class").save_pretrained(tmp_path)
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE_SCRIPT, tmp_path], env=env, check=True, capture_output=True, text=True
    )
    assert result.stdout.split() == []
