from .pipeline_rq import RQPipeline, RQPipelineOutput

__all__ = ["RQPipeline", "RQPipelineOutput"]
