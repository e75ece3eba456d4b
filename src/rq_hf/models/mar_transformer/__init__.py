from .configuration_mar_transformer import MARHeadConfig, MARStackConfig, MARTransformerConfig
from .modeling_mar_transformer import MARTransformerModel, MARTransformerOutput

__all__ = ["MARHeadConfig", "MARStackConfig", "MARTransformerConfig", "MARTransformerModel", "MARTransformerOutput"]
