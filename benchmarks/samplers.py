"""The models that sampling.py and sampling_gpu.py time: ours and the authors', with the same random weights."""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from measure import import_reference

from rq_hf import RQTransformerModel, RQVAEModel
from rq_hf.convert.configs import Section, rqtransformer_config
from rq_hf.convert.weights import concatenate, rqtransformer_weights, rqvae_weights
from rq_hf.models.rq_transformer.code_sampling import CodeSampler
from rq_hf.models.rq_vae.fused_blocks import FusedResnetBlock, FusedUpsample

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
        methods += [(model.classifier, "forward"), (CodeSampler, "sample")]
        settings = {"temperature": TEMPERATURE, "top_k": case.top_k, "top_p": case.top_p}

        def run(greedy=False):
            return model.generate(cond_ids, do_sample=not greedy, **settings)

    return run, dict(zip(("spatial stack", "depth stack", "classifier", "sampling"), methods, strict=True))


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
        if "compiled" in name:
            classes = FusedResnetBlock, Attention, FusedUpsample
    if "bf16" in name:  # all but the quantizer, as from_pretrained does
        for module in (model.encoder, model.quant_conv, model.post_quant_conv, model.decoder):
            module.to(torch.bfloat16)

    if "compiled" in name:
        model.fuse_blocks()
        model.enable_slicing()

    def run(greedy=False):
        if name == "authors":
            return torch.cat([theirs.decode_code(image) for image in codes.split(1)])
        return model.decode_codes(codes).sample

    return run, {
        part: (layer, "__call__") for part, layer in zip(("residual blocks", "attention", "upsampling"), classes)
    }


def weights_of_position(case):
    """Weights that the codes of one position are multiplied by, as often as they are."""
    block, depth = 12 * case.width**2, case.code_shape[-1]
    return case.num_layers * block + depth * (case.depth_layers * block + case.codebook_size * case.width)
