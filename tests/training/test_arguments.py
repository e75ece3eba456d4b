import json
import math
import re
import runpy
import sys
from dataclasses import fields

import pytest
import torch
from processes import run_script
from scripts import CLASSES, EXAMPLES, RQVAE, TEXT
from tiny import tiny_vae
from torch import nn

from rq_hf.data import ImageCollator, LatentCollator, write_description
from rq_hf.training import (
    AutoencoderArguments,
    ClassArguments,
    LossArguments,
    RunArguments,
    TextArguments,
    TrainingDataArguments,
    TransformerArguments,
    ValidationArguments,
    parse_arguments,
)
from rq_hf.training.arguments import MAY_CHANGE, MAY_CHANGE_UNLESS_STREAMING, PRESETS, describe_changes


class TestRunArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"push_to_hub": True}, "--push_to_hub needs --hub_model_id"),
            ({"max_train_steps": 0}, "--max_train_steps must be at least 1, got 0"),
            ({"train_batch_size": 0}, "--train_batch_size must be at least 1"),
            ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps must be at least 1"),
            ({"checkpointing_steps": 0}, "--checkpointing_steps must be at least 1"),
            ({"checkpoints_total_limit": 0}, "--checkpoints_total_limit must be at least 1"),
            ({"logging_steps": 0}, "--logging_steps must be at least 1"),
            ({"ema_decay": 1.0}, r"--ema_decay must lie in \[0, 1\), got 1.0"),
            ({"ema_decay": -0.1}, "--ema_decay"),
            ({"peak_teraflops": 0.0}, "--peak_teraflops must be greater than 0, got 0.0"),
            ({"max_grad_norm": -1.0}, "--max_grad_norm must be at least 0, got -1.0"),
            ({"max_grad_norm": math.nan}, "--max_grad_norm must be at least 0, got nan"),
            ({"lr_warmup_steps": -5}, "--lr_warmup_steps must be at least 0, got -5"),
            ({"weight_decay": -1.0}, "--weight_decay must be at least 0, got -1.0"),
            ({"learning_rate": 0.0}, "--learning_rate must be greater than 0, got 0.0"),
            ({"learning_rate": math.nan}, "--learning_rate must be greater than 0, got nan"),
            ({"learning_rate": math.inf}, "--learning_rate must be greater than 0 and be finite, got inf"),
            ({"adam_beta1": 1.0}, r"--adam_beta1 must lie in \[0, 1\), got 1.0"),
            ({"adam_beta2": -0.5}, r"--adam_beta2 must lie in \[0, 1\), got -0.5"),
            ({"image_logging_steps": -1}, "--image_logging_steps must be at least 0, got -1"),
            ({"hub_model_id": "name"}, "--hub_model_id must be user/name, .*got 'name'"),
            ({"hub_model_id": "user/two words"}, "--hub_model_id must be user/name, .*got 'user/two words'"),
        ],
    )
    def test_out_of_range_is_an_error_that_names_the_option(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            RunArguments("somewhere", **arguments)

    def test_create_the_optimizer(self):
        run = RunArguments("somewhere", learning_rate=0.25, adam_beta1=0.5, adam_beta2=0.75, weight_decay=0.125)
        group = run.create_optimizer(nn.Linear(1, 1)).param_groups[0]
        assert (group["lr"], group["betas"], group["weight_decay"]) == (0.25, (0.5, 0.75), 0.125)


class TestOptionsOfAResumedRun:
    def test_that_may_change_exist(self):
        classes = (RunArguments, TrainingDataArguments, TransformerArguments, ValidationArguments)
        classes += (TextArguments, ClassArguments)
        names = {option.name for arguments in classes for option in fields(arguments)}
        for script in EXAMPLES.glob("train_*.py"):
            names |= set(re.findall(r"^    (\w+): .*field\(", script.read_text(), flags=re.MULTILINE))
        assert names > {*MAY_CHANGE, *MAY_CHANGE_UNLESS_STREAMING}

    def test_others_are_refused_and_named(self):
        saved = {"resolution": 8, "labels": "soft", "streaming": True, "logging_steps": 5, "seed": 0}
        assert describe_changes(saved, saved) == ""
        assert describe_changes(saved, saved | {"logging_steps": 1}) == ", with --logging_steps 1 (was 5)"
        for name, value in {"resolution": 16, "labels": "hard", "streaming": False, "seed": 1}.items():
            with pytest.raises(ValueError, match=f"another run: --{name} was {saved[name]!r}, got {value!r}"):
                describe_changes(saved, saved | {name: value})

    def test_the_number_of_workers_decides_only_in_a_stream(self):
        saved = {"streaming": False, "dataloader_num_workers": 0}
        describe_changes(saved, saved | {"dataloader_num_workers": 2})
        saved["streaming"] = True
        with pytest.raises(ValueError, match="--dataloader_num_workers was 0, got 2"):
            describe_changes(saved, saved | {"dataloader_num_workers": 2})

    def test_of_another_version_are_mentioned(self):
        assert describe_changes({"old": 1}, {"new": 2}) == "; only one version of rq_hf knows 'new', 'old'"

    def test_are_in_the_help(self):
        (option,) = (option for option in fields(RunArguments) if option.name == "resume_from_checkpoint")
        assert all(f"--{name}" in option.metadata["help"] for name in (*MAY_CHANGE, *MAY_CHANGE_UNLESS_STREAMING))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"labels": "none"}, "--labels must be hard or soft, got 'none'"),
        ({"soft_label_temperature": 0.0}, "--soft_label_temperature must be greater than 0, got 0.0"),
        ({"soft_label_temperature": math.nan}, "--soft_label_temperature must be greater than 0, got nan"),
        ({"hidden_size": 0}, "--hidden_size must be at least 1, got 0"),
        ({"num_attention_heads": 0}, "--num_attention_heads must be at least 1, got 0"),
        ({"spatial_layers": 0}, "--spatial_layers must be at least 1, got 0"),
        ({"depth_layers": -1}, "--depth_layers must be at least 0, got -1"),
        ({"hidden_dropout": 1.5}, r"--hidden_dropout must lie in \[0, 1\), got 1.5"),
        ({"cond_dropout": 1.0}, r"--cond_dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_transformer_arguments_out_of_range_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        TransformerArguments(rqvae="vae", **arguments)


@pytest.mark.parametrize("name, value", [("shuffle_buffer_size", 0), ("dataloader_num_workers", -1)])
def test_data_arguments_out_of_range_are_errors(name, value):
    with pytest.raises(ValueError, match=f"--{name} must be at least {value + 1}, got {value}"):
        TrainingDataArguments(**{name: value})


class TestLatentsOption:
    """`--latents` instead of images."""

    @pytest.fixture
    def vae(self):
        return tiny_vae()

    @pytest.mark.parametrize(
        ("option", "value"),
        [("dataset_name", "user/images"), ("data_files", "*.tar"), ("random_flip", True), ("center_crop", False)],
    )
    def test_refuses_options_of_images(self, vae, option, value):
        with pytest.raises(ValueError, match=f"--{option} applies to images"):
            TransformerArguments(rqvae="vae", latents="latents").load_dataset(
                vae, TrainingDataArguments(**{option: value})
            )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_collates_latents(self, vae, tmp_path, dtype):
        write_description(tmp_path, vae, dtype)
        data = TrainingDataArguments(random_flip=False)
        collate = TransformerArguments(rqvae="vae", latents=tmp_path).create_collator(vae, data, label_column="label")
        assert isinstance(collate, LatentCollator)
        assert (collate.dtype, collate.label_column) == (dtype, "label")

    def test_left_out_collates_images_of_the_size_of_the_rqvae(self, vae):
        data = TrainingDataArguments(image_column="img", random_flip=True, center_crop=False)
        collate = TransformerArguments(rqvae="vae").create_collator(vae, data, label_column="label")
        assert isinstance(collate, ImageCollator)
        assert (collate.image_column, collate.resolution, collate.label_column) == ("img", 8, "label")
        assert (collate.random_flip, collate.center_crop) == (True, False)


class TestPresets:
    @pytest.mark.parametrize("path", sorted(PRESETS.glob("*.json")), ids=lambda path: path.stem)
    def test_gives_defaults_that_options_override(self, path, monkeypatch):
        expected = json.loads(path.read_text())["transformer"]
        command = ["--preset", path.stem, "--rqvae", "somewhere", "--output_dir", "runs", "--learning_rate", "0.25"]
        monkeypatch.setattr(sys, "argv", ["script", *command])
        run, args = parse_arguments(
            RunArguments, TransformerArguments, description="", sections=("transformer",), hidden_size=1
        )
        values = vars(run) | vars(args)
        assert {name: values[name] for name in expected} == expected | {"learning_rate": 0.25}

    @pytest.mark.parametrize("path", sorted(PRESETS.glob("*.json")), ids=lambda path: path.stem)
    def test_has_options_of_the_scripts_only(self, path):
        preset, rqvae = json.loads(path.read_text()), runpy.run_path(RQVAE)
        mar = runpy.run_path(EXAMPLES / "train_mar.py")
        scripts = {
            "autoencoder": (RunArguments, AutoencoderArguments, LossArguments),
            "rqvae": (rqvae["RQVAEArguments"],),
            "transformer": (RunArguments, TransformerArguments),
            "mar": (RunArguments, mar["MARArguments"]),
            "text": (TextArguments,),
        }
        assert preset.keys() == scripts.keys()
        for section, classes in scripts.items():
            assert preset[section].keys() <= {option.name for arguments in classes for option in fields(arguments)}

    @pytest.mark.parametrize(
        "script, option", [(RQVAE, "codebook_size int"), (TEXT, "text_length int"), (CLASSES, "hidden_size int")]
    )
    def test_shows_its_defaults_in_the_help_of_a_script(self, script, option):
        manuals = [run_script(script, *preset, "--help").output for preset in ([], ["--preset", "small-cpu"])]
        shown = [re.search(rf"--{option} .*?\(default: (\d+)\)", manual, re.DOTALL)[1] for manual in manuals]
        name = option.split()[0]
        values = [section.get(name) for section in json.loads((PRESETS / "small-cpu.json").read_text()).values()]
        assert shown[0] != shown[1] and int(shown[1]) in values

    def test_refuses_an_unknown_one(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["script", "--preset", "large", "--output_dir", "runs"])
        with pytest.raises(SystemExit):
            parse_arguments(RunArguments, description="", sections=())
        assert "invalid choice: 'large'" in capsys.readouterr().err


class TestValidationArguments:
    def test_selects_a_split_or_files_that_are_never_flipped(self):
        data = TrainingDataArguments(dataset_name="user/images", random_flip=True)
        split = ValidationArguments(validation_split="test").select_from(data)
        assert (split.dataset_name, split.split, split.random_flip) == ("user/images", "test", False)
        files = ValidationArguments(validation_files="held_out.parquet").select_from(data)
        assert (files.dataset_name, files.data_files, files.random_flip) == (None, "held_out.parquet", False)

    def test_refuses_a_split_of_latents(self):
        args = TransformerArguments(rqvae="vae", latents="latents")
        with pytest.raises(ValueError, match="with --latents, pass --validation_files FOLDER"):
            args.load_validation(ValidationArguments(validation_split="test"), tiny_vae(), TrainingDataArguments(), 8)
