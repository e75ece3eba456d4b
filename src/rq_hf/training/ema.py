"""Exponential moving average of a model's weights, sharded or not."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from ..argument_checks import check_number


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered from all ranks (a collective call); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class EMA:
    """
    Exponential moving average of all floating-point tensors of a model's state, parameters *and* buffers; other
    tensors, and those that a module lists in `no_averaging`, are copied. The decay warms up as
    (1 + step) / (10 + step), from step 0 on.

    Neither `torch.optim.swa_utils.AveragedModel`, which copies the module and knows no `DTensor`, nor diffusers'
    `EMAModel`, which leaves out the buffers, would serve: the codebook of an RQ-VAE moves with its buffers, and the
    average of a sharded transformer must be sharded as well.

    Args:
        model: the model, after FSDP has sharded it.
        decay (`float`): in [0, 1), after the warm-up.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        check_number("decay", decay, "lie in [0, 1)")
        self.model = model
        self.decay = decay
        self.step = 0
        self.copied = {
            f"{module_name}.{name}".removeprefix(".")
            for module_name, module in model.named_modules()
            for name in getattr(module, "no_averaging", ())
        }
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.average = {
            n: t.to(torch.float32 if t.is_floating_point() else t.dtype, copy=True) for n, t in state.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        weight = 1 - min(self.decay, (1 + self.step) / (10 + self.step))
        self.step += 1
        averages, tensors = [], []
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and name not in self.copied:
                averages.append(local_shard(self.average[name]))
                tensors.append(local_shard(tensor).float())
            else:
                self.average[name].copy_(tensor)
        torch._foreach_lerp_(averages, tensors, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        trained = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        try:
            yield
        finally:
            self.model.load_state_dict(trained)

    def state_dict(self) -> dict:
        return {"step": self.step, "average": {name: gather_full(tensor) for name, tensor in self.average.items()}}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        for name, tensor in self.average.items():
            saved = state["average"][name]
            if isinstance(tensor, DTensor):
                saved = distribute_tensor(saved.to(tensor.device), tensor.device_mesh, tensor.placements)
            tensor.copy_(saved)
