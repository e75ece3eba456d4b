from .presets import PRESETS
from .rq_transformer import RQStackConfig, RQTransformerConfig, RQTransformerModel, RQTransformerOutput
from .rq_vae import ResidualQuantizer, RQVAEModel, RQVAEOutput

__all__ = [
    "PRESETS",
    "RQStackConfig",
    "RQTransformerConfig",
    "RQTransformerModel",
    "RQTransformerOutput",
    "RQVAEModel",
    "RQVAEOutput",
    "ResidualQuantizer",
]
