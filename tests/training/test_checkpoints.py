import os
import shutil
import signal

import pytest
from number_training import (
    assert_equal,
    checkpoint_names,
    finished_training,
    logged,
    run_training,
    train_here,
    weights,
)
from processes import run, run_group

from rq_hf.training import create_accelerator, save_finished


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


class Folder:
    """Something with `save_pretrained`."""

    def __init__(self, content, dies=False):
        self.content = content
        self.dies = dies

    def save_pretrained(self, folder):
        (folder / "model").write_text(self.content)
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)


def save_folder(output_dir, content, dies=False):
    accelerator = create_accelerator(output_dir, cpu=True)
    save_finished(accelerator, Folder(content, dies), output_dir / "model", card=f"# {content}")


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
