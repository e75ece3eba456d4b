from .modeling_rq_vae import RQVAEModel, RQVAEOutput
from .residual_quantizer import QuantizerEncoding, QuantizerOutput, ResidualQuantizer

__all__ = ["QuantizerEncoding", "QuantizerOutput", "RQVAEModel", "RQVAEOutput", "ResidualQuantizer"]
