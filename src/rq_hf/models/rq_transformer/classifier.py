"""The classifier of the RQ-Transformer: logits, their guidance, and their loss."""

import torch
import torch.nn.functional as F
from torch import nn

from ..offloading import onload_weights
from .configuration_rq_transformer import RQTransformerConfig
from .fused_cross_entropy import fused_linear_cross_entropy


class RQClassifier(nn.Module):
    """Layer norm, then a linear map to the K logits; one map for all depths (M = 1) or one per depth (M = D)."""

    def __init__(self, config: RQTransformerConfig):
        super().__init__()
        num_classifiers = 1 if config.shared_classifier else config.code_shape[-1]
        hidden_size = config.spatial_config.hidden_size
        self.norm = nn.LayerNorm(hidden_size, eps=config.depth_config.layer_norm_eps)
        self.weight = nn.Parameter(torch.empty(num_classifiers, config.codebook_size, hidden_size))  # (M, K, E)
        self.bias = nn.Parameter(torch.empty(num_classifiers, config.codebook_size))  # (M, K)

    def forward(
        self, hidden_states: torch.Tensor, first_depth: int = 0, guidance_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Hidden states `(B, ..., d, E)` of the depths from `first_depth` on -> logits `(B, ..., d, K)`.

        With guidance, the rows are a conditional and a null half, `(2·B, ..., d, E)`, and the logits are null +
        s·(conditional − null). The map to the logits is affine, so the normed states are mixed instead, at half of
        the cost.
        """
        hidden_states = self.norm(hidden_states)
        if guidance_scale is not None:
            conditional, null = hidden_states.float().chunk(2)
            hidden_states = (null + guidance_scale * (conditional - null)).to(hidden_states.dtype)
        if len(self.bias) == 1:
            return self.logits(hidden_states, 0)
        depths = range(first_depth, first_depth + hidden_states.shape[-2])
        return torch.stack([self.logits(h, d) for h, d in zip(hidden_states.unbind(-2), depths, strict=True)], dim=-2)

    def logits(self, hidden_states: torch.Tensor, m: int) -> torch.Tensor:
        """Normed states `(..., E)` -> logits `(..., K)` by the map with index m."""
        return F.linear(hidden_states, self.weight[m], self.bias[m])

    @onload_weights
    def cross_entropy(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor | None = None,
        residuals: torch.Tensor | None = None,
        codebook: torch.Tensor | None = None,
        temperature: float = 0.5,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of hidden states `(N, D, E)` of all depths, without ever holding all logits; for the other
        arguments and the result see [`fused_linear_cross_entropy`]."""
        states = self.norm(hidden_states)
        return fused_linear_cross_entropy(states, self.weight, self.bias, labels, residuals, codebook, temperature)
