"""Converters of the authors' checkpoints: `python -m rq_hf.convert --help`."""

from .conversion import convert_original_checkpoint, single_file_config, single_file_weights
from .mar import convert_mar_checkpoint

__all__ = ["convert_mar_checkpoint", "convert_original_checkpoint", "single_file_config", "single_file_weights"]
