"""Converters of checkpoints of other code: `python -m rq_hf.convert --help`."""

from .conversion import convert_original_checkpoint, single_file_config, single_file_weights
from .embedding import convert_embedding_checkpoint
from .mar import convert_mar_checkpoint

__all__ = [
    "convert_embedding_checkpoint",
    "convert_mar_checkpoint",
    "convert_original_checkpoint",
    "single_file_config",
    "single_file_weights",
]
