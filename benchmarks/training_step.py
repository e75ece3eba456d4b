"""
A training step of RQ-VAE against the authors' implementation, with the same weights (about two minutes, on a CPU).

    git clone https://github.com/kakaobrain/rq-vae-transformer REFERENCE
    python benchmarks/training_step.py --reference REFERENCE

8 images of 64×64, ch 64, ch_mult [1, 2, 2], attention at 16×16, K = 2048, D = 4, C = 256, float32: forward, mean
squared error + 0.25 · commitment loss, backward, and a step of Adam; no adversary. The model is theirs, converted; the
losses of the first step are compared. `rq_hf, bf16` is the same under autocast, for information. Without --reference,
only `rq_hf` is measured.

Time is the least of interleaved repeats, in one process. Memory is the most that is resident during the first step
beyond the model and the images, each in its own process. Aim: at least as fast as theirs.
"""

import argparse
from contextlib import nullcontext, redirect_stdout

import torch
import torch.nn.functional as F
import yaml
from measure import import_reference, least_seconds, peak_mebibytes, print_comparison

from rq_hf import RQVAEModel
from rq_hf.convert.configs import Section, rqvae_config
from rq_hf.convert.weights import concatenate, rqvae_weights

CONFIG = """
arch:
  type: rq-vae
  hparams: {bottleneck_type: rq, embed_dim: 256, n_embed: 2048, latent_shape: [16, 16, 256], code_shape: [16, 16, 4],
    shared_codebook: true, decay: 0.99, restart_unused_codes: true, loss_type: mse, latent_loss_weight: 0.25}
  ddconfig: {double_z: false, z_channels: 256, resolution: 64, in_channels: 3, out_ch: 3, ch: 64, ch_mult: [1, 2, 2],
    num_res_blocks: 2, attn_resolutions: [16], dropout: 0.0}
"""


def make_theirs(reference):
    torch.manual_seed(0)
    arch = yaml.safe_load(CONFIG)["arch"]
    with redirect_stdout(None):  # it prints the shapes
        model = import_reference(reference, "rqvae.rqvae").RQVAE(**arch["hparams"], ddconfig=arch["ddconfig"])
    return model


def make_ours(reference):
    model = RQVAEModel(**rqvae_config(Section(yaml.safe_load(CONFIG))))
    if reference:
        weights = rqvae_weights(make_theirs(reference).state_dict(), model)
        model.load_state_dict({name: concatenate(parts).clone() for name, parts in weights.items()})
    return model


def make_step(name, reference):
    """A step of training on the same images each time: a function without arguments that returns the loss."""
    model = make_theirs(reference) if name == "authors" else make_ours(reference)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    pixels = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def step():
        with torch.autocast("cpu", torch.bfloat16) if "bf16" in name else nullcontext():
            output = model(pixels)
            sample, commitment_loss = output[:2] if name == "authors" else (output.sample, output.commitment_loss)
            loss = F.mse_loss(sample, pixels) + 0.25 * commitment_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", help="a checkout of kakaobrain/rq-vae-transformer")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()

    names = ["rq_hf", *(["authors"] if args.reference else []), "rq_hf, bf16"]
    memory = {name: peak_mebibytes(make_step, name, args.reference) for name in names}
    steps = {name: make_step(name, args.reference) for name in names}
    for name, step in steps.items():
        torch.manual_seed(1)  # of the codewords that are restarted
        print(f"{name}: loss {step():.6f}")
    print_comparison(memory, least_seconds(steps, args.repeats))


if __name__ == "__main__":
    main()
