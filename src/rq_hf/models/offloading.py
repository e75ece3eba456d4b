"""Weights that hooks of accelerate or diffusers keep in other memory and load for `forward`, in other methods."""

import functools
from collections.abc import Callable

from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn


def with_forward_hooks(method: Callable) -> Callable:
    """Decorator for methods of a module besides `forward` that use its own weights: offloaded ones are loaded first.

    As diffusers' `apply_forward_hook`, and for group offloading too. The weights stay loaded until the next `forward`.
    """
    method = apply_forward_hook(method)

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        registry = vars(self).get("_diffusers_hook")
        if registry is not None:
            for hook in registry.hooks.values():
                args, kwargs = hook.pre_forward(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return wrapper


def check_not_offloaded(module: nn.Module, name: str) -> None:
    """Raises `ValueError` where the tensor `name` of the module is offloaded, so that a change of it would be lost."""
    registry = vars(module).get("_diffusers_hook")
    if getattr(module, name).is_meta or (registry is not None and "group_offloading" in registry.hooks):
        raise ValueError(f"the {name} cannot be set while it is offloaded; set it before")
