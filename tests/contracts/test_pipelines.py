"""What every pipeline of the package has in common: the habits of those who use diffusers.

Another pipeline joins by a line in PIPELINES.
"""

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from accelerate import cpu_offload
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tiny import CAPTIONS, MAR_CALL, NUM_CLASSES, same_state, tiny_kl, tiny_mar_pipeline, tiny_pipeline, tiny_vae
from torch import nn
from transformers import AutoModel

import rq_hf


@dataclass(frozen=True)
class Case:
    make: Callable[[], DiffusionPipeline]
    batch: Callable[[list[int]], dict]  # arguments for images of these numbers
    lora_targets: tuple[str, ...] = ()  # none where the pipeline has no LoRA methods

    def images(self, pipe, numbers=(0, 1), **arguments):
        """The same images for the same numbers, `(B, 3, height, width)`."""
        return pipe(**{"generator": list(numbers), "output_type": "pt"} | self.batch(numbers) | arguments).images


LAYERS = ("qkv_proj", "o_proj", "up_proj", "down_proj")
LIBRARIES = {"rq_hf": rq_hf, "diffusers": diffusers, "transformers": transformers}
MAR_LAYERS = (*LAYERS, "linear_1", "linear_2", "modulation")


def classes(numbers):
    return {"class_labels": [i % NUM_CLASSES for i in numbers]}


def prompts(numbers):
    return {"prompt": [CAPTIONS[i] for i in numbers]}


def mar(kind, vae, batch):
    make = partial(tiny_mar_pipeline, kind, vae)
    return Case(make, lambda numbers: batch(numbers) | MAR_CALL, MAR_LAYERS)


PIPELINES = {
    "unconditional": Case(partial(tiny_pipeline, "none"), lambda numbers: {"batch_size": len(numbers)}, LAYERS),
    "class": Case(partial(tiny_pipeline, "class"), classes, LAYERS),
    "text": Case(partial(tiny_pipeline, "text"), prompts, LAYERS),
    "MAR, class, KL": mar("class", tiny_kl, classes),
    "MAR, text, RQ-VAE": mar("text", tiny_vae, prompts),
}


@pytest.fixture(params=PIPELINES.values(), ids=PIPELINES)
def case(request):
    return request.param


@pytest.fixture
def pipe(case):
    return case.make()


def parts_of(pipe):
    return {name: part for name, part in pipe.components.items() if part is not None}


class TestSaving:
    @pytest.mark.parametrize("by_class", [True, False], ids=["class", "DiffusionPipeline"])
    def test_round_trip(self, case, pipe, tmp_path, by_class):
        pipe.save_pretrained(tmp_path)
        loaded = (type(pipe) if by_class else DiffusionPipeline).from_pretrained(tmp_path)
        assert type(loaded) is type(pipe)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(case.images(loaded), case.images(pipe))

    def test_a_part_may_be_left_out(self, case, pipe, tmp_path):
        pipe.save_pretrained(tmp_path / "whole")
        for name in parts_of(pipe):
            without = type(pipe).from_pretrained(tmp_path / "whole", **{name: None})
            without.save_pretrained(tmp_path / name)
            for loaded in (without, DiffusionPipeline.from_pretrained(tmp_path / name)):
                assert getattr(loaded, name) is None
                with pytest.raises(ValueError, match=f"this pipeline has no {name}, .*pass {name}="):
                    case.images(loaded)

    def test_a_left_out_part_may_be_given_again(self, case, pipe, tmp_path):
        type(pipe)(**pipe.components | {"vae": None}).save_pretrained(tmp_path)
        loaded = type(pipe).from_pretrained(tmp_path, vae=pipe.vae)
        assert loaded.vae is pipe.vae
        assert torch.equal(case.images(loaded), case.images(pipe))

    def test_the_library_and_the_components_are_named(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["_class_name"] == type(pipe).__name__
        assert getattr(rq_hf, index["_class_name"]) is type(pipe)
        for name, part in parts_of(pipe).items():
            library, class_name = index[name]
            assert library in LIBRARIES
            assert name == "tokenizer" or getattr(LIBRARIES[library], class_name) is type(part)

    @pytest.mark.parametrize("wrap", [False, True], ids=["adapter", "PeftModel"])
    def test_models_that_would_lose_their_weights_are_refused(self, case, pipe, tmp_path, wrap):
        config = LoraConfig(target_modules=list(case.lora_targets))
        if wrap:
            pipe.transformer = get_peft_model(pipe.transformer, config)
        else:
            pipe.transformer.add_adapter(config)
        with pytest.raises(ValueError, match="the transformer has an adapter or is wrapped"):
            pipe.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())


class TestCall:
    def test_images_do_not_depend_on_their_batch(self, case, pipe):
        together = case.images(pipe, (0, 1, 2))
        alone = torch.cat([case.images(pipe, [i]) for i in range(3)])
        assert together.shape == alone.shape
        torch.testing.assert_close(together, alone)

    @pytest.mark.parametrize("batch", [1, 2])
    @pytest.mark.parametrize("per_prompt", [1, 2])
    def test_number_of_images(self, case, pipe, batch, per_prompt):
        assert len(pipe(**case.batch(range(batch)), num_images_per_prompt=per_prompt).images) == batch * per_prompt

    def test_output_types_hold_the_same(self, case, pipe):
        tensor = case.images(pipe)
        array, pictures = (case.images(pipe, output_type=output_type) for output_type in ("np", "pil"))
        np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
        for picture, values in zip(pictures, array, strict=True):
            np.testing.assert_allclose(np.asarray(picture), values * 255, atol=0.51)
        with pytest.raises(ValueError, match="output_type must be one of"):
            case.images(pipe, output_type="jpg")

    def test_example_of_the_card_runs(self, pipe):
        assert f"{pipe.example_call}.images" in pipe.card("user/name")
        assert len(eval(f"{pipe.example_call}.images", {"pipe": pipe})) > 0

    def test_tuple(self, case, pipe):
        arguments = case.batch([0, 1]) | {"generator": [0, 1], "output_type": "pt"}
        output, as_tuple = pipe(**arguments), pipe(**arguments, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert all(torch.equal(a, b) for a, b in zip(output.to_tuple(), as_tuple, strict=True))

    def test_generators(self, case, pipe):
        def images(generator):
            return case.images(pipe, generator=generator)

        def seeded(seed):
            return torch.Generator().manual_seed(seed)

        assert torch.equal(images(seeded(3)), images(seeded(3)))
        assert not torch.equal(images(seeded(3)), images(seeded(4)))
        assert torch.equal(images([seeded(3), seeded(4)]), images([3, 4]))
        with pytest.raises(ValueError, match=r"one generator per image \(2\), got 1"):
            images([seeded(3)])

        def without_generator():
            torch.manual_seed(5)
            return images(None)

        assert torch.equal(without_generator(), without_generator())


class Cutoff(PipelineCallback):
    tensor_inputs = []

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        self.seen = [*getattr(self, "seen", []), sorted(callback_kwargs)]
        if step_index + 1 == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
            pipeline._interrupt = True
        return callback_kwargs


class TestCallbacks:
    def test_see_every_step(self, case, pipe):
        seen = []

        def callback(pipeline, step, timestep, tensors):
            seen.append((pipeline, step, sorted(tensors)))
            return tensors

        expected = case.images(pipe)
        assert torch.equal(case.images(pipe, callback_on_step_end=callback), expected)
        default = inspect.signature(type(pipe).__call__).parameters["callback_on_step_end_tensor_inputs"].default
        assert seen == [(pipe, step, sorted(default)) for step in range(pipe.num_timesteps)]

    def test_get_the_tensors_asked_for(self, case, pipe):
        seen = []
        arguments = {"callback_on_step_end": lambda *args: seen.append(args[3]) or {}}
        case.images(pipe, **arguments, callback_on_step_end_tensor_inputs=[])
        assert seen == [{}] * pipe.num_timesteps
        with pytest.raises(ValueError, match=r"among .*, got \['nothing'\]"):
            case.images(pipe, **arguments, callback_on_step_end_tensor_inputs=["nothing"])

    def test_interrupt(self, case, pipe):
        steps, whole = [], case.images(pipe)

        def stop(pipeline, step, timestep, tensors):
            steps.append(step)
            pipeline._interrupt = step == 1
            return tensors

        images = case.images(pipe, callback_on_step_end=stop)
        assert steps == [0, 1]
        assert pipe.interrupt
        assert images.shape == whole.shape and images.isfinite().all()
        assert not torch.equal(images, whole)
        assert torch.equal(case.images(pipe), whole)
        assert not pipe.interrupt

    @pytest.mark.parametrize("together", [False, True], ids=["one", "several"])
    def test_of_diffusers(self, case, pipe, together):
        callback = Cutoff(cutoff_step_ratio=0.5)
        callback.tensor_inputs = list(pipe._callback_tensor_inputs)
        case.images(pipe, callback_on_step_end=MultiPipelineCallbacks([callback]) if together else callback)
        assert callback.seen == [sorted(pipe._callback_tensor_inputs)] * (pipe.num_timesteps // 2)


def offload_models(pipe, folder):
    pipe.enable_model_cpu_offload(device="cpu")


def offload_layers(pipe, folder):  # as enable_sequential_cpu_offload does, which needs an accelerator
    for part in parts_of(pipe).values():
        if isinstance(part, nn.Module):
            cpu_offload(part, torch.device("cpu"), offload_buffers=True)


def offload_groups(pipe, folder, to_disk=False, **options):
    path = str(folder) if to_disk else None
    pipe.enable_group_offload(torch.device("cpu"), offload_to_disk_path=path, **options)


BLOCKS = {"offload_type": "block_level", "num_blocks_per_group": 1}
OFFLOADING = {
    "models": offload_models,
    "layers": offload_layers,
    "blocks": partial(offload_groups, **BLOCKS),
    "blocks on disk": partial(offload_groups, to_disk=True, **BLOCKS),
    "leaves": partial(offload_groups, offload_type="leaf_level"),
    "leaves on disk": partial(offload_groups, to_disk=True, offload_type="leaf_level"),
}


class TestPlaces:
    @pytest.mark.parametrize("offload", OFFLOADING.values(), ids=OFFLOADING)
    def test_offloading_gives_the_same_images(self, case, pipe, tmp_path, offload):
        expected = case.images(pipe)
        offload(pipe, tmp_path)
        for _ in range(2):
            assert torch.equal(case.images(pipe), expected)

    def test_layerwise_casting_gives_the_images_of_rounded_weights(self, case, pipe):
        parts = [part for part in parts_of(pipe).values() if isinstance(part, nn.Module)]
        before = case.images(pipe)
        for part in parts:
            apply_layerwise_casting(part, torch.float8_e4m3fn, torch.float32)
        images = case.images(pipe)
        assert any(p.dtype == torch.float8_e4m3fn for part in parts for p in part.parameters())
        assert images.shape == before.shape and images.isfinite().all()

    def test_half_precision(self, case, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        for half in (
            type(pipe).from_pretrained(tmp_path, dtype=torch.bfloat16),
            type(pipe).from_pretrained(tmp_path).to(torch.bfloat16),
        ):
            assert half.transformer.dtype == half.vae.dtype == torch.bfloat16
            assert case.images(half).isfinite().all()

    def test_to_moves_and_casts_all_parts(self, case, pipe):
        expected = case.images(pipe)
        assert pipe.to("cpu") is pipe
        assert pipe.device == torch.device("cpu") and pipe.dtype == torch.float32
        assert torch.equal(case.images(pipe.to(torch.float32)), expected)


class TestCopies:
    def test_components_make_the_same_pipeline(self, case, pipe):
        signature = inspect.signature(type(pipe).__init__).parameters
        assert {"self", *pipe.components} == set(signature)
        expected = case.images(pipe)
        for copied in (type(pipe)(**pipe.components), type(pipe).from_pipe(pipe)):
            copied.set_progress_bar_config(disable=True)
            assert all(copied.components[name] is part for name, part in pipe.components.items())
            assert torch.equal(case.images(copied), expected)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
    def test_copies_are_independent(self, case, pipe, copied):
        expected, other = case.images(pipe), copied(pipe)
        assert torch.equal(case.images(other), expected)
        for parameter in other.transformer.parameters():
            parameter.data.zero_()
        assert torch.equal(case.images(pipe), expected)


class TestLora:
    @pytest.fixture(autouse=True)
    def has_lora(self, case):
        if not case.lora_targets:
            pytest.skip("no LoRA methods")

    @pytest.fixture
    def config(self, case):
        return LoraConfig(
            r=4, lora_alpha=16, lora_dropout=0.5, target_modules=list(case.lora_targets), init_lora_weights=False
        )

    @pytest.fixture
    def plain(self, case, pipe):
        return case.images(pipe)

    @pytest.fixture
    def taught(self, case, pipe, plain, config, tmp_path):
        """Images with an adapter, which was saved to `tmp_path` and removed again."""
        model = pipe.transformer
        model.add_adapter(config)
        model.eval()
        pipe.save_lora_weights(tmp_path, model.get_adapter_state_dict(), model.peft_config["default"].to_dict())
        taught = case.images(pipe)
        pipe.unload_lora_weights()
        assert not torch.equal(taught, plain)
        return taught

    def test_adapters_are_loaded_weighted_and_removed(self, case, pipe, plain, taught, tmp_path):
        assert torch.equal(case.images(pipe), plain)
        pipe.load_lora_weights(tmp_path)
        assert pipe.get_active_adapters() == ["default_0"]
        assert torch.equal(case.images(pipe), taught)
        pipe.load_lora_weights(tmp_path, adapter_name="b")
        assert pipe.get_active_adapters() == ["b"]
        assert pipe.get_list_adapters() == {"transformer": ["default_0", "b"]}
        pipe.set_adapters(["default_0", "b"], [0.25, 0.75])
        torch.testing.assert_close(case.images(pipe), taught)
        pipe.set_adapters("b", 0.0)
        assert torch.equal(case.images(pipe), plain)
        pipe.set_adapters("b")
        pipe.disable_lora()
        assert torch.equal(case.images(pipe), plain)
        pipe.enable_lora()
        assert torch.equal(case.images(pipe), taught)
        pipe.delete_adapters("default_0")
        assert pipe.get_list_adapters() == {"transformer": ["b"]}
        pipe.unload_lora_weights()
        assert pipe.get_list_adapters() == {}
        assert torch.equal(case.images(pipe), plain)

    def test_fused(self, case, pipe, plain, taught, tmp_path):
        pipe.load_lora_weights(tmp_path)
        pipe.fuse_lora()
        assert pipe.num_fused_loras == 1
        torch.testing.assert_close(case.images(pipe), taught)
        pipe.unfuse_lora()
        assert pipe.num_fused_loras == 0
        pipe.disable_lora()
        torch.testing.assert_close(case.images(pipe), plain)
        pipe.enable_lora()
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        torch.testing.assert_close(case.images(pipe), taught)
        pipe.save_pretrained(tmp_path / "fused")
        torch.testing.assert_close(case.images(type(pipe).from_pretrained(tmp_path / "fused")), taught)

    @pytest.mark.parametrize("source", ["file", "weights", "peft"])
    def test_sources(self, case, pipe, taught, config, tmp_path, source):
        if source == "file":
            pipe.load_lora_weights(tmp_path / "pytorch_lora_weights.safetensors")
        elif source == "weights":  # loaded with alpha = rank = 4, so that the saved alpha of 16 is missing
            weights = pipe.lora_state_dict(tmp_path)
            pipe.load_lora_weights({k: 4 * w if ".lora_B." in k else w for k, w in weights.items()})
        else:
            model = get_peft_model(case.make().transformer, config)
            weights = {k.removeprefix("transformer."): w for k, w in pipe.lora_state_dict(tmp_path).items()}
            set_peft_model_state_dict(model, {f"base_model.model.{k}": w for k, w in weights.items()})
            model.save_pretrained(tmp_path / "peft")
            pipe.load_lora_weights(tmp_path / "peft")
        torch.testing.assert_close(case.images(pipe), taught)

    def test_weights_of_a_peft_model_are_saved_by_their_own_names(self, case, pipe, taught, config, tmp_path):
        model = get_peft_model(case.make().transformer, config)
        pipe.save_lora_weights(tmp_path / "other", get_peft_model_state_dict(model))
        assert pipe.lora_state_dict(tmp_path / "other").keys() == pipe.lora_state_dict(tmp_path).keys()

    def test_weights_that_do_not_fit_are_refused(self, case, pipe, plain, taught, tmp_path):
        weights = pipe.lora_state_dict(tmp_path)
        first = next(iter(weights))
        for bad, message in (
            ({}, "must be named .* got none"),
            ({**weights, "unet.x.lora_A.weight": torch.zeros(1)}, r"got \['unet.x.lora_A.weight'\]"),
            ({**weights, first: weights[first][:, 1:]}, "does not fit the transformer"),
            ({k: w for k, w in weights.items() if k != first}, "does not fit the transformer"),
            ({f"transformer.x.{a}": torch.zeros(4, 4) for a in ("lora_A.weight", "lora_B.weight")}, "[Tt]arget"),
        ):
            with pytest.raises(ValueError, match=message):
                pipe.load_lora_weights(bad)
            assert pipe.get_list_adapters() == {}
            assert torch.equal(case.images(pipe), plain)
        pipe.load_lora_weights(tmp_path, adapter_name="a")
        with pytest.raises(ValueError, match="adapter_name must be new, but there is an adapter 'a'"):
            pipe.load_lora_weights(tmp_path, adapter_name="a")

    @pytest.mark.parametrize("offload", [OFFLOADING[name] for name in ("models", "blocks", "leaves")])
    def test_adapters_are_loaded_onto_offloaded_pipelines(self, case, pipe, taught, tmp_path, offload):
        offload(pipe, tmp_path)
        pipe.load_lora_weights(tmp_path)
        assert torch.equal(case.images(pipe), taught)


FRESH = """
import sys
import torch
from diffusers import DiffusionPipeline
from transformers import AutoModel

assert "rq_hf" not in sys.modules
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder + "/transformer", trust_remote_code=True)
    assert type(model) is type(pipe.transformer)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, pipe.transformer.state_dict()[name])
    pipe.save_pretrained(folder + "-again")
    model.save_pretrained(folder + "-model")
"""


class TestLoadingByName:
    def test_without_importing_the_package(self, tmp_path):
        folders = [str(tmp_path / name) for name in PIPELINES]
        for case, folder in zip(PIPELINES.values(), folders):
            case.make().save_pretrained(folder)
        env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
        fresh = subprocess.run([sys.executable, "-c", FRESH, *folders], env=env, capture_output=True, text=True)
        assert fresh.returncode == 0, fresh.stderr
        for case, folder in zip(PIPELINES.values(), folders):
            pipe = DiffusionPipeline.from_pretrained(folder)
            assert type(pipe) is type(case.make())
            assert torch.equal(case.images(DiffusionPipeline.from_pretrained(f"{folder}-again")), case.images(pipe))
            model = AutoModel.from_pretrained(f"{folder}-model")
            assert same_state(model, pipe.transformer)
            files = {path.name for path in Path(f"{folder}-model").iterdir()}
            assert files == {"config.json", "model.safetensors", "code_rq.py"} | (
                {"generation_config.json"} if model.can_generate() else set()
            )

    def test_auto_pipeline(self, case, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        for loaded in (AutoPipelineForText2Image.from_pretrained(tmp_path), AutoPipelineForText2Image.from_pipe(pipe)):
            assert type(loaded) is type(pipe)
            assert torch.equal(case.images(loaded), case.images(pipe))
