from .mar_transformer import (
    MARHeadConfig,
    MARStackConfig,
    MARTransformerConfig,
    MARTransformerModel,
    MARTransformerOutput,
)
from .presets import PRESETS
from .rq_embedding import RQEmbeddingModel, RQEmbeddingOutput
from .rq_transformer import RQStackConfig, RQTransformerConfig, RQTransformerModel, RQTransformerOutput
from .rq_vae import ResidualQuantizer, RQVAEModel, RQVAEOutput

__all__ = [
    "MARHeadConfig",
    "MARStackConfig",
    "MARTransformerConfig",
    "MARTransformerModel",
    "MARTransformerOutput",
    "PRESETS",
    "RQEmbeddingModel",
    "RQEmbeddingOutput",
    "RQStackConfig",
    "RQTransformerConfig",
    "RQTransformerModel",
    "RQTransformerOutput",
    "RQVAEModel",
    "RQVAEOutput",
    "ResidualQuantizer",
]
