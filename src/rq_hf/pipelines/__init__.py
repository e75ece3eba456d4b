from .pipeline_mar import MARPipeline, MARPipelineOutput
from .pipeline_rq import RQPipeline, RQPipelineOutput

__all__ = ["MARPipeline", "MARPipelineOutput", "RQPipeline", "RQPipelineOutput"]
