import math
import re
from dataclasses import fields

import pytest
from scripts import EXAMPLES
from tiny import tiny_vae
from torch import nn

from rq_hf.data import ImageCollator, LatentCollator
from rq_hf.training import RunArguments, TrainingDataArguments, TransformerArguments
from rq_hf.training.arguments import MAY_CHANGE, MAY_CHANGE_UNLESS_STREAMING, describe_changes


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
        classes = (RunArguments, TrainingDataArguments, TransformerArguments)
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
            TransformerArguments("vae", latents="latents").load_dataset(vae, TrainingDataArguments(**{option: value}))

    def test_collates_latents(self, vae):
        data = TrainingDataArguments(random_flip=False)
        collate = TransformerArguments("vae", latents="latents").create_collator(vae, data, label_column="label")
        assert isinstance(collate, LatentCollator) and collate.label_column == "label"

    def test_left_out_collates_images_of_the_size_of_the_rqvae(self, vae):
        data = TrainingDataArguments(image_column="img", random_flip=True, center_crop=False)
        collate = TransformerArguments("vae").create_collator(vae, data, label_column="label")
        assert isinstance(collate, ImageCollator)
        assert (collate.image_column, collate.resolution, collate.label_column) == ("img", 8, "label")
        assert (collate.random_flip, collate.center_crop) == (True, False)
