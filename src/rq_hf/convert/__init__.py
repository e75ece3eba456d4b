"""Converter of the authors' checkpoints: `python -m rq_hf.convert --help`."""

from .conversion import convert_original_checkpoint, single_file_config, single_file_weights

__all__ = ["convert_original_checkpoint", "single_file_config", "single_file_weights"]
