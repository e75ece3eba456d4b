"""
Drawing and decoding codes against the authors' implementation, with the same random weights (half an hour, on a CPU).

    git clone https://github.com/kakaobrain/rq-vae-transformer REFERENCE
    python benchmarks/sampling.py --reference REFERENCE [--cases 512-16 decode] [--positions 8] [--repeats 5]

`512-…` draws 8×8×4 codes with a transformer 512 wide of 12 + 4 layers, K = 16384; `ffhq` with that of 355M parameters,
K = 2048. Every image has its own class, so that greedy codes differ; the temperature of 0.25 makes logits of random
weights about as peaked as those of a trained model. `decode` makes 256×256 pictures of 8×8×4 codes. With --positions N
only maps of 1×N positions are drawn, by both sides, which is the same work as the first N positions of 8×8.

`rq_hf` is `generate` and `decode_codes`, a batch at a time; `compiled` is the same after `pipe.compile()`; `bf16`
has weights in bfloat16. `authors` is their code as their scripts call it: the cached `sample` for a batch, and then
`decode_code` for one picture after the other. Their option amp does nothing on a CPU. Nothing of theirs is changed,
but `configs.py` is left out: for annotations only it needs omegaconf, and Python 3.10. Greedy codes (top-k 1 in
theirs) and pictures are compared with those of `rq_hf`. Without --reference, theirs is left out.

Time is the least of interleaved repeats, in one process, per image. Memory is the most that is resident during the
first batch beyond the model, each in a process of its own. The shares are those of one more batch. The bound is what
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
import json
import sys
import time
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache, partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from measure import import_reference, least_seconds, peak_mebibytes
from torch.utils.flop_counter import FlopCounterMode

from rq_hf import RQTransformerModel, RQVAEModel
from rq_hf.convert.configs import Section, rqtransformer_config
from rq_hf.convert.weights import concatenate, rqtransformer_weights, rqvae_weights
from rq_hf.models.rq_transformer.code_sampling import CodeSampler

C, D = 256, 4
TEMPERATURE = 0.25
FLAGS = ("input_emb_vqvae", "head_emb_vqvae", "cumsum_depth_ctx", "shared_tok_emb", "shared_cls_emb")


@dataclass(frozen=True)
class Case:
    threads: int
    batch_size: int
    width: int | None = None  # of a transformer; None decodes
    num_layers: int = 12
    depth_layers: int = 4
    codebook_size: int = 16384
    top_k: int | None = None
    top_p: float = 1.0
    code_shape: tuple[int, int, int] = (8, 8, D)


CASES = {
    "512-1": Case(threads=1, batch_size=1, width=512, top_k=2048, top_p=0.95),
    "512-16": Case(threads=2, batch_size=16, width=512, top_k=2048, top_p=0.95),
    "512-16-all": Case(threads=2, batch_size=16, width=512, top_p=0.92),
    "ffhq": Case(2, batch_size=8, width=1024, num_layers=24, codebook_size=2048, top_k=2048, top_p=0.95),
    "decode": Case(threads=2, batch_size=4),
}


def transformer_arch(case):
    """`arch` of the authors' config.yaml."""
    block = {"n_head": case.width // 64, "embed_dim": case.width, "gelu": "v1", "attn_pdrop": 0.0, "resid_pdrop": 0.1}
    block |= {"attn_bias": True, "mlp_bias": True}
    arch = {"block_size": case.code_shape, "embed_dim": case.width, "input_embed_dim": C, "embd_pdrop": 0.0}
    arch |= {"vocab_size": case.codebook_size, "vocab_size_cond": case.batch_size, "block_size_cond": 1}
    arch |= dict.fromkeys(FLAGS, True)
    return arch | {
        "body": {"n_layer": case.num_layers, "block": block},
        "head": {"n_layer": case.depth_layers, "block": block},
    }


def import_transformers(reference):
    """The authors' module of this name."""
    names = ("AttentionBlockConfig", "AttentionStackConfig", "RQTransformerConfig")
    sys.modules["reference.rqtransformer.configs"] = SimpleNamespace(**dict.fromkeys(names))
    sys.path.append(reference)  # of rqvae.utils and rqvae.optimizer
    return import_reference(reference, "rqtransformer.transformers")


def transformer_sampler(case, name, reference):
    torch.manual_seed(0)
    arch, cond_ids = transformer_arch(case), torch.arange(case.batch_size)
    with torch.device("meta" if reference else "cpu"):
        model = RQTransformerModel(rqtransformer_config(Section({"arch": arch}), shared_codebook=True)).eval()
    if reference:
        module = import_transformers(reference)
        options = json.loads(json.dumps(arch), object_hook=lambda section: SimpleNamespace(**section))
        options.copy = lambda: options
        theirs = module.RQTransformer(options).eval()
        quantizations = import_reference(reference, "rqvae.quantizations")
        bottleneck = quantizations.RQBottleneck((8, 8, C), (8, 8, D), case.codebook_size, shared_codebook=True)
        weights = {
            ours: concatenate(parts) for ours, parts in rqtransformer_weights(theirs.state_dict(), model).items()
        }
        model.load_state_dict(weights | {"codebook": bottleneck.codebooks[0].weight[None, :-1]}, assign=True)

    if name == "authors":
        start = torch.zeros(case.batch_size, *case.code_shape, dtype=torch.long)
        vae = SimpleNamespace(get_code_emb_with_depth=bottleneck.embed_code_with_depth)
        methods = [(theirs.body_transformer, "cached_forward"), (theirs.head_transformer, "cached_forward")]
        methods += [(theirs.classifier, "forward"), (module, "sample_from_logits")]

        def run(greedy=False):
            top_k, top_p = (1, None) if greedy else (case.top_k, case.top_p)
            amp = start.is_cuda
            return theirs.sample(start, vae, cond_ids, temperature=TEMPERATURE, top_k=top_k, top_p=top_p, amp=amp)
    else:
        if "bf16" in name:
            model.to(torch.bfloat16)
        if "compiled" in name:
            prepare = model.pack_weights if model.device.type == "cpu" else model.compile_steps
            prepare()
        methods = [(model.spatial_stack, "forward"), (model.depth_stack, "forward")]
        methods += [(model.classifier, "forward"), (CodeSampler, "draw")]
        settings = {"temperature": TEMPERATURE, "top_k": case.top_k, "top_p": case.top_p}

        def run(greedy=False):
            return model.generate(cond_ids, do_sample=not greedy, **settings)

    return run, dict(zip(("spatial stack", "depth stack", "classifier", "draw"), methods, strict=True))


def vae_sampler(case, name, reference):
    torch.manual_seed(0)
    model = RQVAEModel.from_preset("imagenet-480m").eval()
    codes = torch.randint(case.codebook_size, (case.batch_size, *case.code_shape))
    if reference:
        hparams = {"n_embed": case.codebook_size, "embed_dim": C, "latent_shape": [8, 8, C], "code_shape": [8, 8, D]}
        ddconfig = {"z_channels": C, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "double_z": False}
        ddconfig |= {"ch_mult": [1, 1, 2, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [8]}
        hparams |= {"shared_codebook": True, "restart_unused_codes": True, "ddconfig": ddconfig}
        with redirect_stdout(None):  # it prints the shapes
            theirs = import_reference(reference, "rqvae.rqvae").RQVAE(**hparams).eval()
        weights = rqvae_weights(theirs.state_dict(), model)
        model.load_state_dict({ours: concatenate(parts) for ours, parts in weights.items()})

    if name == "authors":
        layers = import_reference(reference, "rqvae.layers")
        classes = layers.ResnetBlock, layers.AttnBlock, layers.Upsample
    else:
        classes = ResnetBlock2D, Attention, Upsample2D
    if "bf16" in name:  # all but the quantizer, as from_pretrained does
        for module in (model.encoder, model.quant_conv, model.post_quant_conv, model.decoder):
            module.to(torch.bfloat16)

    if "compiled" in name:
        model.fuse_blocks()
        model.enable_slicing()

    def run(greedy=False):
        if name == "authors":
            return torch.cat([theirs.decode_code(picture) for picture in codes.split(1)])
        return model.decode_codes(codes).sample

    return run, {
        part: (layer, "__call__") for part, layer in zip(("residual blocks", "attention", "upsampling"), classes)
    }


def make_sampler(case, name, reference):
    """A function that draws (`greedy=True`: the most likely codes) or decodes a batch, and what takes its time: named
    parts, each an object and the name of its method."""
    torch.set_num_threads(case.threads)
    return (transformer_sampler if case.width else vae_sampler)(case, name, reference)


def make_step(*args):
    return make_sampler(*args)[0]


def shares(run, parts):
    """The shares of the parts in the time of a batch."""
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
def machine_rates(threads):
    """What this machine does with so many threads: operations per second by dtype, bytes read per second."""
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


def weights_of_position(case):
    """Weights that the codes of one position are multiplied by, as often as they are."""
    block, depth = 12 * case.width**2, case.code_shape[-1]
    return case.num_layers * block + depth * (case.depth_layers * block + case.codebook_size * case.width)


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
    parser.add_argument("--positions", type=int, help="draw only the first ones of the map")
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
