"""The time of `import rq_hf`, beside that of importing what it builds on.

    python benchmarks/import_time.py [--repeats 5]

Every import runs in a fresh process with warm file caches, and the fastest counts. The libraries import their classes
when they are first used: `import torch, transformers, diffusers` alone leaves out most of what any model of theirs
needs. Therefore there is a line with that, and one with the base classes of a model and a pipeline.
"""

import argparse
import subprocess
import sys

LIBRARIES = "import torch, transformers, diffusers"
CLASSES = "from transformers import AutoModel, PreTrainedModel; from diffusers import DiffusionPipeline, ModelMixin"
IMPORTS = {
    "libraries": LIBRARIES,
    "libraries and base classes": f"{LIBRARIES}; {CLASSES}",
    "rq_hf": "import rq_hf",
}
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(statement: str) -> float:
    command = [sys.executable, "-c", TIMED.format(statement)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    runs = [{name: seconds(statement) for name, statement in IMPORTS.items()} for _ in range(args.repeats + 1)]
    fastest = {name: min(run[name] for run in runs[1:]) for name in IMPORTS}
    for name, time in fastest.items():
        print(f"{name}: {time:.2f} s; rq_hf takes {fastest['rq_hf'] / time:.2f} times as long")


if __name__ == "__main__":
    main()
