import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from original_checkpoints import (
    RQVAE_CONFIG,
    pack,
    run_main,
    shared_rqtransformer,
    shared_rqvae,
    write,
    write_both,
    write_rqvae,
)
from tiny import same_state

from rq_hf import RQPipeline


def run_convert(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "rq_hf.convert", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_command_line(tmp_path):
    vae, _ = write_both(tmp_path / "church")
    pack(tmp_path / "church", tmp_path / "church.tar.gz")
    result = run_convert(tmp_path, "church.tar.gz", "--ema", "models/church")
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    assert result.stdout.splitlines()[-1].endswith("models/church")
    pipe = RQPipeline.from_pretrained(tmp_path / "models" / "church")
    assert same_state(pipe.vae, vae)
    assert same_state(pipe.transformer, shared_rqtransformer("none", ema=True))


def test_command_line_says_in_one_line_what_is_wrong(tmp_path):
    (tmp_path / "church.tar.gz").write_bytes(b"hello" * 1000)
    result = run_convert(tmp_path, "church.tar.gz", "model")
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(r"error: church.tar.gz is a truncated or invalid tar archive: .*\n", result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["church.tar.gz"]


def test_command_line_help(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        run_main(monkeypatch, "--help")
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for name in ("SOURCE", "DESTINATION", "--rqvae", "--rqtransformer", "--ema", "--tokenizer", "no commercial use"):
        assert name in text
    assert "usage: python -m rq_hf.convert [SOURCE] DESTINATION" in text


def test_command_line_with_files(tmp_path, monkeypatch, text_model):
    vae, transformer = shared_rqvae(), shared_rqtransformer("text", ema=False)
    stages = ("--rqvae", tmp_path / "cc3m/stage1/model.pt", "--rqtransformer", tmp_path / "cc3m/stage2/model.pt")
    run_main(monkeypatch, *stages, tmp_path / "model", "--tokenizer", tmp_path / "tokenizer")
    pipe = RQPipeline.from_pretrained(tmp_path / "model")
    assert same_state(pipe.vae, vae)
    assert same_state(pipe.transformer, transformer)
    assert pipe.tokenizer.get_vocab() == text_model[1]


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["model"], "error: nothing to convert: give source or rqvae"),
        (["--ema", "church", "model"], "error: church/stage1/model.pt has no state_dict_ema; it has .*"),
        (["church", "church"], "error: .*/church is not empty; name a new folder"),
        (["no", "model"], "error: no file or folder no"),
        (["--rqvae", "no.pt", "model"], "error: no file no.pt"),
    ],
)
def test_command_line_errors(tmp_path, monkeypatch, arguments, code):
    write_rqvae(tmp_path / "church")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        run_main(monkeypatch, *arguments)
    assert re.fullmatch(code, exit.value.code)
    assert [path.name for path in tmp_path.iterdir()] == ["church"]


@pytest.mark.parametrize("arguments", [[], ["--tokenizer", "folder"], ["a", "b", "c"], ["a", "b", "--depth", "4"]])
def test_command_line_usage(monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        run_main(monkeypatch, *arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m rq_hf.convert [SOURCE] DESTINATION")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_line_is_interrupted(tmp_path, monkeypatch, number):
    write_both(tmp_path / "church")
    # Of safetensors; the RQ-VAE is written by then.
    monkeypatch.setattr("rq_hf.convert.conversion.save_file", lambda *_, **__: signal.raise_signal(number))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit:
        run_main(monkeypatch, tmp_path / "church", tmp_path / "model")
    assert exit.value.code == "error: interrupted"
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in tmp_path.iterdir()] == ["church"]


def test_names_reach_the_terminal_without_control_characters(tmp_path, monkeypatch, capsys):
    evil = "\x1b]0;evil\x07\n\x9b31m"
    folder = tmp_path / "church"
    write_rqvae(folder, options={evil: 1, f"arch.{evil}": 1}, **{evil: 1})
    (folder / "stage1").rename(folder / evil)
    archive = pack(folder, tmp_path / "church.tar")
    run_main(monkeypatch, archive, tmp_path / "model")
    messages = [capsys.readouterr().out]
    assert (
        messages[0].count(r"\x1b]0;evil\x07\n\x9b31m") == 7
    )  # a file and its config.yaml in two lines each, and three names
    for state_dict in (1, {evil: 1}, {evil: torch.ones(1)}):
        shutil.rmtree(folder)
        write(folder, yaml.safe_load(RQVAE_CONFIG), state_dict, **{evil: 1})
        with pytest.raises(SystemExit) as exit:
            run_main(monkeypatch, folder, tmp_path / "other")
        messages.append(exit.value.code)
    shutil.rmtree(folder)
    for options in ({"arch.ddconfig.dropout": evil}, {"arch.type": evil}, {"arch": evil}):
        write_rqvae(folder / evil, options=options)
        with pytest.raises(SystemExit) as exit:
            run_main(monkeypatch, pack(folder, tmp_path / "church.tar"), tmp_path / "other")
        messages.append(exit.value.code)
        shutil.rmtree(folder)
    assert len(messages) == 7
    assert all(line.isprintable() for message in messages for line in message.splitlines())
