"""Launch options that accelerate ignores without a word."""

import os
import sys
from argparse import ArgumentParser

import psutil
from accelerate import Accelerator, DistributedType


def check_launch(accelerator: Accelerator) -> None:
    """Raises `ValueError` for launch options that accelerate silently ignores on a CPU: several processes, sharding,
    and fp16."""
    launcher = psutil.Process().parent()
    command = launcher.cmdline() if launcher else []
    if sys.argv[0] in command:
        parser = ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--num_processes", "--num-processes", type=int, default=1)
        requested = parser.parse_known_args(command[: command.index(sys.argv[0])])[0].num_processes
        if requested > 1 and accelerator.num_processes == 1:
            raise ValueError(
                f"accelerate launch was given --num_processes {requested} but started one process, "
                f"as it does on a CPU: use torchrun --nproc_per_node {requested} {sys.argv[0]} --cpu ..."
            )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError("this configuration shards the model (FSDP), which accelerate does on GPUs only")
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise ValueError("--mixed_precision fp16 needs a GPU; a CPU accepts no and bf16")
