"""
A training step of the residual quantizer, against the authors' and vector-quantize-pytorch's (minutes, on a CPU).

    git clone https://github.com/kakaobrain/rq-vae-transformer REFERENCE
    pip install vector-quantize-pytorch
    python benchmarks/quantizer.py --reference REFERENCE

2048 vectors (32 maps of 8×8), K = 16384, D = 4, C = 256, one codebook for all depths, float32: the forward pass in
training mode, which quantizes, moves the codebook and replaces dead codewords, without backward. Every one of them
starts from the same codebook, and from the state of some steps of training.

`rq_hf` (ResidualQuantizer) and `authors` (RQBottleneck) do the same: every depth moves the codebook, with decay 0.99,
and restarts codewords that attract fewer than one vector. Their codes are compared: the first steps restart
most of the codebook at eight near copies of each vector, among which rounding decides. `vector-quantize-pytorch`
(ResidualVQ, with what comes closest: decay 0.99, dead below 1, no k-means, straight-through gradient) does less: it
moves the codebook once a step, and replaces at most as many codewords as there are vectors. What is not installed or
given is left out.

Time is the least of interleaved repeats, in one process. Memory is the most that is resident during the first step
beyond module and vectors, each in a process of its own. Aims: twice as fast as the authors', 3.5 times as fast as
vector-quantize-pytorch.
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
    """A step of training on the next one of some batches: a function without arguments that returns the codes."""
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
