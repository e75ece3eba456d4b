from .modeling_rq_vae import RQVAEModel, RQVAEOutput
from .residual_quantizer import ResidualQuantizer

__all__ = ["RQVAEModel", "RQVAEOutput", "ResidualQuantizer"]
