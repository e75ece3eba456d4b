"""The diffusion process of one token and its loss (Li et al., 2024, section 3.2; Nichol and Dhariwal, 2021).

Noising: x_t = √ᾱ_t·x + √(1 − ᾱ_t)·ε with a cosine schedule of 1000 timesteps. The head predicts ε, and for every
number a fraction v of the way from the smallest to the largest log-variance of the reverse step.

Shapes: `N` tokens, `C` numbers of a token, `S` denoising steps.
"""

import math
from dataclasses import dataclass

import torch

NUM_TRAIN_TIMESTEPS = 1000
LOG_2 = math.log(2)
BIN = 1 / 255  # half the width of the bins in which the likelihood at t = 0 is measured


@dataclass(frozen=True)
class DiffusionProcess:
    """
    The process over S of the timesteps 0 to 999: tables `(S,)`, ascending in t, in float64.

    Args:
        timesteps: int64.
        alphas_cumprod, alphas_cumprod_prev: ᾱ of every timestep, and of the one before it, 1 at first.
        betas: 1 − ᾱ / ᾱ_prev.
    """

    timesteps: torch.Tensor
    alphas_cumprod: torch.Tensor
    alphas_cumprod_prev: torch.Tensor
    betas: torch.Tensor

    @classmethod
    def over(cls, timesteps: torch.Tensor) -> "DiffusionProcess":
        """The process over these timesteps, ascending."""
        alphas_cumprod = ALPHAS_CUMPROD[timesteps]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        return cls(timesteps, alphas_cumprod, previous, 1 - alphas_cumprod / previous)

    @property
    def sqrt_recip_alphas_cumprod(self) -> torch.Tensor:
        return (1 / self.alphas_cumprod).sqrt()

    @property
    def sqrt_recipm1_alphas_cumprod(self) -> torch.Tensor:
        return (1 / self.alphas_cumprod - 1).sqrt()

    @property
    def posterior_variance(self) -> torch.Tensor:
        """Of q(x_{t−1} | x_t, x): the smallest variance of the reverse step. β is the largest."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_log_variance_clipped(self) -> torch.Tensor:
        """Its logarithm; the first, of 0, is replaced by the second."""
        variance = self.posterior_variance
        return torch.cat([variance[1:2], variance[1:]]).log()

    @property
    def posterior_mean_coef1(self) -> torch.Tensor:
        """Factor of x in the mean of q(x_{t−1} | x_t, x)."""
        return self.betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)

    @property
    def posterior_mean_coef2(self) -> torch.Tensor:
        """Factor of x_t in it."""
        return (1 - self.alphas_cumprod_prev) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)


def cosine_betas() -> torch.Tensor:
    """β of all 1000 timesteps, float64: those of the `"squaredcos_cap_v2"` schedule of diffusers."""
    share = torch.arange(NUM_TRAIN_TIMESTEPS + 1, dtype=torch.float64) / NUM_TRAIN_TIMESTEPS
    alphas_cumprod = ((share + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)


def spaced_timesteps(num_steps: int) -> torch.Tensor:
    """`(S,)` timesteps, ascending and evenly spaced from 0 to 999, rounded half to even as in the authors' code."""
    stride, position, timesteps = (NUM_TRAIN_TIMESTEPS - 1) / (num_steps - 1), 0.0, []
    for _ in range(num_steps):
        timesteps.append(round(position))
        position += stride  # summed up, because rounding depends on it
    return torch.tensor(timesteps)


ALPHAS_CUMPROD = (1 - cosine_betas()).cumprod(0)
TRAINING_PROCESS = DiffusionProcess.over(torch.arange(NUM_TRAIN_TIMESTEPS))


def take(table: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Values `(N, 1)` of a table `(1000,)`, float32."""
    return table.to(timesteps.device, torch.float32)[timesteps][:, None]


def add_noise(tokens: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """x_t of tokens `(N, C)`, noise ε `(N, C)` and timesteps `(N,)` in [0, 1000)."""
    alphas_cumprod = TRAINING_PROCESS.alphas_cumprod
    return take(alphas_cumprod.sqrt(), timesteps) * tokens + take((1 - alphas_cumprod).sqrt(), timesteps) * noise


def diffusion_loss(
    tokens: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, prediction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The two terms of the diffusion loss, each averaged over the numbers of a token: ‖ε − ε_θ‖² (equation 1 of the
    paper), and the variational bound in bits, from which only the variances learn (Nichol and Dhariwal, 2021, section
    3.1). In float32, whatever autocast says.

    Args:
        tokens, noise: x and ε, `(N, C)`.
        timesteps: `(N,)` in [0, 1000).
        prediction: ε_θ and the variance fractions v, `(N, 2·C)`.

    Returns:
        squared errors `(N,)` and bounds `(N,)`; the loss is the mean of their sum.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        tokens, noise = tokens.float(), noise.float()
        predicted_noise, fraction = prediction.float().chunk(2, dim=-1)
        squared_error = (noise - predicted_noise).square().mean(dim=-1)

        process = TRAINING_PROCESS
        smallest = take(process.posterior_log_variance_clipped, timesteps)
        log_variance = interpolate(fraction, smallest, take(process.betas.log(), timesteps))
        # What the predicted mean of the reverse step differs by from that of q(x_{t−1} | x_t, x).
        difference = noise - predicted_noise.detach()
        difference = difference * take(process.posterior_mean_coef1 * process.sqrt_recipm1_alphas_cumprod, timesteps)
        divergence = 0.5 * (
            log_variance - smallest - 1 + (smallest - log_variance).exp() + difference.square() / log_variance.exp()
        )
        # At t = 0, where the mean of q is x itself.
        likelihood = binned_log_likelihood(tokens, tokens + difference, log_variance / 2)
        bound = torch.where(timesteps[:, None] == 0, -likelihood, divergence).mean(dim=-1) / LOG_2
    return squared_error, bound


def interpolate(fraction: torch.Tensor, smallest: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Log-variances at the fractions in about [-1, 1] of the way from the smallest to the largest."""
    return (largest + smallest) / 2 + fraction * ((largest - smallest) / 2)


def binned_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Logarithm of the probability that a normal distribution gives to the bin [x − 1/255, x + 1/255], which is open
    beyond ±0.999."""
    above = normal_cdf((x - mean + BIN) * (-log_std).exp())
    below = normal_cdf((x - mean - BIN) * (-log_std).exp())
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """The approximation by tanh that the authors' code uses."""
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
