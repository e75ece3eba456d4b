"""Started by torchrun, or called: trains as a script of `examples/` does; every rank keeps the state it ends with."""

import itertools
import os
import random
import runpy
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState

import rq_hf.training.loop


def train_and_keep(folder: Path, script: Path, arguments: list[str], *before: Callable) -> None:
    """Runs a script, after calling each of `before`; the state of rank r goes to the file `{r}.pt`."""
    train = rq_hf.training.train

    def train_then_keep(accelerator, args, model, *further, **named):
        train(accelerator, args, model, *further, **named)
        torch.save(model.state_dict(), folder / f"{accelerator.process_index}.pt")

    rq_hf.training.train = train_then_keep
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # 5 seconds after every epoch of a parquet stream
    for prepare in before:
        prepare()
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def die_around_step(step: int) -> None:
    """This process will be killed at a random moment after it has begun its `step`-th step from now."""
    next_readable, begun = rq_hf.training.loop.next_readable, itertools.count(1)

    def begin_step(batches):
        if next(begun) == step:
            threading.Timer(0.05 * random.random(), os.kill, (os.getpid(), signal.SIGKILL)).start()
        return next_readable(batches)

    rq_hf.training.loop.next_readable = begin_step


def set_environment(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def shard_on_cpus(environment: dict[str, str]) -> None:
    """Has accelerate shard as the `environment` of its launcher says; left to itself it would not, and not say so."""
    set_environment(environment)
    create = AcceleratorState.__init__

    def create_sharded(self, *args, fsdp_plugin=None, **named):
        is_new = not AcceleratorState._shared_state
        create(self, *args, fsdp_plugin=fsdp_plugin, **named)
        if is_new:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)

    AcceleratorState.__init__ = create_sharded


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_and_keep(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
