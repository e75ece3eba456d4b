"""RQ-Transformer: a spatial transformer over the positions of a code map, a depth transformer over the codes of each
position (Lee et al., CVPR 2022, section 3.2).

Shapes: `B` batch, `H W` code grid, `T = H·W` positions in raster order, `D` quantization depth, `K` codebook size,
`C` channels of a codeword, `L` length of the condition, `V` its vocabulary, `E` hidden size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import capture_outputs

from ...argument_checks import (
    check_bool,
    check_finite,
    check_floating,
    check_instance,
    check_int64,
    check_range,
    check_temperature,
)
from ...model_cards import RQ_CITATION
from ..codes import embed_codes
from ..conditional_model import ConditionalModelMixin
from ..offloading import check_not_offloaded
from .acceleration import RQAccelerationMixin
from .classifier import RQClassifier
from .configuration_rq_transformer import RQStackConfig, RQTransformerConfig
from .generation_rq_transformer import RQGenerationMixin


@dataclass
class RQTransformerOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor`, scalar): training loss, when labels or residuals were given.
        depth_losses (`torch.Tensor` of shape `(D,)`): the cross-entropy of the codes at each depth, in nats.
        cond_loss (`torch.Tensor`, scalar): next-token cross-entropy of the condition, when L > 1.
        logits (`torch.Tensor` of shape `(B, H, W, D, K)`): logits of the codes.
        cond_logits (`torch.Tensor` of shape `(B, L-1, V)`): next-token logits of the condition, when L > 1.
        hidden_states (tuple of `torch.Tensor` of shape `(B, L+T-1, E)`): inputs of the spatial blocks and the output
            of the last, when asked for.
        attentions (tuple of `torch.Tensor` of shape `(B, heads, L+T-1, L+T-1)`): attention weights of the spatial
            blocks, when asked for.
        depth_hidden_states, depth_attentions: the same of the depth blocks, `(B·T, D, E)` and `(B·T, heads, D, D)`.
    """

    loss: torch.Tensor | None = None
    depth_losses: torch.Tensor | None = None
    cond_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cond_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    depth_hidden_states: tuple[torch.Tensor, ...] | None = None
    depth_attentions: tuple[torch.Tensor, ...] | None = None


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(q·kᵀ·scaling)·v with a causal or a given boolean mask. (B, heads, T, dim) -> (B, T, heads, dim)"""
    scores = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif query.shape[2] > 1:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class RQAttention(nn.Module):
    """Causal multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, config: RQStackConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = True
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, hidden_states: torch.Tensor, past_key_values=None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(B, T, E)` -> `(B, T, E)` and, if the attention implementation is eager, the weights `(B, heads, T, T)`."""
        batch_size, length, hidden_size = hidden_states.shape
        qkv = self.qkv_proj(hidden_states).view(batch_size, length, 3, -1, self.head_dim)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, heads, T, dim)
        query, keys_values, attention_mask = qkv[0], qkv[1:], None
        if past_key_values is not None:
            keys_values = past_key_values.update(keys_values, self.layer_idx)
            attention_mask = past_key_values.mask
        key, value = keys_values
        query = query.to(key.dtype)  # that of the cache

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attention(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout)
        return self.o_proj(output.reshape(batch_size, length, hidden_size).to(hidden_states.dtype)), weights


class RQMLP(nn.Module):
    def __init__(self, config: RQStackConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class RQBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block, the same for both stacks."""

    def __init__(self, config: RQStackConfig, layer_idx: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = RQAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = RQMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, past_key_values=None) -> torch.Tensor:
        attention, _ = self.self_attn(self.attention_norm(hidden_states), past_key_values)
        hidden_states = hidden_states + self.dropout(attention)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class RQPreTrainedModel(PreTrainedModel):
    config: RQTransformerConfig
    base_model_prefix = "model"
    main_input_name = "codes"
    output_modalities = ("image",)
    supports_gradient_checkpointing = True
    _input_embed_layer = "cond_embedding"
    _no_split_modules = ["RQBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, RQTransformerModel):
            init.normal_(module.cond_position_embedding, std=std)
            init.normal_(module.spatial_position_embedding, std=std)
            init.normal_(module.depth_position_embedding, std=std)
            init.normal_(module.codebook)
        elif isinstance(module, RQClassifier):
            init.normal_(module.weight, std=std)
            init.zeros_(module.bias)


class RQStack(RQPreTrainedModel):
    """A stack of blocks. Hidden states `(B, T, E)` -> `(B, T, E)`; with past keys and values, T new positions."""

    config: RQStackConfig
    _can_record_outputs = {"hidden_states": RQBlock, "attentions": RQAttention}

    def __init__(self, config: RQStackConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([RQBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.post_init()

    def forward(self, hidden_states: torch.Tensor, past_key_values=None) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, past_key_values)
        return hidden_states

    @capture_outputs
    def record(
        self, hidden_states: torch.Tensor, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> BaseModelOutput:
        """A pass that also returns what the blocks computed. Sampling does without this bookkeeping."""
        return BaseModelOutput(last_hidden_state=self(hidden_states))


class RQTransformerModel(RQAccelerationMixin, RQGenerationMixin, ConditionalModelMixin, RQPreTrainedModel):
    r"""
    Models p(codes | condition) = Π_t Π_d p(S_td | S_<t, S_t,<d, condition), raster order over the positions,
    coarse to fine at each of them.

    It carries a frozen copy of the RQ-VAE's codebook (set by [`set_codebook`], saved with the weights), because codes
    enter as codewords.
    """

    _group_offload_block_modules = ["spatial_stack", "depth_stack"]
    card_sections = {
        "about": "A transformer samples stacked codes of an image, position by position and coarse to fine, and an "
        "RQ-VAE decodes them ([Lee et al., CVPR 2022](https://arxiv.org/abs/2203.01941)).",
        "tags": ["rq-transformer"],
        "citation": RQ_CITATION,
    }

    def __init__(self, config: RQTransformerConfig):
        check_instance("config", config, RQTransformerConfig)
        super().__init__(config)
        depth = config.code_shape[-1]
        hidden_size = config.spatial_config.hidden_size
        num_codebooks = 1 if config.shared_codebook else depth
        self.register_buffer("codebook", torch.empty(num_codebooks, config.codebook_size, config.codebook_dim))

        self.cond_embedding = nn.Embedding(config.cond_vocab_size, hidden_size)
        self.cond_position_embedding = nn.Parameter(torch.empty(config.cond_length, hidden_size))
        self.code_projection = nn.Linear(config.codebook_dim, hidden_size)
        self.spatial_position_embedding = nn.Parameter(torch.empty(self.num_positions, hidden_size))
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.spatial_stack = RQStack._from_config(config.spatial_config)
        if config.cond_length > 1:
            self.cond_norm = nn.LayerNorm(hidden_size, eps=config.spatial_config.layer_norm_eps)
            self.cond_classifier = nn.Linear(hidden_size, config.cond_vocab_size)

        if depth > 1:
            self.depth_projection = nn.Linear(config.codebook_dim, hidden_size)
        self.depth_position_embedding = nn.Parameter(torch.empty(depth, hidden_size))
        self.depth_stack = RQStack._from_config(config.depth_config)
        self.classifier = RQClassifier(config)
        self.post_init()

    @property
    def summary(self) -> str:
        height, width, depth = self.config.code_shape
        return f"RQ-Transformer on {height}×{width}×{depth} codes, {self.num_parameters():,} parameters"

    @property
    def num_positions(self) -> int:
        """T = H·W."""
        height, width, _ = self.config.code_shape
        return height * width

    @torch.no_grad()
    def set_codebook(self, codebook: torch.Tensor) -> None:
        """Copies the RQ-VAE's codebook `(M, K, C)`, `vae.quantizer.codebook`.

        Raises `ValueError` for another shape, for values that are NaN or infinite, and while this model's codebook is
        offloaded.
        """
        check_not_offloaded(self, "codebook")
        check_floating("codebook", codebook, *self.codebook.shape)
        if codebook.is_meta:
            raise ValueError("codebook must have values, got a tensor on the meta device")
        check_finite("codebook", codebook)
        self.codebook.copy_(codebook)

    def get_output_embeddings(self) -> nn.Module | None:
        """The classifier of the text, if there is one: it is resized together with the embeddings."""
        return getattr(self, "cond_classifier", None)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.cond_classifier = new_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """See [`ConditionalModelMixin.resize_token_embeddings`]. Raises `ValueError` for a packed model."""
        if self.is_packed:
            raise ValueError("cannot resize the embeddings of a packed model; reload it")
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def forward(
        self,
        codes: torch.Tensor,
        cond_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        residuals: torch.Tensor | None = None,
        target_temperature: float | None = None,
        return_logits: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> RQTransformerOutput | tuple[torch.Tensor, ...]:
        r"""
        Teacher-forced forward pass.

        Args:
            codes (`torch.Tensor` of shape `(B, H, W, D)`, int64): the code maps.
            cond_ids (`torch.Tensor` of shape `(B, L)`, or `(B,)` when L = 1, int64): condition ids in [0, V). May be
                left out by an unconditional model (V = 1).
            labels (`torch.Tensor` of shape `(B, H, W, D)`, int64): hard labels; usually the codes themselves.
            residuals (`torch.Tensor` of shape `(B, H, W, D, C)`): soft labels instead: the residual that each code
                approximates, from `vae.quantizer.encode`. The targets are softmax(−‖r − e(k)‖²/τ) (section 3.2.3).
            target_temperature (`float`): τ > 0; left out, `config.soft_label_temperature`.
            return_logits (`bool`): without the logits no `(B, H, W, D, K)` tensor is kept, because the loss is
                computed in chunks; `False` for training.
            output_hidden_states, output_attentions, return_dict (`bool`): as in every model of transformers; left out,
                they are those of the config.

        Raises:
            `ValueError`: labels *and* residuals, shapes that do not fit, ids out of range, τ ≤ 0, attention weights of
                another attention implementation than eager, or hidden states of a packed model.
        """
        if target_temperature is None:
            target_temperature = self.config.soft_label_temperature
        self._check_forward(codes, labels, residuals, target_temperature)
        check_bool("return_logits", return_logits)
        recorded = self._outputs_to_record(output_hidden_states, output_attentions)
        batch_size, height, width, depth = codes.shape
        cond_ids = self.prepare_cond_ids(cond_ids, batch_size)
        codes = codes.reshape(batch_size, height * width, depth)
        codewords = embed_codes(codes, self.codebook)  # (B, T, D, C)

        positions = self.embed_positions(codewords[:, :-1])
        inputs = torch.cat([self.embed_condition(cond_ids), positions], dim=1)  # (B, L+T-1, E)
        spatial = self.spatial_stack.record(self.embedding_dropout(inputs), **recorded)
        cond_contexts, contexts = spatial.last_hidden_state.split([self.config.cond_length - 1, height * width], dim=1)

        depth_inputs = self.embed_depths(contexts, codewords[:, :, :-1])  # (B, T, D, E)
        by_depth = self.depth_stack.record(depth_inputs.flatten(0, 1), **recorded)
        hidden_states = by_depth.last_hidden_state.view_as(depth_inputs)

        logits = cond_logits = loss = depth_losses = cond_loss = None
        if self.config.cond_length > 1:
            cond_logits = self.cond_classifier(self.cond_norm(cond_contexts))  # (B, L-1, V)
        if return_logits:
            logits = self.classifier(hidden_states).unflatten(1, (height, width))
        if labels is not None or residuals is not None:
            loss, depth_losses = self.classifier.cross_entropy(
                hidden_states.flatten(0, 1),  # (N, D, E), N = B·T
                labels=None if labels is None else labels.reshape(-1, depth),
                residuals=None if residuals is None else residuals.reshape(-1, depth, self.config.codebook_dim),
                codebook=self.codebook,
                temperature=target_temperature,
            )
            if self.config.cond_length > 1:
                cond_loss = F.cross_entropy(cond_logits.float().flatten(0, 1), cond_ids[:, 1:].flatten())
                weight = self.config.text_loss_weight
                loss = weight * cond_loss + (1 - weight) * loss
        output = RQTransformerOutput(
            loss=loss,
            depth_losses=depth_losses,
            cond_loss=cond_loss,
            logits=logits,
            cond_logits=cond_logits,
            hidden_states=spatial.hidden_states,
            attentions=spatial.attentions,
            depth_hidden_states=by_depth.hidden_states,
            depth_attentions=by_depth.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def embed_condition(self, cond_ids: torch.Tensor) -> torch.Tensor:
        """Condition ids `(B, L)` -> inputs of the spatial stack `(B, L, E)`."""
        return self.cond_embedding(cond_ids) + self.cond_position_embedding

    def embed_positions(self, codewords: torch.Tensor, indices: torch.Tensor | None = None) -> torch.Tensor:
        """Codewords `(B, t, D, C)` of the first positions, or those with `indices` `(t,)` -> inputs `(B, t, E)` of the
        spatial stack, from which the positions after them are predicted (section 3.2.2)."""
        embedding = self.spatial_position_embedding
        embedding = embedding[: codewords.shape[1]] if indices is None else embedding[indices]
        return self._project(self.code_projection, codewords).sum(dim=-2) + embedding

    def embed_depths(self, contexts: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
        """Contexts `(..., E)`, codewords `(..., d, C)` -> inputs `(..., 1 + d, E)` of the depth stack."""
        inputs = contexts.unsqueeze(-2)
        if codewords.shape[-2]:
            if self.config.cumulative_depth_inputs:
                codewords = codewords.cumsum(dim=-2)
            inputs = torch.cat([inputs, self._project(self.depth_projection, codewords)], dim=-2)
        return inputs + self.depth_position_embedding[: inputs.shape[-2]]

    def embed_next_depth(self, context: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
        """Context `(B, E)` and the d codewords `(B, d, C)` chosen so far -> input `(B, 1, E)` of the next depth."""
        d = codewords.shape[1]
        if d == 0:
            inputs = context
        elif self.config.cumulative_depth_inputs:
            inputs = self._project(self.depth_projection, codewords.sum(dim=1))
        else:
            inputs = self._project(self.depth_projection, codewords[:, -1])
        return (inputs + self.depth_position_embedding[d]).unsqueeze(1)

    def _project(self, projection: nn.Linear, codewords: torch.Tensor) -> torch.Tensor:
        """Under FSDP the parameters may be in bf16 while the codebook stays in float32; layerwise casting stores, but
        does not compute in, the dtype of the projection. The position embeddings have the dtype of the arithmetic."""
        return projection(codewords.to(self.depth_position_embedding.dtype))

    def check_codes(self, codes: torch.Tensor, name: str = "codes") -> None:
        """Raises `ValueError`/`TypeError` unless `codes` is an int64 `(B, H, W, D)` map of this model."""
        check_int64(name, codes, "B", *self.config.code_shape)
        check_range(name, codes, self.config.codebook_size)

    def _check_forward(self, codes, labels, residuals, temperature):
        self.check_codes(codes)
        if labels is not None and residuals is not None:
            raise ValueError("give labels (hard labels) or residuals (soft labels), not both")
        if labels is not None and labels is not codes:
            self.check_codes(labels, "labels")
            if len(labels) != len(codes):
                raise ValueError(f"codes and labels must have the same batch size, got {len(codes)} and {len(labels)}")
        if residuals is not None:
            check_floating("residuals", residuals, *codes.shape, self.config.codebook_dim)
            check_temperature("target_temperature", temperature)

    def _outputs_to_record(self, output_hidden_states: bool | None, output_attentions: bool | None) -> dict[str, bool]:
        """What [`RQStack.record`] shall record: the arguments, or where they are `None` those of the config."""
        config = self.config
        hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attentions = config.output_attentions if output_attentions is None else output_attentions
        if (hidden_states or attentions) and self.is_packed:
            raise ValueError("a packed model gives no hidden states or attentions; reload it")
        implementations = {config.spatial_config._attn_implementation, config.depth_config._attn_implementation}
        if attentions and implementations != {"eager"}:
            raise ValueError(
                'output_attentions requires attn_implementation "eager" (model.set_attn_implementation), '
                f"got {sorted(map(str, implementations))}"
            )
        return {"output_hidden_states": hidden_states, "output_attentions": attentions}
