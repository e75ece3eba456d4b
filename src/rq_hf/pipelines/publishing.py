"""Saving and publishing pipelines: loader file, model card, upload."""

import os
from pathlib import Path

from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from ..model_cards import HubMixin, model_card, pipeline_usage, with_card
from ..models.remote_code import with_code

LOADER_FILE = "pipeline.py"
LOADER = """try:
    import rq_hf
except ModuleNotFoundError as error:
    raise ImportError("this pipeline needs the package rq_hf: pip install rq_hf") from error

{line}
"""


class PublishingMixin(HubMixin):
    """
    Saving and publishing of a [`~diffusers.DiffusionPipeline`] whose class is in `rq_hf`.

    A saved folder has a `pipeline.py`, with which `DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder,
    trust_remote_code=True)` works without `import rq_hf`, and without rq_hf if it was saved with `with_code=True`.
    Everyone else needs neither the file nor the argument.
    """

    def card(self, model: str, call: str | None = None, **sections) -> str:
        """See [`HubMixin.card`]; `call` is the Python code that samples `images` from `pipe`. Raises `ValueError`
        without a transformer."""
        self._require("transformer")
        usage = pipeline_usage(call or f"images = {self.example_call}.images", model, own_class(self))
        sections = {"pipeline_tag": self.task} | self.transformer.card_sections | sections
        return model_card(self.transformer.summary, usage, **sections)

    @with_card
    @with_code
    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """
        See [`~diffusers.DiffusionPipeline.save_pretrained`]; for `push_to_hub`, [`with_card`]; for `with_code`,
        [`with_code`].

        Raises `ValueError` for components that diffusers would leave out, such as a model with an adapter.
        """
        check_savable(self.components)
        super().save_pretrained(os.fspath(save_directory), *args, **kwargs)

    def save_config(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Writes `model_index.json`, and the `pipeline.py` beside it."""
        super().save_config(save_directory, *args, **kwargs)
        text = LOADER.format(line=self.loaders[LOADER_FILE])
        Path(save_directory, LOADER_FILE).write_text(text, encoding="utf-8")

    @property
    def loaders(self) -> dict[str, str]:
        """See [`with_code`]."""
        return {LOADER_FILE: f"Pipeline = rq_hf.{own_class(self)}"}


def own_class(pipeline: PublishingMixin) -> str:
    """The name of the pipeline's class, or of the one in `rq_hf` that it is derived from."""
    return next(cls.__name__ for cls in type(pipeline).__mro__ if cls.__module__.startswith("rq_hf."))


def check_savable(components: dict) -> None:
    for name, component in components.items():
        if not isinstance(component, nn.Module):
            continue
        if not isinstance(component, ModelMixin | PreTrainedModel) or getattr(component, "peft_config", None):
            raise ValueError(
                f"the {name} has an adapter or is wrapped, and would be saved without its weights: save adapters with "
                "save_lora_weights; to save them merged, call fuse_lora and unload_lora_weights (a PeftModel: "
                "merge_and_unload) first"
            )
