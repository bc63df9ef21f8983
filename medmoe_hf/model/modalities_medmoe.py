"""The six default modalities: their order, the other names that people and DICOM have for them, and their ids."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .errors_medmoe import ArgumentError

UNKNOWN_MODALITY = -100
"""The id of an unknown modality: ignored by the auxiliary loss, left to the router by the image tower."""

DICOM_CODES: dict[str, tuple[str, ...]] = {
    "xray": ("CR", "DX", "MG", "RG", "IO", "PX", "XA", "RF"),
    "ct": ("CT",),
    "mri": ("MR",),
    "ultrasound": ("US", "IVUS"),
    "histopathology": ("SM", "GM"),
    "fundus": ("OP",),
}
"""Name -> the codes of DICOM's Modality (PS3.3 C.7.3.1.1.1). Those of other kinds (PT, NM, OT, SEG) stay unknown."""

_SPOKEN: dict[str, tuple[str, ...]] = {
    "xray": ("x-ray", "x ray", "radiograph", "cxr", "xr"),
    "ct": ("computed tomography", "cat"),
    "mri": ("magnetic resonance",),
    "ultrasound": ("sonography", "sonogram"),
    "histopathology": ("pathology", "histology"),
    "fundus": ("retina", "retinal", "fundus photograph"),
}

MODALITIES: Any = tuple(DICOM_CODES)
"""The names in expert order: the position is the id."""

MODALITY_ALIASES: dict[str, tuple[str, ...]] = {
    name: (*_SPOKEN[name], *(code.lower() for code in codes if code.lower() != name))
    for name, codes in DICOM_CODES.items()
}
"""Name -> all other names for it, in lower case."""

_CANONICAL = {
    **{name: name for name in MODALITIES},
    **{alias: name for name, aliases in MODALITY_ALIASES.items() for alias in aliases},
}
_OF_DICOM_CODE = {code: name for name, codes in DICOM_CODES.items() for code in codes}


def modality_of_dicom(code: Any) -> str | None:
    """The name that belongs to the value of DICOM's Modality; None for one of another kind, or an empty one."""
    return _OF_DICOM_CODE.get(str(code or "").strip().upper())


def modality_id(modality: Any, names: Sequence[str] | Mapping[int, str] = MODALITIES) -> int:
    """The id of a modality, however it is named.

    Args:
        modality: a name, an alias (`"cxr"`), DICOM's code (`"DX"`) or an id; in any case, and ids also as tables
            hold them, `"2"` or 2.0. None, NaN, -100 and blank strings mean unknown.
        names: the names that the ids stand for, as in a model's configuration; one of its own comes before an alias.

    Returns:
        the id, or -100 where the modality is unknown.

    Raises:
        ValueError: for anything else, and for an alias that fits two of `names`.
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
        f"Unknown modality {modality!r}. Known are {{{listed}}}, their aliases and DICOM's codes, and "
        f"{UNKNOWN_MODALITY} = unknown."
    )
