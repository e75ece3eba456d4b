"""
Time sampling and decoding on a GPU with the sizes of a published model, random weights, in bfloat16.

    python benchmarks/sampling_gpu.py [--preset imagenet-1.4b] [--batch_sizes 500 100 1] [--reference REFERENCE]

Milliseconds per image: the least of --repeats after a first call, in which the pipeline after `pipe.compile()` is
compiled (minutes). `codes` are those of `generate` with top-k 2048 and top-p 0.95, `decode` of `decode_codes`,
`images` of the pipeline, which does both. `authors` is their code, as in benchmarks/sampling.py, with their option
amp. Memory is the most that torch had allocated, weights included.

The floor of the codes is what their matrix products take at the rate of a large one, or the reading of the weights if
that is longer, and the reading of keys and values; both rates are measured. With --largest, more and more images are
sampled at a time, not compiled, until memory runs out.

Aims for `imagenet-1.4b` on one H200: codes 0.9 at batch 500 and 1.4 at 100, decoding 0.8, images 1.7 at batch 500
and 90 at 1; five times the speed of the authors' code.
"""

import argparse
import itertools
from functools import partial

import torch
import torch.nn.functional as F
from measure import least_seconds
from samplers import TEMPERATURE, Case, transformer_sampler, vae_sampler, weights_of_position

from rq_hf import RQPipeline, RQTransformerConfig, RQTransformerModel, RQVAEModel

SETTINGS = {"top_k": 2048, "top_p": 0.95}


def preset_case(preset, batch_size):
    config = RQTransformerConfig.from_preset(preset)
    return Case(
        threads=torch.get_num_threads(),
        batch_size=batch_size,
        width=config.spatial_config.hidden_size,
        num_layers=config.spatial_config.num_hidden_layers,
        depth_layers=config.depth_config.num_hidden_layers,
        codebook_size=config.codebook_size,
        code_shape=config.code_shape,
        **SETTINGS,
    )


def seconds_of(steps, repeats, device):
    """The least seconds of each step, after a call that does not count."""

    def finished(step):
        step()
        torch.get_device_module(device).synchronize()

    return least_seconds({name: partial(finished, step) for name, step in steps.items()}, repeats)


def rates(device, repeats):
    """Operations per second of a large matrix product in bfloat16, bytes per second that are read."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, dtype=torch.bfloat16)
    memory = torch.ones(2**30 if device.type == "cuda" else 2**27)
    seconds = seconds_of({"product": partial(F.linear, a, a), "read": memory.sum}, repeats, device)
    return 2 * size**3 / seconds["product"], memory.nbytes / seconds["read"]


def floor(case, operations_per_second, bandwidth):
    """Seconds per image of the codes."""
    height, width, _ = case.code_shape
    positions, weights = height * width, weights_of_position(case)
    products = max(2 * weights / operations_per_second, 2 * weights / bandwidth / case.batch_size)
    keys_values = 2 * 2 * case.width * case.num_layers * positions / 2  # bytes, at a position in the middle
    return positions * (products + keys_values / bandwidth)


def pipeline(preset, device, compiled):
    torch.manual_seed(0)
    vae = RQVAEModel.from_preset(preset).eval()
    transformer = RQTransformerModel(RQTransformerConfig.from_preset(preset)).eval().to(torch.bfloat16)
    transformer.set_codebook(vae.quantizer.codebook)
    for module in (vae.encoder, vae.quant_conv, vae.post_quant_conv, vae.decoder):
        module.to(torch.bfloat16)
    pipe = RQPipeline(vae, transformer).to(device)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        pipe.compile()
    return pipe


def call_of(pipe, batch_size):
    images = {"batch_size": batch_size}
    if pipe.is_class_conditional:
        images = {"class_labels": [i % pipe.transformer.config.cond_vocab_size for i in range(batch_size)]}
    return {**images, **SETTINGS, "temperature": TEMPERATURE, "output_type": "pt"}


def steps_of(pipe, batch_size):
    call = call_of(pipe, batch_size)
    codes = pipe(**call).codes
    return {
        "codes": lambda: pipe(**call | {"output_type": "latent"}),
        "decode": lambda: pipe.decode_codes(codes, output_type="pt"),
        "images": lambda: pipe(**call),
    }


def steps_of_authors(case, reference):
    codes, _ = transformer_sampler(case, "authors", reference)
    images, _ = vae_sampler(Case(case.threads, case.batch_size), "authors", reference)
    return {"codes": codes, "decode": images}


def report(name, steps, batch_size, repeats, device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(steps, repeats, device)
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else "memory not measured"
    parts = ", ".join(f"{part} {1000 * value / batch_size:.2f}" for part, value in seconds.items())
    print(f"  batch {batch_size}: {name}, {parts} ms/image; {memory}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="imagenet-1.4b")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[500, 100, 1])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--reference", help="a checkout of kakaobrain/rq-vae-transformer")
    parser.add_argument("--largest", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    torch.set_default_device(args.device)
    speeds = rates(args.device, args.repeats)
    print(f"matrix product {speeds[0] / 1e12:.1f} TFLOP/s, memory {speeds[1] / 1e9:.0f} GB/s")
    for batch_size in args.batch_sizes:
        milliseconds = floor(preset_case(args.preset, batch_size), *speeds) * 1000
        print(f"  batch {batch_size}: floor of the codes {milliseconds:.2f} ms/image")
    for compiled in (False, True):
        pipe = pipeline(args.preset, args.device, compiled)
        name = "rq_hf, compiled" if compiled else "rq_hf"
        for batch_size in args.batch_sizes:
            report(name, steps_of(pipe, batch_size), batch_size, args.repeats, args.device)
    if args.largest:
        pipe = pipeline(args.preset, args.device, compiled=False)
        for batch_size in (2**i for i in itertools.count(9)):
            try:
                pipe(**call_of(pipe, batch_size))
            except torch.OutOfMemoryError:
                break
            print(f"{batch_size} images at a time fit", flush=True)
    del pipe
    for batch_size in args.batch_sizes if args.reference else ():
        steps = steps_of_authors(preset_case(args.preset, batch_size), args.reference)
        report("authors", steps, batch_size, args.repeats, args.device)


if __name__ == "__main__":
    main()
