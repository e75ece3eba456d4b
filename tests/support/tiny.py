"""Tiny models of all kinds. All sizes differ, so that no two dimensions can be mistaken for each other."""

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rq_hf import (
    MARPipeline,
    MARTransformerConfig,
    MARTransformerModel,
    RQEmbeddingModel,
    RQPipeline,
    RQTransformerConfig,
    RQTransformerModel,
    RQVAEModel,
)
from rq_hf.models.mar_transformer.denoising import default_scheduler
from rq_hf.text import train_tokenizer

H, W, D, K, C, L, E = 2, 3, 4, 12, 6, 5, 16
T = H * W
F = 2  # pixels per position
NUM_CLASSES = 4
STACK = {"hidden_size": E, "num_attention_heads": 2, "hidden_dropout": 0.0, "initializer_range": 0.2}
CONDITIONS = {
    "none": {},
    "class": {"cond_vocab_size": NUM_CLASSES + 1, "null_cond_id": NUM_CLASSES},
    "text": {"cond_vocab_size": 270, "cond_length": L, "null_cond_id": 0},
}
KINDS = list(CONDITIONS)
CALLS = {"none": {}, "class": {"class_labels": [0, 2]}, "text": {"prompt": ["red apple", "fire engine"]}}
HEIGHT, WIDTH = H * F, W * F
# Size of what a MAR samples whose head predicts little noise: 1 / √ᾱ at the last timestep.
MAR_SCALE = 2e4
MAR_CALL = {"num_iterations": 3, "num_inference_steps": 2}
kinds = pytest.mark.parametrize("kind", KINDS)
CAPTIONS = ["red apple", "green apple", "fire engine", "red fire", "green engine"]


def tiny_vae(**overrides):
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 10,
        "codebook_dim": C,
        "codebook_size": K,
        "depth": D,
        "sample_size": 8,
    }
    vae = RQVAEModel(**config | overrides).eval()
    vae.quantizer.codebook.data *= 0.3  # about the size of the features, so that images differ in their codes
    return vae


def tiny_embedding(**overrides):
    config = {"input_dim": 14, "hidden_dims": (40, 30), "latent_dim": C, "codebook_size": (5, K, 7), "depth": 3}
    return RQEmbeddingModel(**config | overrides).fit(tiny_vectors(64)).eval()


def tiny_vectors(count=2):
    return torch.randn(count, 14) + torch.arange(14)


def tiny_config(kind="none", **overrides):
    config = {
        "code_shape": (H, W, D),
        "codebook_size": K,
        "codebook_dim": C,
        "spatial_config": STACK | {"num_hidden_layers": 2},
        "depth_config": STACK | {"num_hidden_layers": 1},
        "initializer_range": 0.3,
    }
    return RQTransformerConfig(**config | CONDITIONS[kind] | overrides)


def tiny_transformer(kind="none", **overrides):
    return RQTransformerModel(tiny_config(kind, **overrides)).eval()


def tiny_tokenizer():
    return train_tokenizer(iter(CAPTIONS), CONDITIONS["text"]["cond_vocab_size"], max_length=L)


def tiny_pipeline(kind="none", **overrides):
    vae, transformer = tiny_vae(), tiny_transformer(kind, **overrides)
    transformer.set_codebook(vae.quantizer.codebook)
    pipe = RQPipeline(vae, transformer, tiny_tokenizer() if kind == "text" else None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_kl(**overrides):
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": C,
        "sample_size": 8,
        "scaling_factor": MAR_SCALE,
    }
    return AutoencoderKL(**config | overrides).eval()


def tiny_mar_config(kind="none", **overrides):
    stack = {"num_attention_heads": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    config = {
        "latent_shape": (C, H, W),
        "cond_repeats": 3 if kind == "class" else 1,
        "encoder_config": stack | {"hidden_size": E, "num_hidden_layers": 2},
        "decoder_config": stack | {"hidden_size": E + 4, "num_hidden_layers": 2},
        "head_config": {"hidden_size": 14, "num_hidden_layers": 1, "frequency_embedding_size": 8},
        "initializer_range": 0.3,
    }
    return MARTransformerConfig(**config | CONDITIONS[kind] | overrides)


def tiny_mar(kind="none", **overrides):
    """A model whose samples depend on everything; a new head predicts 0."""
    model = MARTransformerModel(tiny_mar_config(kind, **overrides)).eval()
    head = model.head
    for linear in (*(layer.modulation for layer in head.layers), head.output_modulation, head.output_projection):
        torch.nn.init.normal_(linear.weight, std=0.1)
    return model


def tiny_mar_pipeline(kind="none", vae=tiny_kl, **overrides):
    vae, transformer = vae(scaling_factor=MAR_SCALE), tiny_mar(kind, **overrides)
    pipe = MARPipeline(vae, transformer, default_scheduler(), tiny_tokenizer() if kind == "text" else None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_latents(batch_size=2, shape=(C, H, W)):
    return MAR_SCALE * torch.randn(batch_size, *shape)


def tiny_codes(batch_size=2, shape=(H, W, D)):
    return torch.randint(K, (batch_size, *shape))


def tiny_condition(kind, batch_size=2):
    if kind == "none":
        return None
    return torch.randint(CONDITIONS[kind]["cond_vocab_size"] - 1, (batch_size, L if kind == "text" else 1))


def tiny_pixels(batch_size=2, height=H * F, width=W * F, channels=3):
    return torch.rand(batch_size, channels, height, width) * 2 - 1


def same_state(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


class LargestTensor(TorchDispatchMode):
    """Within `with LargestTensor() as largest`, keeps the bytes of the largest tensor that any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out
