"""What a run logs: JSON lines, means and speed, and images."""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from .ema import gather_full


class JSONLinesTracker(GeneralTracker):
    """Appends every logged dictionary as one line to `path`."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    @property
    def tracker(self):
        return self.path

    @on_main_process
    def store_init_configuration(self, values: dict):
        self._append({"arguments": values})

    @on_main_process
    def log(self, values: dict, step: int | None, **kwargs):
        self._append({"step": step, **values})

    def _append(self, values: dict):
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            error.filename = str(self.path)  # a full disk does not say where it is
            raise


def log_images(accelerator: Accelerator, images: dict[str, Image.Image], step: int) -> None:
    """Writes RGB images to `images/` in the output folder and to TensorBoard."""
    if not accelerator.is_main_process:
        return
    folder = Path(accelerator.project_dir) / "images"
    folder.mkdir(exist_ok=True)
    for name, image in images.items():
        image.save(folder / f"{name}-{step:07d}.png")
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image(name, np.asarray(image), step, dataformats="HWC")


class Meter:
    """
    Means of logged values since the last [`result`] and counts since the start, over all ranks; images per second and,
    with `peak_flops`, the model FLOPs utilization (mfu) of forward and backward pass.

    Args:
        units_per_image: what else to report per second, such as `{"codes": 256}` for `codes_per_second`.
        peak_flops: peak of one device in the arithmetic used, in FLOP/s.
        examples: what the log calls the examples.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        units_per_image: dict[str, int] | None = None,
        peak_flops: float | None = None,
        examples: str = "images",
    ):
        self.accelerator = accelerator
        self.examples = examples
        self.units_per_image = units_per_image or {}
        self.peak_flops = peak_flops
        self.flops_per_image = None
        self.counts = Counter()
        self._reset()

    def _reset(self):
        self.values = defaultdict(list)
        self.images = 0
        self.seconds = 0.0
        self.restart_clock()

    @contextmanager
    def counting_flops(self, num_images: int) -> Iterator[None]:
        """Counts the operations inside for the first batch, of `num_images`: recomputed activations too."""
        if self.peak_flops is None or self.flops_per_image is not None:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops_per_image = counter.get_total_flops() / num_images

    def restart_clock(self):
        """Leaves out the time since the last `add`, such as that of a checkpoint."""
        self.started = time.perf_counter()

    def add(self, counts: dict[str, int], **values: torch.Tensor):
        """Adds the counts of a batch (`images` and others), and the values of a forward and backward pass on it."""
        for name, value in values.items():
            self.values[name].append(gather_full(torch.as_tensor(value).detach()))
        self.counts.update(counts)
        self.images += counts["images"]
        self.seconds += time.perf_counter() - self.started
        self.started = time.perf_counter()

    def result(self) -> dict[str, float]:
        """Everything there is to log (a collective call); starts new means."""
        means = {name: torch.stack(v).float().mean() for name, v in self.values.items()}
        result = {name: mean.item() for name, mean in self.accelerator.reduce(means, "mean").items()}
        images_per_second = self.images / self.seconds  # of this process
        total_per_second = images_per_second * self.accelerator.num_processes
        for unit, per_image in {self.examples: 1, **self.units_per_image}.items():
            result[f"{unit}_per_second"] = total_per_second * per_image
        if self.flops_per_image is not None:
            result["mfu"] = images_per_second * self.flops_per_image / self.peak_flops
        result |= self._total_counts()
        self._reset()
        return result

    def _total_counts(self) -> dict[str, int]:
        """The counts of all ranks since the start, other than of images; only those above zero."""
        names = sorted(name for name in self.counts if name != "images")
        if not names:
            return {}
        own = torch.tensor([self.counts[name] for name in names], device=self.accelerator.device)
        totals = self.accelerator.reduce(own, "sum").tolist()
        return {name: total for name, total in zip(names, totals) if total}
