"""Saving and publishing pipelines: loader file, model card, upload."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from ..model_cards import upload_with_card

LOADER_FILE = "pipeline.py"
LOADER = """import rq_hf

Pipeline = rq_hf.{name}
"""


class PublishingMixin:
    """
    Saving and publishing of a [`~diffusers.DiffusionPipeline`] whose class is in `rq_hf`.

    A saved folder has a `pipeline.py`, with which `DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder,
    trust_remote_code=True)` works without `import rq_hf`. Everyone else needs neither the file nor the argument.
    """

    def card(self, repo_id: str | None = None, call: str | None = None) -> str:
        """The model card of the pipeline, published as `repo_id`; `call` is the Python expression that samples from
        `pipe`."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike, *args, push_to_hub: bool = False, **kwargs) -> None:
        """
        See [`~diffusers.DiffusionPipeline.save_pretrained`]. With `push_to_hub`, the repository gets a model card
        unless it has one: that of the folder, or one made for the pipeline.

        Raises `ValueError` for components that diffusers would leave out, such as a model with an adapter.
        """
        check_savable(self.components)
        hub = {
            name: kwargs.pop(name) for name in ("token", "private", "create_pr", "commit_message") if name in kwargs
        }
        repo_id = kwargs.pop("repo_id", Path(save_directory).name)
        super().save_pretrained(os.fspath(save_directory), *args, **kwargs)
        if push_to_hub:
            upload_with_card(save_directory, repo_id, self.card, **hub)

    def save_config(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Writes `model_index.json`, and the `pipeline.py` beside it."""
        super().save_config(save_directory, *args, **kwargs)
        name = next(cls.__name__ for cls in type(self).__mro__ if cls.__module__.startswith("rq_hf."))
        Path(save_directory, LOADER_FILE).write_text(LOADER.format(name=name), encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """
        Publishes the pipeline, and a model card for it unless the repository has one.

        Raises `ValueError` without a token. The arguments are those of diffusers.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            return upload_with_card(
                folder,
                repo_id,
                self.card,
                commit_message=commit_message,
                private=private,
                token=token,
                create_pr=create_pr,
                subfolder=subfolder,
            )


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
