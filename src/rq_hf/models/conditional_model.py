"""What the transformers of both methods share: loading without missing weights, and their conditions.

Shapes: `B` batch, `L` length of the condition, `V` its vocabulary.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..argument_checks import check_dense, check_int64, check_range, check_size
from ..model_cards import HubMixin, model_card, quoted, with_card
from .offloading import unless_on_disk
from .pretrained import check_loading_info, reading
from .remote_code import FILE, with_code


class ConditionalModelMixin(HubMixin):
    """For a [`~transformers.PreTrainedModel`] whose config has `cond_vocab_size`, `cond_length` and `null_cond_id`."""

    summary: str  # what the model is, for cards
    card_sections: dict  # further arguments of `model_card`: tags and citation

    def card(self, model: str, **sections) -> str:
        """See [`HubMixin.card`]."""
        length, name = self.config.cond_length, type(self).__name__
        needed, call = "", "transformer.generate(num_images=1)"
        if self.config.cond_vocab_size > 1:
            needed, kind = "import torch\n", "token ids" if length > 1 else "classes"
            call = f"transformer.generate(torch.zeros(1, {length}, dtype=torch.int64))  # of {kind} (B, {length})"
        usage = f"""{needed}from rq_hf import {name}

transformer = {name}.from_pretrained({quoted(model)})
sample = {call}"""
        return model_card(self.summary, usage, **self.card_sections | sections)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Does nothing: `save_pretrained` of the configuration writes what `AutoModel` needs."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """As in transformers, except that missing and unknown weights are a `ValueError`, unless
        `ignore_mismatched_sizes=True`."""
        if pretrained_model_name_or_path is None:  # the weights are in `state_dict`
            return super().from_pretrained(None, *args, output_loading_info=output_loading_info, **kwargs)
        with reading(f"a saved {cls.__name__}", pretrained_model_name_or_path):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        if not kwargs.get("ignore_mismatched_sizes"):
            check_loading_info(pretrained_model_name_or_path, info)
        return (model, info) if output_loading_info else model

    save_pretrained = with_card(with_code(unless_on_disk(PreTrainedModel.save_pretrained)))

    @property
    def loaders(self) -> dict[str, str]:
        """See [`with_code`]."""
        name = type(self.config).__name__
        return {FILE: f"{name} = rq_hf.{name}"}

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """As in transformers: V condition ids become `new_num_tokens`, and the config says so.

        Raises `ValueError` where this would drop the null condition; `TypeError` unless `new_num_tokens` is an
        integer.
        """
        if new_num_tokens is not None:
            check_size("new_num_tokens", new_num_tokens)
            null_cond_id = self.config.null_cond_id
            if null_cond_id is not None and new_num_tokens <= null_cond_id:
                raise ValueError(
                    f"new_num_tokens must be greater than config.null_cond_id, {null_cond_id}, got {new_num_tokens}"
                )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def prepare_cond_ids(self, cond_ids: torch.Tensor | None, batch_size: int, name: str = "cond_ids") -> torch.Tensor:
        """Checks condition ids `(B, L)` (or `(B,)` when L = 1) and returns them as `(B, L)`.

        Raises `ValueError` when they are missing, of another shape, or out of range.
        """
        vocab_size, length = self.config.cond_vocab_size, self.config.cond_length
        if cond_ids is None:
            if vocab_size > 1:
                raise ValueError(
                    f"this model is conditional: cond_ids of shape (B, {length}) in [0, {vocab_size}) needed"
                )
            return torch.zeros(batch_size, length, dtype=torch.long, device=self.device)
        check_dense(name, cond_ids)
        if length == 1 and cond_ids.ndim == 1:
            cond_ids = cond_ids[:, None]
        check_int64(name, cond_ids, batch_size, length)
        check_range(name, cond_ids, vocab_size)
        return cond_ids

    def prepare_negative_cond_ids(
        self, negative_cond_ids: torch.Tensor | None, cond_ids: torch.Tensor
    ) -> torch.Tensor:
        """The condition that guidance steers away from, `(B, L)`: the null condition if none is given."""
        if negative_cond_ids is None:
            return torch.full_like(cond_ids, self.config.null_cond_id)
        return self.prepare_cond_ids(negative_cond_ids, len(cond_ids), "negative_cond_ids").to(self.device)
