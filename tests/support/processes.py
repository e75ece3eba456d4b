"""Runs functions and scripts in processes of their own, which may be killed or form a group.

They are forks of a server that has imported the libraries once, so that a run does not pay for that again.
"""

import faulthandler
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

TIMEOUT = 600  # seconds, on a machine that may be busy

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["rq_hf.training", "torch.utils.tensorboard"])


@dataclass
class Outcome:
    """Exit code (a negative signal number for a killed process) and everything that was printed."""

    code: int | None
    output: str


def run(function: Callable, *arguments) -> Outcome:
    """Runs a function of an importable module."""
    return run_group(1, function, *arguments)[0]


def run_group(world_size: int, function: Callable, *arguments) -> list[Outcome]:
    """Runs a function on all ranks of a process group, whose address is in the environment as torchrun puts it."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        logs = [Path(folder) / str(rank) for rank in range(world_size)]
        processes = [
            _server.Process(target=_enter, args=(log, rank, world_size, port, function, *arguments))
            for rank, log in enumerate(logs)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT)
            process.kill()
            process.join()
        return [Outcome(process.exitcode, log.read_text()) for process, log in zip(processes, logs)]


def run_script(path: Path, *arguments, before: Sequence[Callable] = ()) -> Outcome:
    """Runs a script as its command line would, after calling each of `before` in its process."""
    return run(execute, path, arguments, *before)


def _enter(log: Path, rank: int, world_size: int, port: int, function: Callable, *arguments) -> None:
    file = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.dump_traceback_later(TIMEOUT - 10, file=2)  # where a process hangs
    multiprocessing.set_start_method("fork", force=True)  # as in any process that was not forked by a server
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    function(*arguments)


def execute(path: Path, arguments: Sequence, *before: Callable) -> None:
    """Runs a script in this process as its command line would, after calling each of `before`."""
    for prepare in before:
        prepare()
    sys.argv = [str(path), *map(str, arguments)]
    runpy.run_path(str(path), run_name="__main__")


def die_while_saving(name: str) -> None:
    """From now on, this process is killed when `torch.save` has written half of a file with `name` in its path."""
    save = torch.save

    def save_half(value, file, *args, **kwargs):
        save(value, file, *args, **kwargs)
        if name in str(file):
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half


def fill_disk_while_saving(limit: int, rank: int = 0) -> None:
    """From now on, files that this rank writes to a checkpoint cannot grow beyond `limit` bytes."""
    save_state = Accelerator.save_state

    def save_limited(*args, **kwargs):
        if int(os.environ.get("RANK", 0)) == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            return save_state(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    Accelerator.save_state = save_limited
