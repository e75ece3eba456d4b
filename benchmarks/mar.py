"""
Time sampling from a MAR transformer against the authors' implementation, with the same random weights and the same
random numbers (an hour, on a CPU).

    git clone https://github.com/LTH14/mar REFERENCE
    pip install timm==0.9.12 scipy
    python benchmarks/mar.py --reference REFERENCE [--batch_sizes 1 4] [--guidance_scales 1 3] [--repeats 3]

MAR-B with 256 tokens of 16 numbers, a head of 6×1024, 8 iterations and 25 denoising steps; every image has its own
class. `--size tiny` is a model for trying the script out. What is zero at first in a head is random here, and small,
so that samples are of the order of 1 / √ᾱ, 2·10⁴.

`rq_hf` is `generate`; `compiled` is the same after `pipe.compile()`; `bf16` has weights in bfloat16. `authors` is
their `sample_tokens` in float32. Of theirs only `Tensor.cuda` is replaced, and where random numbers come from; for
timm, a missing torchvision, of which nothing runs here. In float32 all tokens must be equal within 1e-3 of their
standard deviation. Without --reference, theirs is left out.

Time is the least of interleaved repeats, in one process, per image. Memory is the most that is resident during the
first batch beyond the model, each in its own process. The shares are those of one more batch. The bound is what the
matrix products of `rq_hf` take at the measured rate of a large one. Aims with guidance, in speed relative to the
authors': 2.5 in float32, 4 in bf16.
"""

import argparse
import itertools
import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple
from unittest.mock import MagicMock, patch

import torch
from measure import least_seconds, machine_rates, peak_mebibytes, shares
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rq_hf import MARPipeline, MARTransformerConfig, MARTransformerModel
from rq_hf.convert.mar_weights import mar_parts
from rq_hf.convert.weights import concatenate, take_weights

CLASSES = 1000
TINY = {"img_size": 64, "vae_embed_dim": 6, "buffer_size": 4, "diffloss_d": 2, "diffloss_w": 24}
TINY |= {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in (("depth", 2), ("num_heads", 4))}
TINY |= {"encoder_embed_dim": 32, "decoder_embed_dim": 32}
TORCHVISION = ("", ".datasets", ".datasets.folder", ".models", ".models.feature_extraction", ".ops", ".ops.misc")
TORCHVISION += (".transforms", ".transforms.functional")
TOLERANCE = 1e-3


class Case(NamedTuple):
    size: str
    batch_size: int
    guidance_scale: float
    num_iterations: int
    num_steps: int
    threads: int


def import_reference(checkout):
    """The authors' module `models.mar`."""
    sys.path.append(checkout)
    missing = {} if find_spec("torchvision") else {f"torchvision{name}": MagicMock() for name in TORCHVISION}
    sys.modules.update(missing)
    try:
        return import_module("models.mar")
    finally:
        for name in missing:
            del sys.modules[name]


def their_model(case, reference):
    module = import_reference(reference)
    if case.size == "tiny":
        make = partial(module.MAR, **TINY, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    else:
        make = partial(module.mar_base, diffloss_d=6, diffloss_w=1024)
    model = make(class_num=CLASSES, num_sampling_steps=str(case.num_steps)).eval()
    fill_zeros(model.diffloss.net)
    return model


def our_model(case, theirs):
    """With the weights of `theirs`, if any."""
    config = tiny_config() if case.size == "tiny" else MARTransformerConfig.from_preset("mar-base")
    model = MARTransformerModel(config).eval()
    if theirs is None:
        fill_zeros(model.head)
    else:
        parts = take_weights(theirs.state_dict(), model, mar_parts)
        model.load_state_dict({name: concatenate(parts[name]) for name in parts})
    return model


def tiny_config():
    stack = {"hidden_size": TINY["encoder_embed_dim"], "num_hidden_layers": TINY["encoder_depth"]}
    stack |= {"num_attention_heads": TINY["encoder_num_heads"]}
    return MARTransformerConfig(
        latent_shape=(TINY["vae_embed_dim"], TINY["img_size"] // 16, TINY["img_size"] // 16),
        cond_vocab_size=CLASSES + 1,
        cond_repeats=TINY["buffer_size"],
        null_cond_id=CLASSES,
        encoder_config=stack,
        decoder_config=stack,
        head_config={"hidden_size": TINY["diffloss_w"], "num_hidden_layers": TINY["diffloss_d"]},
    )


def fill_zeros(head):
    for module in head.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)


def make_sampler(case, name, reference):
    """A function that samples a batch of latents, and the parts that take its time by name, each an object and the
    name of its method."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    labels = torch.arange(case.batch_size)
    theirs = their_model(case, reference) if reference else None
    if name == "authors":
        methods = [(theirs, "forward_mae_encoder"), (theirs, "forward_mae_decoder"), (theirs.diffloss, "sample")]
        run = partial(sample_theirs, theirs, case, labels)
    else:
        model = our_model(case, theirs)
        if "bf16" in name:
            model.to(torch.bfloat16)
        if "compiled" in name:
            MARPipeline(None, model, None).compile()
        methods = [(model, "encode"), (model, "decode"), (model.head, "sample")]

        def run():
            return model.generate(
                labels,
                num_iterations=case.num_iterations,
                num_inference_steps=case.num_steps,
                guidance_scale=case.guidance_scale,
                generator=torch.Generator().manual_seed(0),
            )

    return run, dict(zip(("encoder", "decoder", "head"), methods, strict=True))


def make_step(*args):
    return make_sampler(*args)[0]


@torch.no_grad()
def sample_theirs(model, case, labels):
    """Their sampling, with the random numbers of ours: an order per image, and then for every iteration those of all
    its steps at once."""
    generator, randn, noise = torch.Generator().manual_seed(0), torch.randn, iter(())

    def sample_orders(batch_size):
        return torch.rand(batch_size, model.seq_len, generator=generator, dtype=torch.float64).argsort(dim=-1)

    def first_noise(*shape):
        nonlocal noise
        noise = iter(randn(1 + case.num_steps, *shape, generator=generator))
        return next(noise)

    def noise_of_step(x):  # with guidance, that of the second half makes no difference
        numbers = next(noise)
        return numbers.repeat(len(x) // len(numbers), 1)

    with (
        patch.object(torch.Tensor, "cuda", lambda self: self),
        patch.object(model, "sample_orders", sample_orders),
        patch.object(torch, "randn", first_noise),
        patch.object(torch, "randn_like", noise_of_step),
    ):
        return model.sample_tokens(case.batch_size, case.num_iterations, case.guidance_scale, labels=labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", help="a checkout of LTH14/mar")
    parser.add_argument("--size", choices=["base", "tiny"], default="base")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--num_iterations", type=int, default=8)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    names = ["rq_hf", "rq_hf, compiled", "rq_hf, bf16", "rq_hf, bf16, compiled"]
    if args.reference:
        names.insert(0, "authors")
    operations_per_second, _ = machine_rates(args.threads)
    print("| batch, guidance | | s/image (bound) | speed | shares | memory | tokens differ by |\n" + "|---" * 7 + "|")
    for guidance_scale, batch_size in itertools.product(args.guidance_scales, args.batch_sizes):
        case = Case(args.size, batch_size, guidance_scale, args.num_iterations, args.num_inference_steps, args.threads)
        memory = {name: peak_mebibytes(make_step, case, name, args.reference) for name in names}
        samplers = {name: make_sampler(case, name, args.reference) for name in names}
        with FlopCounterMode(display=False) as counter:
            expected = samplers["rq_hf"][0]()
        differences = {name: (run() - expected).abs().max() / expected.std() for name, (run, _) in samplers.items()}
        seconds = least_seconds({name: run for name, (run, _) in samplers.items()}, args.repeats)
        for name in names:
            rate = operations_per_second[torch.bfloat16 if "bf16" in name else torch.float32]
            print(
                f"| {batch_size}, {guidance_scale:g} | {name} | {seconds[name] / batch_size:.3f} "
                f"({counter.get_total_flops() / rate / batch_size:.3f}) | {seconds[names[0]] / seconds[name]:.2f}× "
                f"| {shares(*samplers[name])} | {memory[name]:.0f} MiB | {differences[name]:.1e} |",
                flush=True,
            )
            if "bf16" not in name:
                assert differences[name] < TOLERANCE, f"{name}: tokens differ by {differences[name]:.1e}"


if __name__ == "__main__":
    main()
