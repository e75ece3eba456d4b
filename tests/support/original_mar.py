"""Random checkpoints in the layout of the authors' MAR, under the names of the converter's table.
`test_golden_mar_checkpoints.py` compares converted models with the authors' code."""

import argparse

import torch
from diffusers import AutoencoderKL
from golden_mar import original_shapes

from rq_hf import MARTransformerConfig, MARTransformerModel
from rq_hf.convert.mar_weights import mar_parts
from rq_hf.convert.weights import rqvae_parts

HEADS = (2, 4)
MAR = {
    "latent_shape": (4, 4, 4),
    "cond_vocab_size": 6,
    "null_cond_id": 5,
    "cond_repeats": 3,
    "encoder_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": HEADS[0]},
    "decoder_config": {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": HEADS[1]},
    "head_config": {"hidden_size": 8, "num_hidden_layers": 2},
}
AUTOENCODER = {
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
}


def random_weights(shapes):
    return {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}


def original_transformer(**changes):
    """Random weights by the authors' names."""
    with torch.device("meta"):
        model = MARTransformerModel(MARTransformerConfig(**MAR | changes))
    return random_weights(original_shapes(model, mar_parts))


def original_autoencoder(**changes):
    """Random weights by the authors' names."""
    with torch.device("meta"):
        model = AutoencoderKL(**AUTOENCODER | changes)
    return random_weights(original_shapes(model, rqvae_parts))


def write_transformer(folder, weights=None, **contents):
    """A `checkpoint-last.pth` as released, or with further contents."""
    weights = original_transformer() if weights is None else weights
    path = folder / "checkpoint-last.pth"
    torch.save({"model": original_transformer(), "model_ema": weights} | contents, path)
    return path


def write_autoencoder(folder, weights=None, **contents):
    """A `kl16.ckpt`."""
    path = folder / "kl16.ckpt"
    torch.save({"model": original_autoencoder() if weights is None else weights} | contents, path)
    return path


def training_contents(**args):
    """What the authors' training adds to a checkpoint, with options of its command line."""
    return {"optimizer": {"state": {}}, "epoch": 3, "scaler": {"scale": 65536.0}, "args": argparse.Namespace(**args)}
