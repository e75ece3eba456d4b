"""What users of diffusers, transformers, accelerate and torch expect of a model, held by every model of the package.

A new model takes part by one line in MODELS.
"""

import copy
import json
import pickle
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import diffusers
import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from tiny import (
    MAR_CALL,
    MAR_SCALE,
    C,
    H,
    T,
    W,
    same_state,
    tiny_codes,
    tiny_condition,
    tiny_embedding,
    tiny_latents,
    tiny_mar,
    tiny_pixels,
    tiny_transformer,
    tiny_vae,
    tiny_vectors,
)
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.utils import find_labels

from rq_hf import MARTransformerModel, RQTransformerModel, RQVAEModel


class Contract(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict]  # batch size -> arguments of a training pass
    loss: Callable  # output of a training pass -> scalar
    uses: Callable  # (model, inputs) -> the results of all its public methods
    auto_classes: tuple
    accelerate: Callable | None = None  # (model) -> None, in place
    labels: tuple[str, ...] = ()  # the arguments that `transformers.Trainer` evaluates against
    float32: tuple[str, ...] = ()  # prefixes of the weights that stay so in half precision
    has_blocks: bool = True  # whose activations are worth computing again


def uses_of_vae(vae, inputs):
    pixels = inputs["pixels"]
    codes = vae.get_codes(pixels)
    latents = vae.encode(pixels).latents
    quantization = vae.quantize(latents)
    return [
        *(codes, latents, vae.encode_to_vectors(pixels), vae.embed_codes(codes), vae.decode(latents).sample),
        *(quantization.quantized, quantization.codes, vae.decode_codes(codes, depth=2).sample),
        *(*vae.get_soft_codes(pixels), *vae.quantizer.encode(vae.patchify(latents)), vae.quantizer.decode(codes)),
        *vae(pixels, return_dict=False),
    ]


def uses_of_embedding(model, inputs):
    vectors = inputs["vectors"]
    codes = model.encode(vectors)
    return [
        *(codes, model.encode(vectors, beam_size=2), model.encode(vectors, balanced=True)),
        *(model.decode(codes), model.decode(codes, depth=1), model.to_latents(vectors)),
        *model(vectors, return_dict=False),
    ]


def uses_of_transformer(model, inputs):
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    settings = {"cond_ids": inputs.get("cond_ids"), "num_images": len(inputs["codes"])}
    sampled = model.generate(**settings, generator=list(range(len(inputs["codes"]))))
    return [*model(**inputs, return_dict=False), model.generate(**settings, do_sample=False), sampled]


def inputs_of_transformer(kind, batch_size):
    codes, cond_ids = tiny_codes(batch_size), tiny_condition(kind, batch_size)
    return {"codes": codes, "labels": codes} | ({} if cond_ids is None else {"cond_ids": cond_ids})


def transformer_contract(kind):
    return Contract(
        build=partial(tiny_transformer, kind),
        inputs=partial(inputs_of_transformer, kind),
        loss=lambda output: output.loss,
        uses=uses_of_transformer,
        auto_classes=(transformers.AutoModel, diffusers.AutoModel),
        accelerate=RQTransformerModel.pack_weights,
        labels=("labels",),
    )


def uses_of_mar(model, inputs):
    latents, mask = inputs["latents"], inputs["mask"]
    settings = {"cond_ids": inputs.get("cond_ids"), "generator": list(range(len(latents)))} | MAR_CALL
    tokens = model.patchify(latents)
    return [
        *model(**inputs, return_dict=False),
        *(tokens, model.unpatchify(tokens)),
        model.generate(**settings, num_images=len(latents)) / MAR_SCALE,
        model.generate(**settings, known_latents=latents, mask=mask) / MAR_SCALE,
    ]


def inputs_of_mar(kind, batch_size):
    """With all that is random, so that the loss is not."""
    mask = torch.arange(T) < torch.arange(batch_size)[:, None] % 2 + 3  # 3 or 4 tokens
    noise, timesteps = torch.randn(2, batch_size, T, C), torch.randint(1000, (2, batch_size, T))
    inputs = {"latents": tiny_latents(batch_size), "mask": mask, "noise": noise, "timesteps": timesteps}
    cond_ids = tiny_condition(kind, batch_size)
    return inputs | ({} if cond_ids is None else {"cond_ids": cond_ids})


def mar_contract(kind):
    return Contract(
        build=partial(tiny_mar, kind),
        inputs=partial(inputs_of_mar, kind),
        loss=lambda output: output.loss,
        uses=uses_of_mar,
        auto_classes=(transformers.AutoModel, diffusers.AutoModel),
        accelerate=MARTransformerModel.pack_weights,
    )


MODELS = {
    "RQVAEModel": Contract(
        build=tiny_vae,
        inputs=lambda batch_size: {"pixels": tiny_pixels(batch_size)},
        loss=lambda output: output.sample.square().mean() + output.commitment_loss,
        uses=uses_of_vae,
        auto_classes=(diffusers.AutoModel,),
        accelerate=RQVAEModel.fuse_blocks,
        float32=("quantizer.",),
    ),
    "RQEmbeddingModel": Contract(
        build=tiny_embedding,
        inputs=lambda batch_size: {"vectors": tiny_vectors(batch_size)},
        loss=lambda output: output.sample.square().mean() + output.commitment_loss,
        uses=uses_of_embedding,
        auto_classes=(diffusers.AutoModel,),
        float32=("quantizer.", "mean", "scale"),
        has_blocks=False,
    ),
    "RQTransformerModel": transformer_contract("none"),
    "RQTransformerModel, class": transformer_contract("class"),
    "RQTransformerModel, text": transformer_contract("text"),
    "MARTransformerModel": mar_contract("none"),
    "MARTransformerModel, class": mar_contract("class"),
    "MARTransformerModel, text": mar_contract("text"),
}

models = pytest.mark.parametrize("contract", MODELS.values(), ids=MODELS)


def assert_same_results(actual, expected):
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        if e.is_floating_point():
            torch.testing.assert_close(a, e)
        else:
            assert torch.equal(a, e)


def settings_of(config):
    """The config as JSON, without what describes only a file."""
    described = ("_", "dtype", "transformers_", "architectures")
    written = json.dumps(config.to_dict() if hasattr(config, "to_dict") else dict(config))
    return json.loads(written, object_hook=lambda d: {name: d[name] for name in d if not name.startswith(described)})


SAVED = {
    "plain": ({}, {}),
    "variant": ({"variant": "small"}, {"variant": "small"}),
    "sharded": ({"max_shard_size": "10KB"}, {}),
    "sharded variant": ({"max_shard_size": "10KB", "variant": "small"}, {"variant": "small"}),
    "device map": ({}, {"device_map": "cpu"}),
}


@models
@pytest.mark.parametrize("saving, loading", SAVED.values(), ids=SAVED)
def test_saved_and_loaded_bit_for_bit(tmp_path, contract, saving, loading):
    model, inputs = contract.build().train(), contract.inputs(2)
    model(**inputs)  # moves averages
    model.eval().save_pretrained(tmp_path / "part", **saving)
    weights = [file.name for file in (tmp_path / "part").glob("*.safetensors")]
    assert (len(weights) > 1) == ("max_shard_size" in saving)
    assert all("small" in name for name in weights) == ("variant" in saving)
    assert not list(tmp_path.rglob("*.bin"))
    for loader in (type(model), *contract.auto_classes):
        loaded = loader.from_pretrained(str(tmp_path), subfolder="part", **loading)
        assert type(loaded) is type(model)
        assert not loaded.training
        assert same_state(loaded, model)
        assert settings_of(loaded.config) == settings_of(model.config)
        for (name, buffer), expected in zip(loaded.named_buffers(), model.buffers(), strict=True):
            assert torch.equal(buffer, expected), name
    assert_same_results(contract.uses(loaded, inputs), contract.uses(model, inputs))


@models
def test_half_precision_leaves_in_float32_what_must_be(tmp_path, contract):
    model, inputs = contract.build(), contract.inputs(2)
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, weight in half.state_dict().items():
        assert weight.dtype == (torch.float32 if name.startswith(contract.float32) else torch.bfloat16), name
        torch.testing.assert_close(weight, model.state_dict()[name].to(weight.dtype), rtol=0, atol=0)
    inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    assert contract.loss(half(**inputs)).isfinite()


@models
def test_output_is_a_mapping_or_a_tuple(contract):
    model, inputs = contract.build(), contract.inputs(2)
    output, as_tuple = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert_same_results(as_tuple, output.to_tuple())
    assert_same_results(output.values(), as_tuple)
    if hasattr(model.config, "return_dict"):
        model.config.return_dict = False
        assert_same_results(model(**inputs), as_tuple)


def copies_of(model):
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))


@models
def test_copied_and_pickled(contract):
    model, inputs = contract.build(), contract.inputs(2)
    for copied in copies_of(model):
        assert same_state(copied, model)
        assert_same_results(contract.uses(copied, inputs), contract.uses(model, inputs))
        copied.requires_grad_(False)
        next(copied.parameters()).zero_()
        assert not same_state(copied, model)


@pytest.mark.parametrize("name", [name for name, contract in MODELS.items() if contract.accelerate])
def test_accelerated_then_copied_and_pickled(name):
    contract = MODELS[name]
    model, inputs = contract.build(), contract.inputs(2)
    expected = contract.uses(model, inputs)
    contract.accelerate(model)
    for copied in copies_of(model):
        assert same_state(copied, model)
        assert_same_results(contract.uses(copied, inputs), expected)


CPU = torch.device("cpu")


def with_device_map(model, folder):
    """Every second part on disk."""
    model.save_pretrained(folder / "saved")
    own = (*model.named_parameters(recurse=False), *model.named_buffers(recurse=False))
    device_map = {name: "cpu" for name, _ in own}
    device_map |= {name: ("cpu", "disk")[i % 2] for i, (name, _) in enumerate(model.named_children())}
    return type(model).from_pretrained(
        folder / "saved", device_map=device_map, offload_folder=str(folder / "offload"), offload_buffers=True
    )


def in_groups(offload_type):
    """Memory of tensors whose group is on disk holds no values."""

    def offload(model, folder):
        enable = getattr(model, "enable_group_offload", partial(apply_group_offloading, model))
        enable(
            onload_device=CPU,
            offload_type=offload_type,
            num_blocks_per_group=1,
            offload_to_disk_path=str(folder),
        )

    return offload


OFFLOADS = {
    "memory": lambda model, folder: cpu_offload(model, CPU, offload_buffers=True),
    "disk": lambda model, folder: disk_offload(model, folder, CPU, offload_buffers=True),
    "device map": with_device_map,
    "blocks on disk": in_groups("block_level"),
    "leaves on disk": in_groups("leaf_level"),
}


@pytest.fixture
def no_leftovers():
    """Memory that was never written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@models
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_offloaded_gives_the_same(tmp_path, no_leftovers, contract, offload):
    model, inputs = contract.build(), contract.inputs(2)
    expected = [*contract.uses(model, inputs), contract.loss(model(**inputs))]
    model = offload(model, tmp_path) or model
    for _ in range(2):
        assert_same_results(contract.uses(model, inputs), expected[:-1])
        torch.testing.assert_close(contract.loss(model(**inputs)), expected[-1])


@models
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_weights_in_groups_on_disk_cannot_be_saved(tmp_path, contract, offload_type):
    model = contract.build()
    in_groups(offload_type)(model, tmp_path / "offload")
    with pytest.raises(ValueError, match="cannot be saved while its weights are offloaded to disk"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@models
def test_weights_may_be_stored_in_8_bits(contract):
    model, inputs = contract.build(), contract.inputs(2)
    rounded = copy.deepcopy(model)
    cast = getattr(model, "enable_layerwise_casting", partial(apply_layerwise_casting, model))
    cast(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name for name, weight in model.named_parameters() if weight.dtype == torch.float8_e4m3fn}
    assert stored and not any(name.startswith(contract.float32) for name in stored)
    rounded.load_state_dict(model.state_dict())
    assert_same_results(contract.uses(model, inputs), contract.uses(rounded, inputs))
    torch.testing.assert_close(contract.loss(model(**inputs)), contract.loss(rounded(**inputs)))


def training_step(model, contract, inputs):
    """The gradients of one step, and the bytes that were kept for them."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        loss = contract.loss(model(**inputs))
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}, sum(kept)


@pytest.mark.parametrize("name", [name for name, contract in MODELS.items() if contract.has_blocks])
def test_gradient_checkpointing_saves_memory_and_keeps_gradients(name):
    contract = MODELS[name]
    plain, inputs = contract.build().train(), contract.inputs(4)
    checkpointed = copy.deepcopy(plain)
    if hasattr(checkpointed, "enable_gradient_checkpointing"):
        checkpointed.enable_gradient_checkpointing()
    else:
        checkpointed.gradient_checkpointing_enable()
    torch.manual_seed(1)
    expected, kept = training_step(plain, contract, inputs)
    torch.manual_seed(1)
    actual, kept_checkpointed = training_step(checkpointed, contract, inputs)
    assert kept_checkpointed < kept / 2
    assert actual.keys() == expected.keys() and len(expected) > 10
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])
    assert same_state(checkpointed, plain)


@pytest.mark.parametrize("name", ["RQVAEModel", "RQTransformerModel, text"])
def test_exported_with_any_batch_size(name):
    contract = MODELS[name]
    model, inputs, others = contract.build(), contract.inputs(3), contract.inputs(7)
    batch = torch.export.Dim("batch", max=32)
    shapes = {name: {0: batch} for name in inputs}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    assert_same_results(tree_leaves(exported(**others)), tree_leaves(model(**others)))


@models
def test_trainer_finds_the_labels(contract):
    assert tuple(find_labels(type(contract.build()))) == contract.labels


@pytest.mark.parametrize("name", [name for name, contract in MODELS.items() if contract.labels])
def test_trainer_trains_and_evaluates(tmp_path, name):
    contract = MODELS[name]
    model, inputs = contract.build(), contract.inputs(8)
    initial_loss = contract.loss(model(**inputs)).item()
    examples = [{name: value[i] for name, value in inputs.items()} for i in range(8)]
    arguments = {"output_dir": tmp_path, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_total_limit": 1}
    often = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 4}
    arguments = transformers.TrainingArguments(
        **arguments, **often, **sizes, num_train_epochs=2, learning_rate=0.01, metric_for_best_model="eval_loss"
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=examples, eval_dataset=examples)
    trainer.train()
    loss = contract.loss(model(**inputs)).item()
    assert loss < initial_loss
    assert trainer.state.best_metric == pytest.approx(loss, rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert trainer.predict(examples).metrics["test_loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("name", [name for name, contract in MODELS.items() if contract.labels])
def test_trainer_accumulates_the_gradient_of_the_whole_batch(tmp_path, name):
    contract = MODELS[name]
    model, inputs = contract.build(), contract.inputs(4)
    examples = [{name: value[i] for name, value in inputs.items()} for i in range(4)]
    trained = []
    for batch_size in (4, 2):
        arguments = transformers.TrainingArguments(
            **{"output_dir": tmp_path, "use_cpu": True, "report_to": [], "disable_tqdm": True, "optim": "sgd"},
            **{"save_strategy": "no", "max_steps": 1, "learning_rate": 1.0, "max_grad_norm": 0.0},
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
        )
        trainer = transformers.Trainer(copy.deepcopy(model), arguments, train_dataset=examples)
        trainer.train()
        trained.append(trainer.model)
    for (name, expected), actual in zip(trained[0].named_parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(actual, expected, msg=name)


def test_trainer_trains_and_evaluates_where_the_loss_is_random(tmp_path):
    contract = MODELS["MARTransformerModel, text"]
    model, inputs = contract.build(), contract.inputs(8) | {"latents": torch.randn(8, C, H, W)}
    initial_loss = contract.loss(model(**inputs)).item()
    examples = [{"latents": inputs["latents"][i], "cond_ids": inputs["cond_ids"][i]} for i in range(8)]
    arguments = {"output_dir": tmp_path, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(
        **arguments, eval_strategy="epoch", num_train_epochs=4, learning_rate=0.01, label_names=["latents"]
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=examples, eval_dataset=examples)
    trainer.train()
    assert contract.loss(model(**inputs)).item() < initial_loss
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 4 and max(losses) < 2 * initial_loss


def test_attention_is_chosen_for_all_stacks(caplog):
    model = tiny_mar()
    with caplog.at_level("WARNING"):
        model.set_attn_implementation("eager")
    assert not caplog.records
    assert {stack.config._attn_implementation for stack in (model, model.encoder, model.decoder)} == {"eager"}
    model.set_attn_implementation({"decoder_config": "sdpa"})
    assert model.encoder.layers[0].self_attn.config._attn_implementation == "eager"
    assert model.decoder.layers[0].self_attn.config._attn_implementation == "sdpa"
