"""The diffusion head: an MLP that denoises one token, given what the transformer says about its position
(Li et al., 2024, section 3.3).

Shapes: `N` tokens, `C` numbers of a token, `Z` width of the decoder, `w` width of the head.
"""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import nn

from .configuration_mar_transformer import MARHeadConfig
from .denoising import denoise


class MARHeadBlock(nn.Module):
    """Residual MLP, modulated by AdaLN: shift, scale and gate depend on timestep and position."""

    def __init__(self, config: MARHeadConfig):
        super().__init__()
        width = config.hidden_size
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, hidden_states: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """`(..., w)` and modulation `(..., 3·w)` -> `(..., w)`."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        modulated = torch.addcmul(shift, self.norm(hidden_states), 1 + scale)
        return torch.addcmul(hidden_states, gate, self.linear_2(F.silu(self.linear_1(modulated))))


class MARDiffusionHead(nn.Module):
    """
    Predicts the noise in a token, and the variance of the reverse step.

    Args:
        config ([`MARHeadConfig`]).
        token_dim (`int`): C.
        condition_dim (`int`): Z.
    """

    def __init__(self, config: MARHeadConfig, token_dim: int, condition_dim: int):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.input_projection = nn.Linear(token_dim, width)
        self.time_embedding = TimestepEmbedding(config.frequency_embedding_size, width)
        self.cond_projection = nn.Linear(condition_dim, width)
        self.layers = nn.ModuleList([MARHeadBlock(config) for _ in range(config.num_hidden_layers)])
        self.output_modulation = nn.Linear(width, 2 * width)
        self.output_projection = nn.Linear(width, 2 * token_dim)

    @property
    def no_weight_decay(self) -> list[str]:
        """All weights, as in the authors' recipe."""
        return [name for name, _ in self.named_parameters()]

    def forward(self, tokens: torch.Tensor, timesteps: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        """
        Args:
            tokens: x_t, `(N, C)`.
            timesteps: `(N,)`.
            conditions: z, `(N, Z)`.

        Returns:
            predicted noise and variance fractions `(N, 2·C)`.
        """
        time = self.embed_timesteps(timesteps, conditions.dtype)
        modulations = self.modulations(time, self.cond_projection(conditions))
        return self.denoise(tokens, modulations)

    def embed_timesteps(self, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`(N,)` -> `(N, w)`, computed in `dtype`."""
        size = self.config.frequency_embedding_size
        embedding = get_timestep_embedding(timesteps, size, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.time_embedding(embedding.to(dtype))

    def modulations(self, time: torch.Tensor, position: torch.Tensor) -> list[torch.Tensor]:
        """Embedded timesteps and positions, `(..., w)` each -> modulation `(..., 3·w)` of every block, and
        `(..., 2·w)` of the output. They depend on no token, so that those of a whole chain can be computed before
        it."""
        inputs = F.silu(time + position)
        return [layer.modulation(inputs) for layer in self.layers] + [self.output_modulation(inputs)]

    def denoise(self, tokens: torch.Tensor, modulations: list[torch.Tensor]) -> torch.Tensor:
        """Tokens `(N, C)` and [`modulations`] `(..., N, ·)` -> predicted noise and variance fractions
        `(..., N, 2·C)`."""
        *block_modulations, output_modulation = modulations
        hidden_states = self.input_projection(tokens)
        for layer, modulation in zip(self.layers, block_modulations):
            hidden_states = layer(hidden_states, modulation)
        shift, scale = output_modulation.chunk(2, dim=-1)
        hidden_states = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=self.config.layer_norm_eps)
        return self.output_projection(torch.addcmul(shift, hidden_states, 1 + scale))

    def sample(self, conditions: torch.Tensor, noise: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """A whole denoising chain: see [`denoise`]."""
        return denoise(self, conditions, noise, *args, **kwargs)
