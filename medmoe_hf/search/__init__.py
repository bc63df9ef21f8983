"""Bulk encoding of image-report pairs, and search in what was encoded."""

from medmoe_hf.search.encode import EncodeError, EncodeRecord, encode_sources
from medmoe_hf.search.index import EmbeddingIndex, Hit, hits_table, search

__all__ = [
    "EmbeddingIndex",
    "EncodeError",
    "EncodeRecord",
    "Hit",
    "encode_sources",
    "hits_table",
    "search",
]
