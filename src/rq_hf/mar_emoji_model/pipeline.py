import rq_hf

Pipeline = rq_hf.MARPipeline
