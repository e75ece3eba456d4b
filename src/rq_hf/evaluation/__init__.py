from .protocols import Protocol, PublishedRow, load_protocol, read_protocols
from .report import Figure, Report

__all__ = ["Figure", "Protocol", "PublishedRow", "Report", "load_protocol", "read_protocols"]
