"""Started by torchrun, or called: trains as a script of `examples/` does; every rank keeps the state it ends with."""

import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from scripts import run_example

from rq_hf.data import TrainingStream


def train_and_keep(folder: Path, script: Path, arguments: list[str], *before: Callable) -> None:
    """Runs a script, after calling each of `before`; the final state of rank r goes to the file `{r}.pt`."""
    end_training = Accelerator.end_training

    def keep_then_end(accelerator):
        model = accelerator.unwrap_model(accelerator._models[0])
        torch.save(model.state_dict(), folder / f"{accelerator.process_index}.pt")
        end_training(accelerator)

    Accelerator.end_training = keep_then_end
    run_example(script, arguments, folder, *before)


def die_around_step(step: int) -> None:
    """This process will be killed at a random moment after it has begun its `step`-th step from now."""
    iterate = TrainingStream.__iter__

    def begin_steps(stream):
        for begun, batch in enumerate(iterate(stream), start=1):
            if begun == step:
                threading.Timer(0.05 * random.random(), os.kill, (os.getpid(), signal.SIGKILL)).start()
            yield batch

    TrainingStream.__iter__ = begin_steps


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
