"""MAR: a masked encoder-decoder over continuous tokens, and a diffusion head that samples them (Li et al., 2024).

Shapes: `B` batch, `H W` token grid, `T = H·W` positions in raster order, `C` numbers of a token (channels × p × p),
`L` length of the condition, `S` slots that it takes in front of the tokens, `E` and `Z` width of encoder and decoder.
Masks are boolean, true where a token is hidden.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from ...argument_checks import (
    check_dense,
    check_floating,
    check_instance,
    check_int64,
    check_range,
    check_shape,
    check_values,
)
from ...model_cards import MAR_CITATION
from ..conditional_model import ConditionalModelMixin
from .acceleration import MARAccelerationMixin
from .configuration_mar_transformer import MARStackConfig, MARTransformerConfig
from .diffusion import NUM_TRAIN_TIMESTEPS, add_noise, diffusion_loss
from .diffusion_head import MARDiffusionHead
from .generation_mar_transformer import MARSamplingMixin
from .masking import positions_of, random_mask, rows_at


@dataclass
class MARTransformerOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor`, scalar): the diffusion loss: `mse` + `vlb`, averaged over the hidden tokens.
        mse (`torch.Tensor`, scalar): squared error of the predicted noise.
        vlb (`torch.Tensor`, scalar): variational bound in bits, from which the variances learn.
        mask (`torch.Tensor` of shape `(B, T)`, bool): which tokens were hidden.
    """

    loss: torch.Tensor | None = None
    mse: torch.Tensor | None = None
    vlb: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(q·kᵀ·scaling)·v, where a boolean mask says which keys count. (B, heads, T, dim) -> (B, T, heads, dim)"""
    scores = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MARAttention(nn.Module):
    """Multi-head self-attention in both directions, with one fused projection for queries, keys and values."""

    def __init__(self, config: MARStackConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        queries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(B, T, E)` -> `(B, T, E)`, or `(B, n, E)` at the positions `queries` `(B, n)` only."""
        batch_size, length, hidden_size = hidden_states.shape
        qkv = self.qkv_proj(hidden_states).view(batch_size, length, 3, -1, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (3, B, heads, T, dim)
        if queries is not None:
            query = rows_at(query, queries[:, None])

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, _ = attention(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout)
        return self.o_proj(output.reshape(batch_size, -1, hidden_size))


class MARMLP(nn.Module):
    def __init__(self, config: MARStackConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.dropout(self.act_fn(self.up_proj(hidden_states))))


class MARBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block, the same for both stacks."""

    def __init__(self, config: MARStackConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = MARAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MARMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        queries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See [`MARAttention.forward`]."""
        attention = self.self_attn(self.attention_norm(hidden_states), attention_mask, queries)
        if queries is not None:
            hidden_states = rows_at(hidden_states, queries)
        hidden_states = hidden_states + self.dropout(attention)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class MARPreTrainedModel(PreTrainedModel):
    config: MARTransformerConfig
    base_model_prefix = "model"
    main_input_name = "latents"
    output_modalities = ("image",)
    supports_gradient_checkpointing = True
    _input_embed_layer = "cond_embedding"
    _no_split_modules = ["MARBlock", "MARDiffusionHead"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)


class MARStack(MARPreTrainedModel):
    """Blocks and a final layer norm: the encoder or the decoder."""

    config: MARStackConfig

    def __init__(self, config: MARStackConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([MARBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        queries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(B, T, E)` -> `(B, T, E)`, or `(B, n, E)` at the positions `queries` `(B, n)`; others do not need the last
        block."""
        *layers, last = self.layers
        for layer in layers:
            hidden_states = layer(hidden_states, attention_mask)
        return self.norm(last(hidden_states, attention_mask, queries))


class MARTransformerModel(MARAccelerationMixin, MARSamplingMixin, ConditionalModelMixin, MARPreTrainedModel):
    r"""
    Models continuous tokens in any order: p(hidden tokens | visible tokens, condition). Encoder and decoder give a
    vector z for every hidden position (section 3.4); p(token | z) is what the diffusion head samples (section 3.2).
    """

    _group_offload_block_modules = ["encoder", "decoder"]
    card_sections = {
        "about": "A masked transformer and a small diffusion model sample the continuous tokens of an image in any "
        "order, and an autoencoder decodes them ([Li et al., NeurIPS 2024](https://arxiv.org/abs/2406.11838)).",
        "tags": ["mar"],
        "citation": MAR_CITATION,
    }

    def __init__(self, config: MARTransformerConfig):
        check_instance("config", config, MARTransformerConfig)
        super().__init__(config)
        encoder, decoder = config.encoder_config, config.decoder_config
        num_slots = config.num_cond_slots + config.num_tokens

        self.cond_embedding = nn.Embedding(config.cond_vocab_size, encoder.hidden_size)
        self.latent_projection = nn.Linear(config.token_dim, encoder.hidden_size)
        self.encoder_position_embedding = nn.Parameter(torch.empty(num_slots, encoder.hidden_size))
        self.input_norm = nn.LayerNorm(encoder.hidden_size, eps=1e-6)
        self.encoder = MARStack._from_config(encoder)

        self.decoder_projection = nn.Linear(encoder.hidden_size, decoder.hidden_size)
        self.mask_token = nn.Parameter(torch.empty(1, decoder.hidden_size))
        self.decoder_position_embedding = nn.Parameter(torch.empty(num_slots, decoder.hidden_size))
        self.decoder = MARStack._from_config(decoder)

        self.head_position_embedding = nn.Parameter(torch.empty(config.num_tokens, decoder.hidden_size))
        self.head = MARDiffusionHead(config.head_config, config.token_dim, decoder.hidden_size)
        self.post_init()

    @property
    def summary(self) -> str:
        height, width = self.config.grid_size
        tokens = f"{height}×{width} tokens of {self.config.token_dim} numbers"
        return f"MAR on {tokens}, {self.num_parameters():,} parameters"

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MARTransformerModel):
            init.normal_(module.mask_token, std=std)
            init.normal_(module.encoder_position_embedding, std=std)
            init.normal_(module.decoder_position_embedding, std=std)
            init.normal_(module.head_position_embedding, std=std)
            head = module.head  # transformers passes over modules without weights of their own
            init.normal_(head.time_embedding.linear_1.weight, std=std)
            init.normal_(head.time_embedding.linear_2.weight, std=std)
            # Modulations and output begin at zero, so that a new head predicts 0.
            for linear in (*(layer.modulation for layer in head.layers), head.output_modulation):
                init.zeros_(linear.weight)
            init.zeros_(head.output_projection.weight)

    def forward(
        self,
        latents: torch.Tensor,
        cond_ids: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MARTransformerOutput | tuple[torch.Tensor, ...]:
        r"""
        The diffusion loss of hidden tokens (equation 1).

        Args:
            latents (`torch.Tensor` of shape `(B, channels, height, width)`): multiplied by the scaling factor of their
                autoencoder, so that their standard deviation is about 1.
            cond_ids (`torch.Tensor` of shape `(B, L)`, or `(B,)` when L = 1, int64): condition ids in [0, V). May be
                left out by an unconditional model (V = 1).
            mask (`torch.Tensor` of shape `(B, T)`, bool): the hidden tokens, in each image at least one (default: at
                random, equally many in every image, see `config.mask_ratio_min`).
            noise (`torch.Tensor` of shape `(R, B, T, C)`): ε of R noised copies of the tokens (default: R =
                `config.diffusion_batch_mul` random ones). Only that of hidden tokens is used.
            timesteps (`torch.Tensor` of shape `(R, B, T)`, int64): theirs, in [0, 1000) (default: random).
            return_dict (`bool`): as in every model of transformers.

        Raises:
            `ValueError` or `TypeError`: shapes that do not fit, ids out of range, masks that hide nothing, or float16,
                in which the head overflows.
        """
        self.check_dtype()
        self.check_latents(latents)
        batch_size = len(latents)
        cond_ids = self.prepare_cond_ids(cond_ids, batch_size)
        if mask is None:
            mask = random_mask(batch_size, self.config.num_tokens, self.config.mask_ratio_min)
        else:
            self.check_mask(mask, batch_size)
        tokens = self.patchify(latents)  # (B, T, C)
        if noise is None:
            noise = torch.randn(self.config.diffusion_batch_mul, *tokens.shape, device=self.device)
        self._check_floating("noise", noise, "R", *tokens.shape)
        if timesteps is None:
            timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, noise.shape[:3], device=self.device)
        check_int64("timesteps", timesteps, *noise.shape[:3])
        check_range("timesteps", timesteps, NUM_TRAIN_TIMESTEPS)

        conditions = self.predict_conditions(tokens, cond_ids, mask)  # (B, T, Z)
        mask = mask.to(self.device)
        repeats = len(noise)
        target = tokens[mask].repeat(repeats, 1)  # (N, C), N = R · number of hidden tokens
        noise, timesteps = noise[:, mask].flatten(0, 1), timesteps[:, mask].flatten()
        conditions = conditions[mask].repeat(repeats, 1)
        prediction = self.head(self._cast(add_noise(target, noise, timesteps)), timesteps, conditions)
        squared_errors, bounds = diffusion_loss(target, noise, timesteps, prediction)
        mse, vlb = squared_errors.mean(), bounds.mean()
        output = MARTransformerOutput(loss=mse + vlb, mse=mse, vlb=vlb, mask=mask)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """As in transformers, which would warn about the head: it has no attention."""
        if isinstance(attn_implementation, str):
            attn_implementation = dict.fromkeys(("", "encoder_config", "decoder_config"), attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def patchify(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(B, channels, height, width)` -> tokens `(B, T, C)`; within a token channels, then rows, then
        columns of the patch."""
        patch = self.config.patch_size
        patches = latents.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, channels, H, W, p, p)
        return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of [`patchify`]."""
        patch = self.config.patch_size
        patches = tokens.unflatten(2, (-1, patch, patch)).unflatten(1, self.config.grid_size)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, *self.config.latent_shape)

    def predict_conditions(
        self,
        tokens: torch.Tensor,
        cond_ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        What the head is conditioned on.

        Args:
            tokens: `(B, T, C)`; those that are hidden do not matter.
            cond_ids: `(B, L)`.
            mask: `(B, T)`; on the CPU, nothing waits for an accelerator.
            positions: `(B, n)`, those to predict (default: all).

        Returns:
            z `(B, T, Z)`, or `(B, n, Z)` at the `positions`.
        """
        visible, is_visible = (None if part is None else part.to(self.device) for part in positions_of(~mask))
        hidden_states = self.encode(tokens, cond_ids, visible, is_visible)  # (B, S + v, E)
        return self.decode(hidden_states, visible, is_visible, positions)

    def encode(
        self,
        tokens: torch.Tensor,
        cond_ids: torch.Tensor,
        visible: torch.Tensor,
        is_visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The encoder sees the condition and the visible tokens.

        Args:
            tokens: `(B, T, C)`.
            cond_ids: `(B, L)`.
            visible: positions of the visible tokens, `(B, v)`.
            is_visible: `(B, v)`, false where an image has fewer; `None` where all have v.

        Returns:
            `(B, S + v, E)`.
        """
        num_slots = self.config.num_cond_slots
        slots = self.cond_embedding(cond_ids).repeat(1, self.config.cond_repeats, 1)  # (B, S, E)
        visible_tokens = self.latent_projection(self._cast(rows_at(tokens, visible)))  # (B, v, E)
        positions = self.encoder_position_embedding
        slots = slots + positions[:num_slots]
        visible_tokens = visible_tokens + positions[num_slots:][visible]
        attention_mask = None
        if is_visible is not None:
            self._check_attention_mask()
            attention_mask = F.pad(is_visible, (num_slots, 0), value=True)[:, None, None]  # (B, 1, 1, S + v)
        return self.encoder(self.input_norm(torch.cat([slots, visible_tokens], dim=1)), attention_mask)

    def decode(
        self,
        hidden_states: torch.Tensor,
        visible: torch.Tensor,
        is_visible: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The decoder sees what the encoder says about the visible tokens, and the mask token at the others.

        Args:
            hidden_states: of the encoder, `(B, S + v, E)`.
            visible, is_visible: see [`encode`].
            positions: `(B, n)`, those to predict (default: all).

        Returns:
            z `(B, T, Z)`, or `(B, n, Z)` at the `positions`.
        """
        num_slots, num_tokens = self.config.num_cond_slots, self.config.num_tokens
        slots, known = self.decoder_projection(hidden_states).split([num_slots, visible.shape[1]], dim=1)
        if is_visible is not None:
            known = torch.where(is_visible[..., None], known, self.mask_token)
        tokens = self.mask_token.to(known.dtype).expand(len(known), num_tokens, -1)  # (B, T, Z)
        tokens = tokens.scatter(1, visible[..., None].expand_as(known), known)
        inputs = torch.cat([slots, tokens], dim=1) + self.decoder_position_embedding
        if positions is None:
            return self.decoder(inputs)[:, num_slots:] + self.head_position_embedding
        outputs = self.decoder(inputs, queries=positions + num_slots)
        return outputs + self.head_position_embedding[positions]

    def _cast(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens in the dtype of the arithmetic."""
        return tokens.to(self.encoder_position_embedding.dtype)

    def check_latents(self, latents: torch.Tensor, name: str = "latents") -> None:
        """Raises `ValueError`/`TypeError` unless these are latents of this model."""
        self._check_floating(name, latents, "B", *self.config.latent_shape)

    def _check_floating(self, name: str, value: torch.Tensor, *shape: int | str) -> None:
        check_floating(name, value, *shape)
        if self.device.type != "meta":
            check_values(name, value)

    def check_mask(self, mask: torch.Tensor, batch_size: int) -> None:
        """Raises `ValueError`/`TypeError` unless `mask` is boolean of shape `(B, T)` and hides a token of every
        image."""
        check_dense("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, true where a token is hidden, got {mask.dtype}")
        check_shape("mask", mask, batch_size, self.config.num_tokens)
        if not mask.any(dim=1).all():
            raise ValueError("mask must hide at least one token of every image, got one that hides nothing")

    def check_dtype(self) -> None:
        """Raises `ValueError` in float16: the first steps of denoising go beyond its range."""
        device = self.device.type
        computes_in = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype
        if computes_in == torch.float16:
            raise ValueError("MAR gives NaN in float16, because its head overflows; use bfloat16 or float32")

    def _check_attention_mask(self) -> None:
        implementation = self.config._attn_implementation
        if implementation not in ("eager", "sdpa"):
            raise ValueError(
                'images that hide different numbers of tokens need attn_implementation "sdpa" or "eager", '
                f"got {implementation!r}"
            )
