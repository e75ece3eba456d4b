from .report import Figure, Report

__all__ = ["Figure", "Report"]
