"""
A training step of the residual quantizer, compared with the authors' code and vector-quantize-pytorch (minutes, on a
CPU).

    git clone https://github.com/kakaobrain/rq-vae-transformer REFERENCE
    pip install vector-quantize-pytorch
    python benchmarks/quantizer.py --reference REFERENCE

2048 vectors (32 maps of 8×8), K = 16384, D = 4, C = 256, one codebook for all depths, float32. The forward
pass in training mode quantizes, updates the codebook and restarts unused codewords; the backward pass is not measured.
All implementations start from the same codebook and are timed after five training steps.

`rq_hf` (ResidualQuantizer) and `authors` (RQBottleneck) compute the same: every depth updates the codebook with decay
0.99, and restarts codewords that attract fewer than one vector. Their codes are compared; they can differ, because the
first steps restart most of the codebook at eight near copies of each vector, and rounding decides between these.
`vector-quantize-pytorch` (ResidualVQ, with the closest options: decay 0.99, dead below 1, no k-means, straight-through
gradient) does less: it updates the codebook once per step and replaces at most as many codewords as there are vectors.
The authors' code is left out without --reference, and vector-quantize-pytorch if it is not installed.

Time is the minimum of interleaved repeats, in one process. Memory is the peak resident memory during the first step
beyond the module and the vectors, each in a new process. Aims: twice as fast as the authors' code, 3.5 times as fast
as vector-quantize-pytorch.
"""

import argparse
import itertools
from importlib.util import find_spec

import torch
from measure import import_reference, least_seconds, peak_mebibytes, print_comparison

from rq_hf import ResidualQuantizer

B, H, W, K, D, C = 32, 8, 8, 16384, 4, 256


def rq_hf(codebook):
    module = ResidualQuantizer(K, C, D)
    module.codebook[0].copy_(codebook)
    module.cluster_sum[0].copy_(codebook)
    return module, lambda z: module(z).codes


def authors(codebook, reference):
    bottleneck = import_reference(reference, "rqvae.quantizations").RQBottleneck
    module = bottleneck((H, W, C), (H, W, D), K, decay=0.99, shared_codebook=True, restart_unused_codes=True)
    module.codebooks[0].weight[:-1].copy_(codebook)
    module.codebooks[0].embed_ema.copy_(codebook)
    return module, lambda z: module(z)[2]


def vector_quantize_pytorch(codebook):
    from vector_quantize_pytorch import ResidualVQ

    module = ResidualVQ(
        dim=C,
        num_quantizers=D,
        codebook_size=K,
        shared_codebook=True,
        decay=0.99,
        threshold_ema_dead_code=1,
        kmeans_init=False,
        rotation_trick=False,
    )
    module.layers[0]._codebook.embed.copy_(codebook)
    module.layers[0]._codebook.embed_avg.copy_(codebook)
    return module, lambda z: module(z.flatten(1, 2))[1].view(B, H, W, D)


def make_step(make_module, *args):
    """A function without arguments that takes a training step on the next of eight batches and returns the codes."""
    torch.manual_seed(0)
    codebook = torch.randn(K, C)
    batches = itertools.cycle([torch.randn(B, H, W, C, requires_grad=True) for _ in range(8)])
    with torch.no_grad():
        module, codes_of = make_module(codebook, *args)
    module.train()
    return lambda: codes_of(next(batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", help="a checkout of kakaobrain/rq-vae-transformer")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()

    modules = {"rq_hf": (rq_hf,)}
    if args.reference:
        modules["authors"] = (authors, args.reference)
    if find_spec("vector_quantize_pytorch"):
        modules["vector-quantize-pytorch"] = (vector_quantize_pytorch,)
    memory = {name: peak_mebibytes(make_step, *makers) for name, makers in modules.items()}
    steps = {name: make_step(*makers) for name, makers in modules.items()}

    for i in range(5):  # the first steps replace most of the codebook
        codes = {}
        for name, step in steps.items():
            torch.manual_seed(i)
            codes[name] = step()
        if "authors" in codes:
            print(f"step {i + 1}: {(codes['rq_hf'] == codes['authors']).float().mean():.2%} of the codes are equal")
    print_comparison(memory, least_seconds(steps, args.repeats))


if __name__ == "__main__":
    main()
