"""Predictions for whole studies over HTTP."""

from typing import TYPE_CHECKING

from medmoe_hf.common.lazy import lazy_attributes

if TYPE_CHECKING:
    from medmoe_hf.inference.serving.app import create_app as create_app
    from medmoe_hf.inference.serving.app import serve as serve
    from medmoe_hf.inference.serving.archives import Limits as Limits

__getattr__, __all__ = lazy_attributes(
    __name__,
    {
        "medmoe_hf.inference.serving.app": ["create_app", "serve"],
        "medmoe_hf.inference.serving.archives": ["Limits"],
    },
)
