"""The six default modalities: names, order, aliases, DICOM codes and ids."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .errors_medmoe import ArgumentError

UNKNOWN_MODALITY = -100
"""The id of an unknown modality: ignored by the auxiliary loss; the image tower uses its router instead."""

DICOM_CODES: dict[str, tuple[str, ...]] = {
    "xray": ("CR", "DX", "MG", "RG", "IO", "PX", "XA", "RF"),
    "ct": ("CT",),
    "mri": ("MR",),
    "ultrasound": ("US", "IVUS"),
    "histopathology": ("SM", "GM"),
    "fundus": ("OP",),
}
"""Name -> codes of DICOM's Modality (PS3.3 C.7.3.1.1.1). Other codes (PT, NM, OT, SEG) are unknown."""

_COMMON_ALIASES: dict[str, tuple[str, ...]] = {
    "xray": ("x-ray", "x ray", "radiograph", "cxr", "xr"),
    "ct": ("computed tomography", "cat"),
    "mri": ("magnetic resonance",),
    "ultrasound": ("sonography", "sonogram"),
    "histopathology": ("pathology", "histology"),
    "fundus": ("retina", "retinal", "fundus photograph"),
}

MODALITIES: Any = tuple(DICOM_CODES)
"""The names in the order of experts: the position is the id."""

MODALITY_ALIASES: dict[str, tuple[str, ...]] = {
    name: (*_COMMON_ALIASES[name], *(code.lower() for code in codes if code.lower() != name))
    for name, codes in DICOM_CODES.items()
}
"""Name -> all aliases, in lower case."""

_CANONICAL = {
    **{name: name for name in MODALITIES},
    **{alias: name for name, aliases in MODALITY_ALIASES.items() for alias in aliases},
}
_NAME_BY_DICOM_CODE = {code: name for name, codes in DICOM_CODES.items() for code in codes}


def modality_of_dicom(code: Any) -> str | None:
    """Returns the name of a value of DICOM's Modality; None if it is empty or of another kind."""
    return _NAME_BY_DICOM_CODE.get(str(code or "").strip().upper())


def modality_id(modality: Any, names: Sequence[str] | Mapping[int, str] = MODALITIES) -> int:
    """Returns the id of a modality.

    Args:
        modality: A name, an alias (`"cxr"`), a DICOM code (`"DX"`) or an id; case is ignored, and ids may also be
            strings or floats, as in tables (`"2"`, 2.0). None, NaN, -100 and blank strings mean unknown.
        names: The names in the order of ids, or by id, as in a model's configuration; a name takes precedence over an
            alias.

    Returns:
        The id, or -100 if the modality is unknown.

    Raises:
        ValueError: Anything else, and an alias that matches two of `names`.

    Example:
        >>> from medmoe_hf.model.modalities_medmoe import modality_id
        >>> modality_id("CXR"), modality_id("MR"), modality_id(None)
        (0, 2, -100)
    """
    known = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
    modality = modality.item() if hasattr(modality, "item") else modality
    item = modality.decode(errors="replace") if isinstance(modality, bytes) else modality
    if isinstance(item, str):
        key = item.strip().lower()
        if not key:
            return UNKNOWN_MODALITY
        for index, name in known.items():
            if name.lower() == key:
                return index
        canonical = _CANONICAL.get(key)
        if canonical is not None:
            same = [index for index, name in known.items() if _CANONICAL.get(name.strip().lower()) == canonical]
            if len(same) == 1:
                return same[0]
        try:
            item = float(key)
        except ValueError:
            item = modality
    if isinstance(item, float):
        if math.isnan(item):
            return UNKNOWN_MODALITY
        item = int(item) if item.is_integer() else item
    if item is None:
        return UNKNOWN_MODALITY
    if isinstance(item, int) and not isinstance(item, bool) and item in (UNKNOWN_MODALITY, *known):
        return item
    listed = ", ".join(f"{index}: {name}" for index, name in known.items())
    raise ArgumentError(
        f"Unknown modality {modality!r}. Known are {{{listed}}}, their aliases and DICOM codes, and "
        f"{UNKNOWN_MODALITY} = unknown."
    )
