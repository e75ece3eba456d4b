import functools
import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from fake_hub import FakeHub
from number_training import (
    Smooth,
    assert_equal,
    checkpoint_names,
    finished_training,
    logged,
    run_training,
    train_here,
    weights,
)
from processes import fill_disk_while_saving, run, run_group
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from rq_hf.training import Checkpoints, create_accelerator, save_finished
from rq_hf.training.checkpoint_files import check_plain, plain_data_only, write_manifest
from rq_hf.training.checkpoints import create_repository


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


def copy_of(checkpoint, folder):
    """A copy of a checkpoint and of those beside it."""
    shutil.copytree(checkpoint.parent, folder)
    return folder / checkpoint.name


def refusals(cases):
    """Prints what [`Checkpoints.restore`] says of each checkpoint, before anything is loaded."""
    accelerator = Accelerator(cpu=True)
    for case in cases:
        try:
            Checkpoints(case.parent).restore(accelerator, str(case))
            print(f"{case}: accepted")
        except ValueError as error:
            print(f"{case}: {error}")


def refused(cases):
    outcome = run(refusals, list(cases))
    assert outcome.code == 0, outcome.output
    return dict(line.split(": ", 1) for line in outcome.output.splitlines() if ": " in line)


def remove(file):
    file.unlink()


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def zero(file):
    file.write_bytes(bytes(file.stat().st_size))


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


SAVED_BY_0_1 = Path(__file__).parents[1] / "saved_by_0_1" / "t2i" / "checkpoint-4"


class TestDamagedCheckpoint:
    """Every file of a checkpoint, damaged in every way."""

    def test_names_the_file_and_the_checkpoint_before(self, unbroken, tmp_path):
        newest, cases = unbroken / "checkpoint-6", {}
        names = sorted(path.name for path in newest.iterdir())
        assert {"checkpoint.json", "model.safetensors", "optimizer.bin", "position-0.json"} < set(names)
        assert {"random_states_0.pkl", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"} < set(names)
        for damage in (remove, truncate, zero, flip_a_bit):
            for name in names:
                case = copy_of(newest, tmp_path / f"{damage.__name__}-{name}")
                damage(case / name)
                cases[case] = name
        messages = refused(cases)
        for case, name in cases.items():
            assert messages[str(case)].startswith(f"{case / name} cannot be read ("), messages[str(case)]
            assert messages[str(case)].endswith(f"; resume from {case.parent / 'checkpoint-4'}")

    def test_of_version_0_1_too(self, tmp_path):
        cases = {}
        for damage in (remove, truncate, zero):
            for path in SAVED_BY_0_1.iterdir():
                if damage != remove or path.name == "random_states_0.pkl":
                    case = tmp_path / f"{damage.__name__}-{path.name}" / "checkpoint-4"
                    shutil.copytree(SAVED_BY_0_1, case)
                    damage(case / path.name)
                    cases[case] = path.name
        messages = refused(cases)
        for case, name in cases.items():
            assert messages[str(case)].startswith(f"{case / name} cannot be read ("), messages[str(case)]
            assert messages[str(case)].endswith("; there is no checkpoint before it")

    def test_stops_the_run(self, killed, tmp_path):
        case = copy_of(killed / "checkpoint-2", tmp_path / "run")
        (case / "random_states_0.pkl").unlink()
        outcome = train_here(tmp_path / "run", resume_from_checkpoint="latest")
        assert outcome.code == 1
        assert f"{case / 'random_states_0.pkl'} cannot be read (it is missing)" in outcome.output

    def test_stops_both_processes(self, tmp_path):
        assert all(outcome.code == 0 for outcome in run_group(2, run_training, tmp_path, {"max_train_steps": 2}))
        (tmp_path / "checkpoint-2" / "random_states_1.pkl").unlink()
        for outcome in run_group(2, run_training, tmp_path, {"resume_from_checkpoint": "latest"}):
            assert outcome.code == 1
            assert "random_states_1.pkl cannot be read (it is missing)" in outcome.output

    def test_that_does_not_fit_the_model_is_named(self, killed, tmp_path):
        outcome = train_here(tmp_path, model=Smooth, resume_from_checkpoint=str(killed / "checkpoint-2"))
        assert outcome.code == 1
        assert f"{killed / 'checkpoint-2'} cannot be read (RuntimeError: Error(s) in loading" in outcome.output


class Malicious:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "executed"),)


def update_manifest(checkpoint):
    """As the author of a malicious checkpoint would."""
    manifest = checkpoint / "checkpoint.json"
    configuration = json.loads(manifest.read_text())["configuration"]
    manifest.unlink()
    write_manifest(checkpoint, configuration)


def load_shards(folder):
    """Loads as accelerate does a checkpoint of FSDP."""
    state = {"optimizer": {"tensor": torch.zeros(2), "value": 1}}
    with plain_data_only(Accelerator(cpu=True)):
        check_plain(folder / ".metadata")
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), planner=DefaultLoadPlanner())
    print("loaded", state["optimizer"]["value"])


class TestMaliciousCheckpoint:
    @pytest.mark.parametrize("write", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))])
    def test_is_not_executed(self, write, unbroken, tmp_path):
        cases = {}
        for path in (unbroken / "checkpoint-6").iterdir():
            if path.suffix in (".bin", ".pkl"):
                case = copy_of(path.parent, tmp_path / path.name)
                write({"step": 6, "state": Malicious(tmp_path)}, case / path.name)
                update_manifest(case)
                cases[case] = path.name
        assert len(cases) == 4
        messages = refused(cases)
        for case, name in cases.items():
            assert messages[str(case)].startswith(f"{case / name} cannot be read ("), messages[str(case)]
        assert not (tmp_path / "executed").exists()

    def test_in_place_of_a_file_that_accelerate_falls_back_to(self, killed, tmp_path):
        case = copy_of(killed / "checkpoint-2", tmp_path / "run")
        (case / "model.safetensors").unlink()
        torch.save(Malicious(tmp_path), case / "pytorch_model.bin")
        update_manifest(case)
        outcome = train_here(tmp_path / "run", resume_from_checkpoint="latest")
        assert outcome.code == 1
        assert f"{case / 'pytorch_model.bin'} cannot be read (it is damaged, or holds more than" in outcome.output
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize("part", [None, "metadata", "value"])
    def test_of_shards(self, part, tmp_path):
        state = {"tensor": torch.ones(2), "value": Malicious(tmp_path) if part == "value" else 3}
        dcp.save({"optimizer": state}, storage_writer=dcp.FileSystemWriter(tmp_path / "shards"))
        if part == "metadata":
            (tmp_path / "shards" / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path)))
        outcome = run(load_shards, tmp_path / "shards")
        assert ("loaded 3" in outcome.output) == (part is None), outcome.output
        assert not (tmp_path / "executed").exists()


class TestFullDisk:
    def test_is_one_sentence_and_leaves_what_was_there(self, killed, unbroken, tmp_path):
        copy_of(killed / "checkpoint-2", tmp_path / "run")
        resume = {"resume_from_checkpoint": "latest"}
        outcome = train_here(tmp_path / "run", before=functools.partial(fill_disk_while_saving, 2500), **resume)
        assert outcome.code == 1
        last = outcome.output.splitlines()[-1]
        assert f"{tmp_path / 'run' / 'checkpoint-4'} cannot be written (" in last
        assert "MB were written" in last and "MB are free there" in last
        assert last.endswith(f"the last checkpoint is {tmp_path / 'run' / 'checkpoint-2'}")
        assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-2"]
        finished_training(tmp_path / "run", **resume)
        assert_equal(weights(tmp_path / "run"), weights(unbroken))

    def test_of_one_process_stops_both(self, tmp_path):
        fill = functools.partial(fill_disk_while_saving, 300, rank=1)
        for outcome in run_group(2, run_training, tmp_path, {}, Smooth, None, fill):
            assert outcome.code == 1
            assert f"{tmp_path / 'checkpoint-2'} cannot be written (" in outcome.output
        assert not list(tmp_path.glob("*checkpoint*"))


class TestOptionsOfAResumedRun:
    def test_that_make_another_run_are_refused_by_name(self, killed, tmp_path):
        resume = {"resume_from_checkpoint": str(killed / "checkpoint-2")}
        outcome = train_here(tmp_path, seed=1, train_batch_size=5, logging_steps=2, **resume)
        assert outcome.code == 1
        assert "belongs to another run: --train_batch_size was 4, got 5; --seed was 0, got 1." in outcome.output
        assert checkpoint_names(tmp_path) == []


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


def create_on_hub(token, endpoint):
    if token:
        os.environ["HF_TOKEN"] = token
    os.environ["NO_PROXY"] = "127.0.0.1"
    huggingface_hub.constants.HF_HUB_OFFLINE = endpoint is None
    huggingface_hub.hf_api.api.endpoint = endpoint
    create_repository("tester/model")


class TestCreateRepository:
    def test_creates_it_once(self):
        with FakeHub() as hub:
            for _ in range(2):
                outcome = run(create_on_hub, "hf_fake", hub.endpoint)
                assert outcome.code == 0, outcome.output
            assert list(hub.repos) == ["tester/model"]

    @pytest.mark.parametrize(
        ("token", "reachable", "reason"),
        [
            (None, True, "there is no token: run `hf auth login`, or set HF_TOKEN"),
            ("hf_other", True, "403"),
            ("hf_fake", False, "HF_HUB_OFFLINE is set: unset it"),
        ],
    )
    def test_says_what_is_missing(self, token, reachable, reason):
        with FakeHub() as hub:
            outcome = run(create_on_hub, token, hub.endpoint if reachable else None)
        assert outcome.code == 1
        last = outcome.output.splitlines()[-1]
        assert last.startswith("ValueError: --push_to_hub cannot write to tester/model (") and reason in last
        assert last.endswith("upload the finished model by `hf upload tester/model FOLDER`")

    def test_that_cannot_be_reached_says_so(self):
        outcome = run(create_on_hub, "hf_fake", "http://127.0.0.1:9")
        assert "--push_to_hub cannot write to tester/model (the Hub cannot be reached, " in outcome.output
