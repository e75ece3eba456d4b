"""Residual-quantized image generation: RQ-VAE, RQ-Transformer and their pipeline."""

from pathlib import Path

from ._registration import register
from .convert import convert_embedding_checkpoint, convert_mar_checkpoint, convert_original_checkpoint
from .models import (
    PRESETS,
    MARHeadConfig,
    MARStackConfig,
    MARTransformerConfig,
    MARTransformerModel,
    ResidualQuantizer,
    RQEmbeddingModel,
    RQStackConfig,
    RQTransformerConfig,
    RQTransformerModel,
    RQVAEModel,
)
from .pipelines import MARPipeline, MARPipelineOutput, RQPipeline, RQPipelineOutput
from .semantic_ids import SemanticIdReport, SemanticIds

__version__ = "0.1.0"

register()

EMOJI_MODEL = str(Path(__file__).parent / "emoji_model")
"""Folder of the text-to-emoji pipeline that comes with the package, an [`RQPipeline`]."""

MAR_EMOJI_MODEL = str(Path(__file__).parent / "mar_emoji_model")
"""Folder of the one of the other method, a [`MARPipeline`]."""

CIFAR10_CLASSIFIER = str(Path(__file__).parent / "cifar10_classifier")
"""Folder of the classifier of CIFAR-10 that comes with the package, a [`~rq_hf.metrics.SmallClassifier`]."""

__all__ = [
    "CIFAR10_CLASSIFIER",
    "EMOJI_MODEL",
    "MAR_EMOJI_MODEL",
    "MARHeadConfig",
    "MARPipeline",
    "MARPipelineOutput",
    "MARStackConfig",
    "MARTransformerConfig",
    "MARTransformerModel",
    "PRESETS",
    "RQEmbeddingModel",
    "RQPipeline",
    "RQPipelineOutput",
    "RQStackConfig",
    "RQTransformerConfig",
    "RQTransformerModel",
    "RQVAEModel",
    "ResidualQuantizer",
    "SemanticIdReport",
    "SemanticIds",
    "convert_embedding_checkpoint",
    "convert_mar_checkpoint",
    "convert_original_checkpoint",
]
