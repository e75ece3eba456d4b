"""Runs many bad calls and counts what becomes of them: python -m tests.fuzz --cases 3000 --seed 1"""

import argparse
import sys
import time
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]

import torch
from bad_calls import TARGETS
from fuzzing import cases, tally, verdict

parser = argparse.ArgumentParser()
parser.add_argument("--cases", type=int, default=3000)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--only", default="")
args = parser.parse_args()
torch.set_num_threads(1)
start, found = time.perf_counter(), []
targets = [t for t in TARGETS if args.only in str(t)]
for case in cases(targets, args.cases, args.seed):
    found.append((*(seen := verdict(case)), case))
    if seen[0] in ("obscure", "wrong"):
        print(f"{seen[0]}: {case}\n    {seen[1]}", flush=True)
counts = tally(found)
print(counts, f"{time.perf_counter() - start:.0f} s")
