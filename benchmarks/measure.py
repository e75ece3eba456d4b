"""What the benchmarks share: time as the best of interleaved repeats, memory in a process of its own (Linux)."""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType


def least_seconds(steps: dict[str, Callable], repeats: int) -> dict[str, float]:
    """The least seconds that each of `steps` took. They take turns, so that a busy machine is busy for all of them,
    after one round that does not count."""
    seconds = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {name: min(values[1:]) for name, values in seconds.items()}


def print_comparison(memory: dict[str, float], seconds: dict[str, float]) -> None:
    """MiB and seconds of each, and how many times the seconds of the first."""
    first = next(iter(seconds))
    for name in seconds:
        times = seconds[name] / seconds[first]
        print(f"{name}: {memory[name]:.0f} MiB, {seconds[name]:.3f} s, {times:.2f} times {first}")


def peak_mebibytes(make_step: Callable, *args) -> float:
    """Resident memory, in MiB, that the first call of `make_step(*args)()` takes at its peak beyond what is there when
    it begins: in a new process, where nothing freed earlier can be used again."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_mebibytes, make_step, args).result()


def _peak_mebibytes(make_step, args):
    step = make_step(*args)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the highest VmRSS so far, starts anew
    before = _kibibytes("VmRSS")
    step()
    return (_kibibytes("VmHWM") - before) / 1024


def _kibibytes(name):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0])


def import_reference(checkout: str, module: str) -> ModuleType:
    """A module of the authors' models, such as `"rqvae.rqvae"`, from a checkout of kakaobrain/rq-vae-transformer.

    Their package as a whole imports only on old versions of Python: its `__init__` is left out.
    """
    package = ModuleType("reference")
    package.__path__ = [str(Path(checkout, "rqvae", "models"))]
    sys.modules.setdefault("reference", package)
    return import_module(f"reference.{module}")
