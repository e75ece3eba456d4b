"""Shared by the benchmarks: minimum time of interleaved repeats, its parts, rates of the machine, and peak memory in a
new process (Linux)."""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
import torch.nn.functional as F


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


def shares(run: Callable, parts: dict[str, tuple[object, str]]) -> str:
    """The shares of parts in the time of `run()`: each an object and the name of its method."""
    seconds = dict.fromkeys(parts, 0.0)

    def timed(name, function):
        def wrapper(*args, **kwargs):
            started = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[name] += time.perf_counter() - started
            return result

        return wrapper

    with ExitStack() as patches:
        for name, method in parts.items():
            patches.enter_context(patch.object(*method, timed(name, getattr(*method))))
        started = time.perf_counter()
        run()
        total = time.perf_counter() - started
    seconds["rest"] = total - sum(seconds.values())
    return ", ".join(f"{name} {value / total:.0%}" for name, value in seconds.items())


@cache
def machine_rates(threads: int) -> tuple[dict[torch.dtype, float], float]:
    """What this machine does with this many threads: operations per second by dtype, bytes read per second."""
    torch.set_num_threads(threads)
    memory = torch.ones(2**27)  # 512 MiB
    steps, dtypes = {"read": memory.sum}, (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        a = torch.randn(2048, 2048, dtype=dtype)
        steps[dtype, "linear"] = partial(F.linear, a, a)
        steps[dtype, "convolution"] = partial(F.conv2d, a.view(1, 2048, 32, 64), a.view(2048, 2048, 1, 1))
    seconds = least_seconds(steps, repeats=5)
    products = {dtype: min(seconds[dtype, "linear"], seconds[dtype, "convolution"]) for dtype in dtypes}
    rates = {dtype: 2 * 2048**3 / products[dtype] for dtype in dtypes}, memory.nbytes / seconds["read"]
    products = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in rates[0].items())
    print(f"{threads} thread(s): matrix product {products}; memory {rates[1] / 1e9:.0f} GB/s")
    return rates


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
