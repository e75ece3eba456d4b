"""Shared by the benchmarks: minimum time of interleaved repeats, and peak memory in a new process (Linux)."""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType


def least_seconds(steps: dict[str, Callable], repeats: int) -> dict[str, float]:
    """The minimum time of each of `steps`, in seconds, after one warm-up round. The steps are interleaved, so that
    other load on the machine affects all of them."""
    seconds = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {name: min(values[1:]) for name, values in seconds.items()}


def print_comparison(memory: dict[str, float], seconds: dict[str, float]) -> None:
    """Prints memory in MiB, time in seconds, and the ratio of each time to the first."""
    first = next(iter(seconds))
    for name in seconds:
        times = seconds[name] / seconds[first]
        print(f"{name}: {memory[name]:.0f} MiB, {seconds[name]:.3f} s, {times:.2f} times {first}")


def peak_mebibytes(make_step: Callable, *args) -> float:
    """Peak resident memory of the first call of `make_step(*args)()` beyond the memory at its start, in MiB. It runs
    in a new process, so that it cannot reuse memory that was freed earlier."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_mebibytes, make_step, args).result()


def _peak_mebibytes(make_step, args):
    step = make_step(*args)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the highest VmRSS so far
    before = _kibibytes("VmRSS")
    step()
    return (_kibibytes("VmHWM") - before) / 1024


def _kibibytes(name):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0])


def import_reference(checkout: str, module: str) -> ModuleType:
    """A module of the authors' models, such as `"rqvae.rqvae"`, from a checkout of kakaobrain/rq-vae-transformer.

    The `__init__` of their package is skipped, because it imports only on old versions of Python.
    """
    package = ModuleType("reference")
    package.__path__ = [str(Path(checkout, "rqvae", "models"))]
    sys.modules.setdefault("reference", package)
    return import_module(f"reference.{module}")
