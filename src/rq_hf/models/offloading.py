"""Offloaded weights: methods that read them outside of `forward`, and those that need all of them in memory."""

import functools

from diffusers.hooks import ModelHook
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn


def group_offload_hook(module: nn.Module) -> ModelHook | None:
    """The hook with which diffusers offloads a group of weights that `module` leads, if any."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook("group_offloading")


def onload_weights(method):
    """
    For a method that reads the weights of its own module: fetches offloaded ones before it, as before `forward`.

    [`~diffusers.utils.accelerate_utils.apply_forward_hook`] does so for the offloading of accelerate, and this also
    for group offloading of diffusers, after which it offloads them again.
    """
    method = apply_forward_hook(method)

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        hook = group_offload_hook(self)
        if hook is None or getattr(hook, "in_method", False):
            return method(self, *args, **kwargs)
        if hook.config.stream is not None:
            raise ValueError(
                f"{type(self).__name__}.{method.__name__} needs group offloading without streams, because they "
                "prefetch in the order of forward: pass use_stream=False"
            )
        hook.in_method = True
        hook.pre_forward(self)
        try:
            return method(self, *args, **kwargs)
        finally:
            hook.post_forward(self, None)
            hook.in_method = False

    return wrapper


def check_not_offloaded(module: nn.Module, name: str) -> None:
    """Raises `ValueError` where the tensor `name` of the module is offloaded, so that a change of it would be lost."""
    if getattr(module, name).is_meta or group_offload_hook(module) is not None:
        raise ValueError(f"the {name} cannot be set while it is offloaded; set it before")


def unless_on_disk(save_pretrained):
    """
    The method of a library, with its signature, which diffusers looks at.

    Raises `ValueError` for weights that group offloading keeps on disk: those in memory have no values then.
    """

    @functools.wraps(save_pretrained)
    def wrapper(self, *args, **kwargs):
        for module in self.modules():
            hook = group_offload_hook(module)
            if hook is not None and hook.config.offload_to_disk_path is not None:
                raise ValueError(f"{type(self).__name__} cannot be saved while its weights are offloaded to disk")
        return save_pretrained(self, *args, **kwargs)

    return wrapper


def check_not_group_offloaded(model: nn.Module) -> None:
    """Raises `ValueError` for group offloading, under which weights come and go."""
    if _is_group_offload_enabled(model):
        raise ValueError(f"this needs the weights of {type(model).__name__} in memory, but they are group offloaded")
