"""The LoRA methods of diffusers' pipelines, for the transformer of ours."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import LoraBaseMixin, _fetch_state_dict
from diffusers.utils import get_peft_kwargs, is_peft_available
from diffusers.utils.peft_utils import get_adapter_name

if TYPE_CHECKING:
    from peft import PeftConfig

PEFT_PREFIX = "base_model.model."  # of weights that `get_peft_model_state_dict` takes from a `PeftModel`


class TransformerLoraMixin(LoraBaseMixin):
    """
    `load_lora_weights`, `save_lora_weights`, `set_adapters`, `fuse_lora`, `unload_lora_weights` and all else of
    [`~diffusers.loaders.lora_base.LoraBaseMixin`], for the component `transformer`, a `PreTrainedModel`.
    """

    _lora_loadable_modules = ["transformer"]
    transformer_name = "transformer"

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        **kwargs,
    ) -> None:
        """
        Adds an adapter to the transformer and activates it.

        Args:
            pretrained_model_name_or_path_or_dict: what [`save_lora_weights`] wrote, as a folder, a file or a Hub id; a
                folder that `peft` wrote; or weights by name, which are scaled by 1 (alpha = rank).
            adapter_name: a new name (default: `default_0`, `default_1`, ...).
            kwargs: those of [`lora_state_dict`].

        Raises `ImportError` without `peft`, and `ValueError` for weights that do not fit the transformer.
        """
        if not is_peft_available():
            raise ImportError("adapters need peft: pip install 'rq_hf[lora]'")
        self._require("transformer")
        from peft import inject_adapter_in_model, set_peft_model_state_dict

        source, model = pretrained_model_name_or_path_or_dict, self.transformer
        if not isinstance(source, dict) and Path(source, "adapter_config.json").is_file():
            weights, config = read_peft_folder(source)
        else:
            weights, metadata = self.lora_state_dict(source, return_lora_metadata=True, **kwargs)
            weights, config = read_weights(weights, metadata, f"{self.transformer_name}.")
        adapter_name = adapter_name or get_adapter_name(model)
        if adapter_name in getattr(model, "peft_config", {}):
            raise ValueError(f"adapter_name must be new, but there is an adapter {adapter_name!r}")
        with self._offloading_suspended():
            inject_adapter_in_model(config, model, adapter_name)
            model._hf_peft_config_loaded = True
            own = model.get_adapter_state_dict(adapter_name)
            unfit = [name for name in own | weights if shape_of(own, name) != shape_of(weights, name)]
            if unfit:
                self.delete_adapters(adapter_name)
                raise ValueError(f"the adapter does not fit the transformer: {unfit}")
            set_peft_model_state_dict(model, weights, adapter_name)
            self.set_adapters(adapter_name)
            model.eval()

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        force_download: bool = False,
        proxies: dict | None = None,
        local_files_only: bool | None = None,
        token: str | None = None,
        return_lora_metadata: bool = False,
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict | None]:
        """The weights of an adapter by name, and with `return_lora_metadata` its settings, if the file has them."""
        source = pretrained_model_name_or_path_or_dict
        state_dict, metadata = _fetch_state_dict(
            dict(source) if isinstance(source, dict) else os.fspath(source),
            weight_name=weight_name,
            use_safetensors=True,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
            force_download=force_download,
            proxies=proxies,
            token=token,
            revision=revision,
            subfolder=subfolder,
            user_agent={"file_type": "lora", "framework": "pytorch"},
            allow_pickle=False,
        )
        return (state_dict, metadata) if return_lora_metadata else state_dict

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: dict[str, torch.Tensor],
        transformer_lora_adapter_metadata: dict | None = None,
        **kwargs,
    ) -> None:
        """
        Writes an adapter for [`load_lora_weights`].

        Args:
            transformer_lora_layers: `pipe.transformer.get_adapter_state_dict(name)`.
            transformer_lora_adapter_metadata: its settings, `pipe.transformer.peft_config[name].to_dict()`. Without
                them it is loaded with alpha = rank.
            kwargs: `weight_name`, `is_main_process`, `save_function` and `safe_serialization` of diffusers.
        """
        layers = {name.removeprefix(PEFT_PREFIX): weight for name, weight in transformer_lora_layers.items()}
        cls._save_lora_weights(
            save_directory,
            lora_layers={cls.transformer_name: layers},
            lora_metadata={cls.transformer_name: transformer_lora_adapter_metadata},
            **kwargs,
        )

    def get_active_adapters(self) -> list[str]:
        """Names of the active adapters. Older releases of diffusers look for them in models of their own only."""
        has_adapters = getattr(self.transformer, "peft_config", None)
        return self.transformer.active_adapters() if has_adapters else []

    def fuse_lora(self, components: list[str] = ("transformer",), **kwargs) -> None:
        """See [`~diffusers.loaders.lora_base.LoraBaseMixin.fuse_lora`]."""
        super().fuse_lora(components, **kwargs)

    def unfuse_lora(self, components: list[str] = ("transformer",), **kwargs) -> None:
        """See [`~diffusers.loaders.lora_base.LoraBaseMixin.unfuse_lora`]."""
        super().unfuse_lora(components, **kwargs)

    @contextmanager
    def _offloading_suspended(self) -> Iterator[None]:
        by_model, sequential, by_group = self._optionally_disable_offloading(self)
        try:
            yield
        finally:
            if by_model:
                self.enable_model_cpu_offload(device=getattr(self, "_offload_device", None))
            elif sequential:
                self.enable_sequential_cpu_offload(device=getattr(self, "_offload_device", None))
            elif by_group:
                _maybe_remove_and_reapply_group_offloading(self.transformer)


def read_peft_folder(folder: str | os.PathLike) -> tuple[dict[str, torch.Tensor], "PeftConfig"]:
    """Weights and settings of an adapter that `PeftModel.save_pretrained` wrote."""
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = True
    weights = load_peft_weights(folder, device="cpu")
    return {name.removeprefix(PEFT_PREFIX): weight for name, weight in weights.items()}, config


def read_weights(
    weights: dict[str, torch.Tensor], metadata: dict | None, prefix: str
) -> tuple[dict[str, torch.Tensor], "PeftConfig"]:
    """Weights and settings of an adapter that diffusers wrote for the component `prefix`.

    Raises `ValueError` for weights of other components, or of no LoRA.
    """
    from peft import LoraConfig

    foreign = [name for name in weights if not name.startswith(prefix) or ".lora_" not in name]
    weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    ranks = {name: weight.shape[1] for name, weight in weights.items() if ".lora_B." in name}
    if foreign or not ranks:
        raise ValueError(
            f"weights of an adapter must be named {prefix}*.lora_A.* and .lora_B.*, got {foreign or 'none'}"
        )
    if metadata is not None:
        settings = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    else:
        settings = get_peft_kwargs(ranks, None, weights, is_unet=False)
    return weights, LoraConfig(**settings | {"inference_mode": True})


def shape_of(weights: dict[str, torch.Tensor], name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None
