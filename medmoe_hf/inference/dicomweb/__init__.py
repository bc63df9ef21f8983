"""Studies of DICOMweb servers."""

from typing import TYPE_CHECKING

from medmoe_hf.common.lazy import lazy_attributes

if TYPE_CHECKING:
    from medmoe_hf.inference.dicomweb.service import DownloadLimits as DownloadLimits

__getattr__, __all__ = lazy_attributes(__name__, {"medmoe_hf.inference.dicomweb.service": ["DownloadLimits"]})
