import json
import os
import shutil
import signal

import pytest
import torch
from number_training import (
    STEPS,
    Smooth,
    assert_equal,
    checkpoint_names,
    finished_training,
    logged,
    run_training,
    train_here,
    weights,
)
from processes import run, run_group
from safetensors.torch import load_file
from torch import nn

from rq_hf import ResidualQuantizer
from rq_hf.training import (
    JSONLinesTracker,
    OptimizationArguments,
    WeightAverage,
    create_accelerator,
    create_optimizer,
    save_finished,
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return finished_training(tmp_path_factory.mktemp("runs") / "unbroken")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed while it wrote its second checkpoint."""
    output_dir = tmp_path_factory.mktemp("runs") / "killed"
    assert train_here(output_dir, die_at="checkpoint-4/optimizer.bin").code == -signal.SIGKILL
    return output_dir


class TestArguments:
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
        ],
    )
    def test_out_of_range_is_an_error_that_names_the_option(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            OptimizationArguments("somewhere", **arguments)


class TestWeightAverage:
    def test_is_the_moving_average_of_parameters_and_buffers(self):
        model = nn.BatchNorm1d(3)
        average = WeightAverage(model, decay=0.2)
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for decay in (1 / 10, 2 / 11, 0.2, 0.2):  # (1 + step) / (10 + step) in the first steps
            for name, tensor in model.state_dict().items():
                if name == "num_batches_tracked":
                    expected[name] = tensor.add_(1).clone()
                else:
                    tensor.copy_(torch.randn(3))
                    expected[name] = decay * expected[name] + (1 - decay) * tensor
            average.update()
        torch.testing.assert_close(average.state_dict()["average"], expected)

    def test_warms_up(self):
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        average = WeightAverage(model, decay=0.999)
        nn.init.ones_(model.weight)
        distance = 1.0
        for step in (0, 1, 2):
            average.update()
            distance *= (1 + step) / (10 + step)
            assert average.average["weight"].item() == pytest.approx(1 - distance)

    def test_is_applied_inside_the_context_only(self):
        model = nn.BatchNorm1d(3)
        average = WeightAverage(model, decay=0.9)
        nn.init.normal_(model.weight)
        nn.init.normal_(model.running_mean)
        average.update()
        trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(RuntimeError), average.applied():
            assert_equal(model.state_dict(), average.average)
            assert not torch.equal(model.weight, trained["weight"])
            raise RuntimeError
        assert_equal(model.state_dict(), trained)

    def test_goes_on_from_its_state(self, tmp_path):
        model, other = nn.Linear(2, 2), nn.Linear(2, 2)
        average, restored = WeightAverage(model, 0.9), WeightAverage(other, 0.9)
        nn.init.normal_(model.weight)
        average.update()
        torch.save(average.state_dict(), tmp_path / "average.pt")
        restored.load_state_dict(torch.load(tmp_path / "average.pt"))
        other.load_state_dict(model.state_dict())
        for each in (average, restored):
            each.update()
        assert_equal(restored.average, average.average)


class TestCreateOptimizer:
    def decay_of(self, model):
        groups = create_optimizer(model, OptimizationArguments("somewhere", weight_decay=0.3)).param_groups
        decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
        return {name: decays.get(id(parameter)) for name, parameter in model.named_parameters()}

    def test_decays_matrices_but_neither_biases_nor_norms(self):
        model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Conv2d(3, 3, 1))
        assert self.decay_of(model) == {
            "0.weight": 0.3,
            "0.bias": 0.0,
            "1.weight": 0.0,
            "1.bias": 0.0,
            "2.weight": 0.3,
            "2.bias": 0.0,
        }

    @pytest.mark.parametrize(("update", "decay"), [("ema", None), ("gradient", 0.0)])
    def test_does_not_decay_codebooks(self, update, decay):
        assert self.decay_of(ResidualQuantizer(4, 3, 2, codebook_update=update)) == {"codebook": decay}

    def test_takes_its_settings_from_the_arguments(self):
        args = OptimizationArguments("somewhere", learning_rate=0.25, adam_beta1=0.5, adam_beta2=0.75)
        group = create_optimizer(nn.Linear(1, 1), args).param_groups[0]
        assert (group["lr"], group["betas"]) == (0.25, (0.5, 0.75))


class TestTrain:
    def test_reports_every_logged_step(self, unbroken):
        lines = logged(unbroken)
        assert list(lines) == list(range(1, STEPS + 1))
        for line in lines.values():
            assert line["twice_the_loss"] == pytest.approx(2 * line["loss"])
            assert line["images_per_second"] > 0
            assert line["grad_norm"] > 0
        assert [line["epoch"] for line in lines.values()] == [0, 0, 0, 0, 0, 1]

    def test_warms_the_learning_rate_up_and_lets_it_fall_to_zero(self, unbroken):
        rates = [line["learning_rate"] for line in logged(unbroken).values()]
        assert rates[:2] == [0.025, 0.05]
        assert sorted(rates[1:], reverse=True) == rates[1:]
        assert rates[-1] == pytest.approx(0)

    def test_records_the_configuration(self, unbroken):
        assert json.loads((unbroken / "log.jsonl").read_text().splitlines()[0]) == {"arguments": {"purpose": "test"}}

    def test_counts_skipped_images_over_the_run(self, unbroken):
        assert logged(unbroken)[5]["skipped_images"] == 10

    def test_measures_speed_and_utilization(self, tmp_path):
        finished_training(tmp_path, model=Smooth, peak_teraflops=1e-6)
        forward = 2 * (2 * 4 + 4 * 1)  # two linear layers, an image a row
        for line in logged(tmp_path).values():
            assert line["codes_per_second"] == pytest.approx(3 * line["images_per_second"])
            # The first layer needs no gradient of its input.
            assert line["flops_utilization"] == pytest.approx(
                line["images_per_second"] * (3 * forward - 2 * 2 * 4) / 1e6
            )

    def test_keeps_the_newest_checkpoints(self, unbroken):
        assert checkpoint_names(unbroken) == ["checkpoint-4", "checkpoint-6"]
        assert not list(unbroken.glob("unfinished*"))

    def test_ends_with_the_averaged_weights(self, unbroken):
        checkpoint = unbroken / "checkpoint-6"
        trained, average = load_file(checkpoint / "model.safetensors"), weights(unbroken)
        assert_equal(average, torch.load(checkpoint / "custom_checkpoint_1.pkl")["average"])
        assert not torch.equal(average["network.0.weight"], trained["network.0.weight"])

    def test_ends_with_the_trained_weights_without_an_average(self, tmp_path):
        finished_training(tmp_path / "plain", ema_decay=0.0, max_train_steps=2)
        finished_training(tmp_path / "average", max_train_steps=2)
        plain, average = weights(tmp_path / "plain"), weights(tmp_path / "average")
        assert not torch.equal(plain["network.0.weight"], average["network.0.weight"])
        assert not (tmp_path / "plain" / "checkpoint-2" / "custom_checkpoint_1.pkl").exists()

    def test_pictures_do_not_change_the_training(self, unbroken, tmp_path):
        finished_training(tmp_path, image_logging_steps=1)
        assert_equal(weights(tmp_path), weights(unbroken))
        assert len(list((tmp_path / "images").glob("noise-*.png"))) == STEPS

    def test_accumulated_gradients_equal_those_of_a_larger_batch(self, tmp_path):
        arguments = {"model": Smooth, "max_train_steps": 2, "weight_decay": 0.0}
        finished_training(tmp_path / "whole", train_batch_size=8, **arguments)
        finished_training(tmp_path / "halves", train_batch_size=4, gradient_accumulation_steps=2, **arguments)
        torch.testing.assert_close(weights(tmp_path / "halves"), weights(tmp_path / "whole"))
        steps = [logged(tmp_path / name)[1] for name in ("whole", "halves")]
        assert steps[0]["loss"] == pytest.approx(steps[1]["loss"])
        assert steps[0]["grad_norm"] == pytest.approx(steps[1]["grad_norm"])

    def test_seed_decides(self, unbroken, tmp_path):
        finished_training(tmp_path, seed=1)
        assert not torch.equal(weights(tmp_path)["network.0.weight"], weights(unbroken)["network.0.weight"])


class TestCheckpoints:
    def test_are_listed_by_their_step(self, tmp_path):
        names = ["checkpoint-10", "checkpoint-9", "checkpoint-100", "unfinished-checkpoint-101", "checkpoint-x"]
        for name in [*names, "checkpoint-9-copy"]:
            (tmp_path / name).mkdir()
        assert checkpoint_names(tmp_path) == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]

    @pytest.mark.parametrize("file", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_1.pkl"])
    def test_survive_a_kill_while_the_next_is_written(self, unbroken, tmp_path, file):
        outcome = train_here(tmp_path, die_at=f"checkpoint-4/{file}")
        assert outcome.code == -signal.SIGKILL
        assert checkpoint_names(tmp_path) == ["checkpoint-2"]
        assert not (tmp_path / "weights-0.pt").exists()

        finished_training(tmp_path, resume_from_checkpoint="latest")
        assert_equal(weights(tmp_path), weights(unbroken))
        assert checkpoint_names(tmp_path) == ["checkpoint-4", "checkpoint-6"]
        assert not list(tmp_path.glob("unfinished*"))

    def test_of_an_epoch_end_can_be_resumed(self, tmp_path):
        arguments = {"train_batch_size": 10, "max_train_steps": 4}
        finished_training(tmp_path / "unbroken", **arguments)
        output_dir = tmp_path / "killed"
        assert train_here(output_dir, die_at="checkpoint-4/optimizer.bin", **arguments).code == -signal.SIGKILL
        finished_training(output_dir, resume_from_checkpoint="latest", **arguments)
        assert_equal(weights(output_dir), weights(tmp_path / "unbroken"))

    def test_resumed_run_logs_the_same_losses(self, unbroken, killed, tmp_path):
        shutil.copytree(killed, tmp_path / "run")
        finished_training(tmp_path / "run", resume_from_checkpoint="latest")
        expected = {step: line["loss"] for step, line in logged(unbroken).items()}
        assert {step: line["loss"] for step, line in logged(tmp_path / "run").items()} == expected

    def test_may_be_resumed_by_their_path(self, unbroken, killed, tmp_path):
        finished_training(tmp_path, resume_from_checkpoint=str(killed / "checkpoint-2"))
        assert_equal(weights(tmp_path), weights(unbroken))

    def test_resumed_from_an_older_one_keep_what_they_write(self, unbroken, tmp_path):
        shutil.copytree(unbroken, tmp_path / "run")
        older = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-4")}
        finished_training(tmp_path / "run", **older, max_train_steps=5, checkpoints_total_limit=1)
        assert "checkpoint-5" in checkpoint_names(tmp_path / "run")

    def test_of_the_last_step_only_finishes(self, unbroken, tmp_path):
        shutil.copytree(unbroken, tmp_path / "run")
        (tmp_path / "run" / "weights-0.pt").unlink()
        finished_training(tmp_path / "run", resume_from_checkpoint="latest")
        assert_equal(weights(tmp_path / "run"), weights(unbroken))

    def test_latest_of_none_begins_a_new_run(self, unbroken, tmp_path):
        finished_training(tmp_path, resume_from_checkpoint="latest")
        assert_equal(weights(tmp_path), weights(unbroken))

    def test_are_not_overwritten_by_a_new_run(self, killed):
        outcome = train_here(killed)
        assert outcome.code == 1
        assert "already holds checkpoint-2: pass --resume_from_checkpoint latest" in outcome.output
        assert checkpoint_names(killed) == ["checkpoint-2"]

    def test_missing_is_an_error(self, tmp_path):
        outcome = train_here(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
        assert outcome.code == 1
        assert "checkpoint-7 is not a checkpoint of this script" in outcome.output

    def test_of_another_number_of_processes_is_an_error(self, killed, tmp_path):
        shutil.copytree(killed, tmp_path / "run")
        outcomes = run_group(2, run_training, tmp_path / "run", {"resume_from_checkpoint": "latest"})
        assert all(outcome.code for outcome in outcomes)
        assert "was written by 1 processes, this run has 2" in outcomes[0].output


class TestTwoProcesses:
    @pytest.fixture(scope="class")
    @classmethod
    def together(cls, tmp_path_factory):
        output_dir = tmp_path_factory.mktemp("runs") / "together"
        for outcome in run_group(2, run_training, output_dir, {"train_batch_size": 5}, Smooth):
            assert outcome.code == 0, outcome.output
        return output_dir

    def test_have_the_same_weights(self, together):
        assert_equal(weights(together, rank=1), weights(together, rank=0))

    def test_share_the_data_set(self, together):
        assert [line["epoch"] for line in logged(together).values()] == [0, 0, 1, 1, 2, 2]

    def test_log_what_all_of_them_skipped(self, together):
        assert logged(together)[6]["skipped_images"] == 30

    def test_resume_where_they_stood(self, together, tmp_path):
        arguments = {"train_batch_size": 5}
        outcomes = run_group(2, run_training, tmp_path, arguments, Smooth, "checkpoint-4/random_states_0.pkl")
        assert all(outcome.code for outcome in outcomes)
        for outcome in run_group(2, run_training, tmp_path, arguments | {"resume_from_checkpoint": "latest"}, Smooth):
            assert outcome.code == 0, outcome.output
        assert_equal(weights(tmp_path), weights(together))


class Folder:
    """Something with `save_pretrained`."""

    def __init__(self, content, dies=False):
        self.content = content
        self.dies = dies

    def save_pretrained(self, folder):
        folder.mkdir()
        (folder / "model").write_text(self.content)
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)


def save_folder(output_dir, content, dies=False):
    args = OptimizationArguments(str(output_dir), cpu=True, report_to="none")
    save_finished(create_accelerator(args), Folder(content, dies), output_dir / "model", args, card=f"# {content}")


class TestSaveFinished:
    def read(self, folder):
        return (folder / "model").read_text(), (folder / "README.md").read_text()

    def test_replaces_what_was_there_and_keeps_it_beside(self, tmp_path):
        for content in ("first", "second", "third"):
            assert run(save_folder, tmp_path, content).code == 0
        assert self.read(tmp_path / "model") == ("third", "# third")
        assert self.read(tmp_path / "previous-model") == ("second", "# second")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "previous-model"]

    def test_killed_leaves_what_was_there(self, tmp_path):
        run(save_folder, tmp_path, "first")
        assert run(save_folder, tmp_path, "second", True).code == -signal.SIGKILL
        assert self.read(tmp_path / "model") == ("first", "# first")
        assert run(save_folder, tmp_path, "third").code == 0
        assert self.read(tmp_path / "model") == ("third", "# third")


def test_json_lines_tracker_appends_a_line_for_everything_logged(tmp_path):
    for rate in (1, 2):
        tracker = JSONLinesTracker(tmp_path / "log.jsonl")
        tracker.store_init_configuration({"learning_rate": rate})
        tracker.log({"loss": 0.5}, step=rate)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"arguments": {"learning_rate": 1}},
        {"step": 1, "loss": 0.5},
        {"arguments": {"learning_rate": 2}},
        {"step": 2, "loss": 0.5},
    ]
