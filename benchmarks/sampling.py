"""
Time sampling and decoding of codes against the authors' implementation, with the same random weights (half an hour,
on a CPU).

    git clone https://github.com/kakaobrain/rq-vae-transformer REFERENCE
    python benchmarks/sampling.py --reference REFERENCE [--cases 512-16 decode] [--positions 8] [--repeats 5]

`512-…` samples 8×8×4 codes with a transformer 512 wide of 12 + 4 layers, K = 16384; `ffhq` with that of 355M
parameters, K = 2048. Every image has its own class, so that greedy codes differ; the temperature of 0.25 makes logits
of random weights about as peaked as those of a trained model. `decode` makes 256×256 images of 8×8×4 codes. With
--positions N only maps of 1×N positions are sampled, by both sides, which is the same work as the first N positions of
8×8.

`rq_hf` is `generate` and `decode_codes`, a batch at a time; `compiled` is the same after `pipe.compile()`; `bf16`
has weights in bfloat16. `authors` is their code as their scripts call it: the cached `sample` for a batch, and then
`decode_code` for one image after the other. Their option amp does nothing on a CPU. Nothing of theirs is changed,
but `configs.py` is left out: for annotations only it needs omegaconf, and Python 3.10. Greedy codes (top-k 1 in
theirs) and images are compared with those of `rq_hf`. Without --reference, theirs is left out.

Time is the least of interleaved repeats, in one process, per image. Memory is the most that is resident during the
first batch beyond the model, each in its own process. The shares are those of one more batch. The bound is what
arithmetic takes at the rate of a large matrix product, or reading the weights from memory as often as they are used,
whichever is longer; both rates are measured. Aims, in speed relative to the authors' in float32, greedy codes equal:

    case        threads  batch  top-k  top-p   float32  bf16
    512-1       1        1      2048   0.95    1.6      3.5
    512-16      2        16     2048   0.95    3.5      5
    512-16-all  2        16     all    0.92    5.5      8
    ffhq        2        8      2048   0.95    3        5
    decode      2        4                     1.2      2.5
"""

import argparse
from dataclasses import replace

import torch
from measure import least_seconds, machine_rates, peak_mebibytes, shares
from samplers import C, Case, D, transformer_sampler, vae_sampler, weights_of_position
from torch.utils.flop_counter import FlopCounterMode

from rq_hf import RQVAEModel

CASES = {
    "512-1": Case(threads=1, batch_size=1, width=512, top_k=2048, top_p=0.95),
    "512-16": Case(threads=2, batch_size=16, width=512, top_k=2048, top_p=0.95),
    "512-16-all": Case(threads=2, batch_size=16, width=512, top_p=0.92),
    "ffhq": Case(2, batch_size=8, width=1024, num_layers=24, codebook_size=2048, top_k=2048, top_p=0.95),
    "decode": Case(threads=2, batch_size=4),
}


def make_sampler(case, name, reference):
    """A function that samples (`greedy=True`: the most likely codes) or decodes a batch, and the parts that take its
    time by name, each an object and the name of its method."""
    torch.set_num_threads(case.threads)
    return (transformer_sampler if case.width else vae_sampler)(case, name, reference)


def make_step(*args):
    return make_sampler(*args)[0]


def bound(case, dtype):
    """Seconds per image that no implementation can do without."""
    operations_per_second, bandwidth = machine_rates(case.threads)
    height, width, _ = case.code_shape
    if not case.width:
        with torch.device("meta"):
            model = RQVAEModel.from_preset("imagenet-480m")
            model.fuse_blocks()
            with FlopCounterMode(display=False) as counter:
                model.decode(torch.empty(1, C, height, width))
        return counter.get_total_flops() / operations_per_second[dtype]
    weights = height * width * weights_of_position(case)
    return weights * max(2 / operations_per_second[dtype], dtype.itemsize / bandwidth / case.batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", help="a checkout of kakaobrain/rq-vae-transformer")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--positions", type=int, help="sample only the first positions of the map")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    baseline = "authors" if args.reference else "rq_hf"
    for label in args.cases:
        case = CASES[label]
        if args.positions and case.width:
            case = replace(case, code_shape=(1, args.positions, D))
        variants = ("rq_hf", baseline, "rq_hf, compiled", "rq_hf, bf16", "rq_hf, bf16, compiled")
        names = list(dict.fromkeys(variants))
        bounds = {name: bound(case, torch.bfloat16 if "bf16" in name else torch.float32) for name in names}
        memory = {name: peak_mebibytes(make_step, case, name, args.reference) for name in names}
        samplers = {name: make_sampler(case, name, args.reference) for name in names}
        print(f"{label}: {case}")
        results = {name: run(greedy=True).float() for name, (run, _) in samplers.items()}
        for name in names[1:]:
            difference = (results[name] - results["rq_hf"]).abs()
            equal = f"{(difference == 0).float().mean():.2%} of the codes equal"
            print(f"  {name}: {equal if case.width else f'pixels differ by at most {difference.max():.1e}'}")
        seconds = least_seconds({name: run for name, (run, _) in samplers.items()}, args.repeats)
        for name in names:
            print(
                f"  {name}: {memory[name]:.0f} MiB, {seconds[name] / case.batch_size:.4f} s/image (bound "
                f"{bounds[name]:.4f}), {seconds[baseline] / seconds[name]:.2f} times the speed of {baseline}; "
                f"{shares(*samplers[name])}",
                flush=True,
            )


if __name__ == "__main__":
    main()
