from .configuration_rqtransformer import RQStackConfig, RQTransformerConfig
from .modeling_rqtransformer import RQTransformerModel, RQTransformerOutput
from .presets import PRESETS
from .quantizer import ResidualQuantizer
from .rqvae import RQVAEModel, RQVAEOutput

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
