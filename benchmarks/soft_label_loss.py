"""
Cross-entropy with soft labels, fused with the classifier, compared with the direct formula (a minute, on a CPU).

    python benchmarks/soft_label_loss.py

One training batch: 32 maps of 8×8×4 codes, K = 16384, C = 256, hidden size 512, float32. A step
computes the loss from hidden states and residuals, and its gradients with respect to hidden states, weight and bias.
`fused` is `fused_linear_cross_entropy`. `plain` evaluates the formulas for the whole batch, with autograd: the soft
targets softmax(−‖r − e‖²/τ), the logits, and −Σ target · log softmax(logits), each of shape (N, D, K).

Time is the minimum of interleaved repeats, in one process. Memory is the peak resident memory beyond the inputs, each
in a new process. Aims: at most a third of the memory, at most 0.8 times the time, and loss and gradients equal to
within 1e-5 of their norms.
"""

import argparse

import torch
import torch.nn.functional as F
from measure import least_seconds, peak_mebibytes

from rq_hf.models.rq_transformer.fused_cross_entropy import fused_linear_cross_entropy

N, D, K, C, E = 32 * 8 * 8, 4, 16384, 256, 512
TEMPERATURE = 0.5


def fused(hidden_states, weight, bias, residuals, codebook):
    return fused_linear_cross_entropy(
        hidden_states, weight, bias, residuals=residuals, codebook=codebook, temperature=TEMPERATURE
    )[0]


def plain(hidden_states, weight, bias, residuals, codebook):
    targets = plain_targets(residuals, codebook[0])
    logits = F.linear(hidden_states, weight[0], bias[0])
    return -(targets * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


def plain_targets(residuals, codebook):
    squares = residuals.square().sum(dim=-1, keepdim=True) + codebook.square().sum(dim=-1)
    distances = squares - 2 * residuals @ codebook.t()
    return (distances / -TEMPERATURE).softmax(dim=-1)


def make_step(loss_of):
    """A function without arguments that returns the loss and its gradients by hidden states, weight and bias."""
    torch.manual_seed(0)
    hidden_states = torch.randn(N, D, E, requires_grad=True)
    weight = (torch.randn(1, K, E) * 0.02).requires_grad_()
    bias = torch.zeros(1, K, requires_grad=True)
    residuals = torch.randn(N, D, C) * 0.05  # squared distances of about 1: the targets are soft
    codebook = torch.randn(1, K, C) * 0.05

    def step():
        loss = loss_of(hidden_states, weight, bias, residuals, codebook)
        return loss.detach(), *torch.autograd.grad(loss, (hidden_states, weight, bias))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    memory = {loss_of.__name__: peak_mebibytes(make_step, loss_of) for loss_of in (fused, plain)}
    steps = {loss_of.__name__: make_step(loss_of) for loss_of in (fused, plain)}
    for name, ours, theirs in zip(("loss", "∂hidden", "∂weight", "∂bias"), steps["fused"](), steps["plain"]()):
        print(f"{name}: relative difference {((ours - theirs).norm() / theirs.norm()).item():.1e}")
    seconds = least_seconds(steps, args.repeats)
    for name in steps:
        print(f"{name}: {memory[name]:.0f} MiB, {seconds[name]:.2f} s")
    print(
        f"fused / plain: {memory['fused'] / memory['plain']:.2f} of the memory, "
        f"{seconds['fused'] / seconds['plain']:.2f} of the time"
    )


if __name__ == "__main__":
    main()
