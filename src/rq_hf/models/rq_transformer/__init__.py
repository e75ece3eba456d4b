from .configuration_rq_transformer import RQStackConfig, RQTransformerConfig
from .modeling_rq_transformer import RQTransformerModel, RQTransformerOutput

__all__ = ["RQStackConfig", "RQTransformerConfig", "RQTransformerModel", "RQTransformerOutput"]
