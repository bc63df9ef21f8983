"""Bulk encoding of image-report pairs, and search in the embeddings."""

from typing import TYPE_CHECKING

from medmoe_hf.common.lazy import lazy_attributes

if TYPE_CHECKING:
    from medmoe_hf.errors import EncodeError as EncodeError
    from medmoe_hf.search.encode import EncodeRecord as EncodeRecord
    from medmoe_hf.search.encode import encode_sources as encode_sources
    from medmoe_hf.search.index import EmbeddingIndex as EmbeddingIndex
    from medmoe_hf.search.index import Hit as Hit
    from medmoe_hf.search.index import hits_table as hits_table
    from medmoe_hf.search.index import search as search

__getattr__, __all__ = lazy_attributes(
    __name__,
    {
        "medmoe_hf.errors": ["EncodeError"],
        "medmoe_hf.search.encode": ["EncodeRecord", "encode_sources"],
        "medmoe_hf.search.index": ["EmbeddingIndex", "Hit", "hits_table", "search"],
    },
)
