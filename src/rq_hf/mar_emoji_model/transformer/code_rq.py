from rq_hf import MARTransformerConfig  # noqa: F401
