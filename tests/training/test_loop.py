import functools
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from number_training import (
    STEPS,
    Noisy,
    Smooth,
    assert_equal,
    checkpoint_names,
    finished_training,
    logged,
    run_training,
    signalled,
    train_here,
    weights,
)
from processes import run, run_group
from safetensors.torch import load_file
from torch import nn

from rq_hf import ResidualQuantizer
from rq_hf.data.stream import STOP_SIGNALS
from rq_hf.training import create_optimizer, create_scheduler
from rq_hf.training.loop import continue_schedule
from rq_hf.training.stop_signals import StopSignals


class TestCreateOptimizer:
    def decay_of(self, model):
        groups = create_optimizer(model, 1e-3, (0.9, 0.95), weight_decay=0.3).param_groups
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


def scheduled(num_training_steps):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.5)
    return optimizer, create_scheduler(optimizer, "cosine", 2, num_training_steps)


def take_steps(optimizer, scheduler, count):
    for _ in range(count):
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("num_training_steps", [6, 12])
def test_continued_schedule_is_at_once_on_its_own_curve(num_training_steps):
    saved_optimizer, saved_scheduler = scheduled(6)
    take_steps(saved_optimizer, saved_scheduler, 4)
    optimizer, scheduler = scheduled(num_training_steps)
    optimizer.load_state_dict(saved_optimizer.state_dict())
    scheduler.load_state_dict(saved_scheduler.state_dict())
    continue_schedule(scheduler, [0.5])
    expected_optimizer, expected_scheduler = scheduled(num_training_steps)
    take_steps(expected_optimizer, expected_scheduler, 4)
    assert optimizer.param_groups[0]["lr"] == expected_optimizer.param_groups[0]["lr"]
    assert scheduler.get_last_lr() == expected_scheduler.get_last_lr()


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

    def test_resumed_with_another_learning_rate_continues_the_schedule_with_its_peak(self, unbroken, killed, tmp_path):
        resume = {"resume_from_checkpoint": str(killed / "checkpoint-2")}
        finished_training(tmp_path, learning_rate=0.005, **resume)
        rates = [logged(tmp_path)[step]["learning_rate"] for step in (3, 4, 5)]
        assert rates == pytest.approx([logged(unbroken)[step]["learning_rate"] / 10 for step in (3, 4, 5)])
        start = load_file(killed / "checkpoint-2" / "model.safetensors")["network.0.weight"]
        moved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")["network.0.weight"] - start
        usually = load_file(unbroken / "checkpoint-4" / "model.safetensors")["network.0.weight"] - start
        assert 0 < moved.norm() < 0.2 * usually.norm()

    def test_resumed_with_more_steps_continues_on_the_new_curve(self, killed, tmp_path):
        # The curves of 6 and of 8 steps differ only after the warm-up, from step 3 on.
        finished_training(tmp_path / "unbroken", max_train_steps=8)
        resume = {"resume_from_checkpoint": str(killed / "checkpoint-2")}
        outcome = train_here(tmp_path / "resumed", max_train_steps=8, **resume)
        assert "with --output_dir" in outcome.output and "--max_train_steps 8 (was 6)" in outcome.output
        assert "resumed at step 2 of 8; the learning rate is 0.05 there" in outcome.output
        assert_equal(weights(tmp_path / "resumed"), weights(tmp_path / "unbroken"))

    def test_refuses_fewer_steps_than_the_checkpoint_has(self, killed, tmp_path):
        outcome = train_here(tmp_path, max_train_steps=1, resume_from_checkpoint=str(killed / "checkpoint-2"))
        assert outcome.code == 1
        assert "--max_train_steps must be at least 2, as in the checkpoint, got 1" in outcome.output

    def test_clips_no_gradients_with_a_norm_of_zero(self, tmp_path):
        finished_training(tmp_path / "off", max_grad_norm=0.0, max_train_steps=2)
        finished_training(tmp_path / "large", max_grad_norm=1e9, max_train_steps=2)
        assert_equal(weights(tmp_path / "off"), weights(tmp_path / "large"))
        assert logged(tmp_path / "off")[1]["grad_norm"] > 0

    def test_refuses_fp16_on_a_cpu(self, tmp_path):
        outcome = train_here(tmp_path, mixed_precision="fp16")
        assert outcome.code == 1
        assert "--mixed_precision fp16 needs a GPU; a CPU accepts no and bf16" in outcome.output

    def test_records_the_configuration(self, unbroken):
        arguments = json.loads((unbroken / "log.jsonl").read_text().splitlines()[0])["arguments"]
        assert (arguments["output_dir"], arguments["max_train_steps"]) == (str(unbroken), STEPS)

    def test_adds_up_counts_over_the_run(self, unbroken):
        assert logged(unbroken)[5]["small_numbers"] == 10

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

    def test_evaluation_does_not_change_the_training(self, unbroken, tmp_path):
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

    def test_log_the_counts_of_both(self, together):
        assert logged(together)[6]["small_numbers"] == 30

    def test_resume_where_they_stood(self, together, tmp_path):
        arguments = {"train_batch_size": 5}
        outcomes = run_group(2, run_training, tmp_path, arguments, Smooth, "checkpoint-4/random_states_0.pkl")
        assert all(outcome.code for outcome in outcomes)
        for outcome in run_group(2, run_training, tmp_path, arguments | {"resume_from_checkpoint": "latest"}, Smooth):
            assert outcome.code == 0, outcome.output
        assert_equal(weights(tmp_path), weights(together))

    def test_stop_both_at_the_same_step_when_one_is_told_to(self, together, tmp_path):
        arguments = {"train_batch_size": 5}
        model = functools.partial(signalled, Smooth, signal.SIGTERM, rank=1)
        outcomes = run_group(2, run_training, tmp_path, arguments, model)
        assert [outcome.code for outcome in outcomes] == [128 + signal.SIGTERM] * 2
        assert checkpoint_names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
        for outcome in run_group(2, run_training, tmp_path, arguments | {"resume_from_checkpoint": "latest"}, Smooth):
            assert outcome.code == 0, outcome.output
        for rank in range(2):
            assert_equal(weights(tmp_path, rank), weights(together, rank))


class Exploding(nn.Module):
    """A regression until its third batch, then NaN on the last rank."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(1, 1)
        self.calls = 0

    def forward(self, numbers):
        self.calls += 1
        is_last_rank = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
        return self.network(numbers[:, None]).squeeze(-1) / (self.calls < 4 or not is_last_rank)


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_checkpoint(tmp_path):
    outcome = run(run_training, tmp_path, {}, Exploding)
    assert outcome.code != 0
    assert f"at step 4; the last checkpoint is {tmp_path / 'checkpoint-2'}" in outcome.output
    assert not (tmp_path / "checkpoint-4").exists() and not (tmp_path / "weights-0.pt").exists()
    assert max(logged(tmp_path)) == 3


def test_a_loss_that_is_no_number_on_one_rank_stops_all(tmp_path):
    for outcome in run_group(2, run_training, tmp_path, {}, Exploding):
        assert outcome.code == 1
        assert f"on process 1 at step 4; the last checkpoint is {tmp_path / 'checkpoint-2'}" in outcome.output


class TestStopped:
    def stop(self, output_dir, number, times=1):
        return train_here(output_dir, model=functools.partial(signalled, Noisy, number, times))

    @pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
    def test_writes_a_checkpoint_and_says_so(self, number, unbroken, tmp_path):
        outcome = self.stop(tmp_path, number)
        assert outcome.code == 128 + number
        assert f"{number.name}: the run stops after this step, with a checkpoint" in outcome.output
        last = tmp_path / "checkpoint-3"
        assert f"{number.name} stopped the run: go on with --resume_from_checkpoint {last}" in outcome.output
        assert checkpoint_names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
        assert list(logged(tmp_path)) == [1, 2, 3]
        finished_training(tmp_path, resume_from_checkpoint="latest")
        assert_equal(weights(tmp_path), weights(unbroken))

    def test_by_a_second_interrupt_at_once(self, tmp_path):
        assert self.stop(tmp_path, signal.SIGINT, times=2).code == -signal.SIGINT
        assert checkpoint_names(tmp_path) == ["checkpoint-2"]


class TestStopSignals:
    def test_are_noted_inside_only(self):
        handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
        for number in STOP_SIGNALS:
            with StopSignals() as signals:
                assert signals.received == 0
                os.kill(os.getpid(), number)
                assert signals.received == number
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers

    def test_that_are_ignored_stay_ignored(self):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with StopSignals() as signals:
                os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == 0
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_do_nothing_outside_the_main_thread(self):
        def enter():
            with StopSignals():
                return signal.getsignal(signal.SIGTERM)

        with ThreadPoolExecutor() as pool:
            assert pool.submit(enter).result() == signal.getsignal(signal.SIGTERM)
