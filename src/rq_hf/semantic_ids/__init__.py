from .report import SemanticIdReport
from .semantic_ids import SemanticIds

__all__ = ["SemanticIdReport", "SemanticIds"]
