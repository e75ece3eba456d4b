"""Tries many bad calls, command lines and files, prints what is neither refused by name nor right, and counts.

python -m tests.fuzz --cases 3000 --seed 1
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]

import bad_files
import fuzzing
import torch
from bad_calls import TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=3000, help="calls, and a third as many command lines and files")
    parser.add_argument("--seed", type=int, default=1, help="of the cases")
    parser.add_argument("--only", default="", help="calls of targets, or files, whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    targets = [target for target in TARGETS if args.only in str(target)]
    with tempfile.TemporaryDirectory() as folder:
        bad_files.save_folder(Path(folder))
        for name, cases, verdict in (
            ("calls", fuzzing.cases(targets, args.cases, args.seed) if targets else (), fuzzing.verdict),
            ("files", bad_files.file_cases(args.cases // 3, args.seed, Path(folder)), bad_files.verdict),
        ):
            start, found = time.perf_counter(), []
            for case in cases:
                if args.only not in str(case):
                    continue
                kind, seen = verdict(case)
                found.append(kind)
                if kind in ("obscure", "wrong"):
                    print(f"{kind}: {case}\n    {seen}", flush=True)
            counts = {kind: found.count(kind) for kind in ("refused", "right", "obscure", "wrong")}
            print(f"{name}: {len(found)} cases, {counts}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
