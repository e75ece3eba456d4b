from .modeling_rq_embedding import RQEmbeddingModel, RQEmbeddingOutput

__all__ = ["RQEmbeddingModel", "RQEmbeddingOutput"]
