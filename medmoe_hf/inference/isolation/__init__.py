"""Files decoded in processes of their own, so that the fault of a codec ends with the file."""

from typing import TYPE_CHECKING

from medmoe_hf.common.lazy import lazy_attributes

if TYPE_CHECKING:
    from medmoe_hf.inference.isolation.processes import DecodingLimits as DecodingLimits
    from medmoe_hf.inference.isolation.reader import IsolatedReader as IsolatedReader

__getattr__, __all__ = lazy_attributes(
    __name__,
    {
        "medmoe_hf.inference.isolation.processes": ["DecodingLimits"],
        "medmoe_hf.inference.isolation.reader": ["IsolatedReader"],
    },
)
