"""The arguments of `generate`: defaults filled in, checked, and brought to one value per depth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from ...argument_checks import (
    as_plain,
    check_bool,
    check_choice,
    check_dense,
    check_integer,
    check_number,
    check_size,
    check_temperature,
    is_number,
)
from ..pretrained import read_json
from .code_sampling import CodeSampler

PerDepth = float | Sequence[float] | np.ndarray | torch.Tensor

# Share of the guidance at the progress in [0, 1] over the positions.
GUIDANCE_SCHEDULES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
}
DEFAULTS = {"do_sample": True, "temperature": 1.0, "top_k": None, "top_p": 1.0, "guidance_scale": 1.0}
# Settings that tell where a configuration is from, or that transformers itself sets; none changes the codes.
IGNORED = {
    *("transformers_version", "_from_model_config", "_commit_hash", "use_cache", "return_dict_in_generate"),
    *("output_attentions", "output_hidden_states"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
}


@dataclass(frozen=True)
class GenerationSettings:
    """Sampling settings with one value per depth; `top_k` lies in [1, K]."""

    do_sample: bool
    temperature: list[float]
    top_k: list[int]
    top_p: list[float]
    guidance_scale: list[float]

    @classmethod
    def resolve(
        cls, generation_config: GenerationConfig, depth: int, codebook_size: int, **given
    ) -> "GenerationSettings":
        """
        Takes every setting that is `None` in `given` from `generation_config`.

        Raises `ValueError` for a value out of range, a list that is not one value per depth, or a
        `generation_config` that asks for something else; `TypeError` for another `generation_config` or `do_sample`
        than their types.
        """
        if not isinstance(generation_config, GenerationConfig):
            raise TypeError(f"generation_config must be a GenerationConfig of transformers, got {generation_config!r}")
        check_supported(generation_config)
        settings = {}
        for name, default in DEFAULTS.items():
            value = getattr(generation_config, name, None) if given[name] is None else given[name]
            settings[name] = default if value is None else value
        check_bool("do_sample", settings["do_sample"])
        for name in ("temperature", "top_k", "top_p", "guidance_scale"):
            value = as_plain(settings[name])
            values = list(value) if isinstance(value, list | tuple) else [value] * depth
            if len(values) != depth:
                raise ValueError(f"{name} must be a number or one per depth ({depth}), got {len(values)} values")
            settings[name] = values

        for temperature in settings["temperature"]:
            if is_number(temperature) and temperature == 0:
                raise ValueError(f"temperature must be greater than 0, got {temperature}; do_sample=False is greedy")
            check_temperature("temperature", temperature)
        settings["top_k"] = [codebook_size if k is None else k for k in settings["top_k"]]
        for k in settings["top_k"]:
            if not (is_number(k) and 1 <= k < math.inf and k == int(k)):
                raise ValueError(f"top_k must be an integer of at least 1, got {k!r:.80}")
        settings["top_k"] = [min(int(k), codebook_size) for k in settings["top_k"]]
        for p in settings["top_p"]:
            check_number("top_p", p, "lie in (0, 1]")
        for scale in settings["guidance_scale"]:
            check_number("guidance_scale", scale, "be finite")
        for name in ("temperature", "top_p", "guidance_scale"):
            settings[name] = [float(number) for number in settings[name]]
        return cls(**settings)

    @property
    def is_guided(self) -> bool:
        return any(scale != 1 for scale in self.guidance_scale)

    def check_guidance(self, schedule: str, negative_cond_ids: torch.Tensor | None, null_cond_id: int | None) -> None:
        """Raises `ValueError` for arguments of guidance that contradict each other or the model."""
        check_choice("guidance_schedule", schedule, list(GUIDANCE_SCHEDULES))
        if not self.is_guided and (negative_cond_ids is not None or schedule != "constant"):
            negative = "negative_cond_ids (in a pipeline: negative_prompt)"
            name = negative if negative_cond_ids is not None else "guidance_schedule"
            raise ValueError(f"{name} needs a guidance_scale other than 1")
        if self.is_guided and negative_cond_ids is None and null_cond_id is None:
            raise ValueError(
                f"guidance_scale={self.guidance_scale} needs a model with a null condition, but config.null_cond_id "
                "is None; or give negative_cond_ids"
            )

    def guidance_over_positions(self, num_positions: int, schedule: str, device: torch.device) -> torch.Tensor:
        """Guidance scales `(T, D)`."""
        last = max(1, num_positions - 1)
        progress = torch.tensor([GUIDANCE_SCHEDULES[schedule](position / last) for position in range(num_positions)])
        return (1 + (torch.tensor(self.guidance_scale) - 1) * progress[:, None]).to(device)

    def code_sampler(self, device: torch.device) -> CodeSampler:
        temperature = torch.tensor(self.temperature, device=device, dtype=torch.float32)
        return CodeSampler(self.do_sample, temperature, self.top_k, self.top_p)


def check_supported(generation_config: GenerationConfig) -> None:
    """Raises `ValueError` for settings that sampling would ignore."""
    neutral = GenerationConfig._get_default_generation_params()
    unsupported = {
        name: value
        for name, value in generation_config.to_dict().items()
        if name not in DEFAULTS.keys() | IGNORED and value not in (None, False) and value != neutral.get(name)
    }
    if unsupported:
        raise ValueError(f"generation_config may set {', '.join(DEFAULTS)}, got {unsupported}")


def check_generation_config_file(model: str, **hub_arguments) -> None:
    """Raises `ValueError` when the folder or Hub model has a `generation_config.json` that is not a JSON object."""
    file = cached_file(
        model,
        GENERATION_CONFIG_NAME,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_arguments,
    )
    if file is None:
        return
    read_json(Path(file))


def resolve_batch_size(
    cond_ids: torch.Tensor | None, num_images: int | None, prefix_codes: torch.Tensor | None
) -> int:
    """The batch size that the arguments agree on, 1 without any. Raises `ValueError` if they disagree or it is 0,
    `TypeError` for arguments of other types."""
    for name, rows in (("cond_ids", cond_ids), ("prefix_codes", prefix_codes)):
        if rows is not None:
            check_dense(name, rows)
            if not rows.ndim or not len(rows):
                raise ValueError(f"{name} must have at least one row, got the shape {tuple(rows.shape)}")
    if num_images is not None:
        check_size("num_images", num_images)
    sizes = {
        "cond_ids": None if cond_ids is None else len(cond_ids),
        "num_images": num_images,
        "prefix_codes": None if prefix_codes is None else len(prefix_codes),
    }
    sizes = {name: size for name, size in sizes.items() if size is not None}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"arguments disagree on the batch size: {sizes}")
    return int(next(iter(sizes.values()), 1))


def check_prefix(
    prefix_codes: torch.Tensor | None, start: int, keep_depth: int, code_shape: tuple[int, int, int]
) -> None:
    """Raises `ValueError` for a prefix outside the code map `(H, W, D)`, without codes, or codes without a prefix."""
    height, width, depth = code_shape
    check_integer("start", start, 0, height * width)
    check_integer("keep_depth", keep_depth, 0, depth - 1)
    if (prefix_codes is None) != (start == keep_depth == 0):
        raise ValueError(
            "prefix_codes go with start > 0 or keep_depth > 0, got "
            f"{'no prefix_codes' if prefix_codes is None else 'prefix_codes'}, {start=}, {keep_depth=}"
        )
