"""From the fields of a row to its caption, modality, subject and label.

`source` is a model of `medmoe_hf.data.sources` throughout. Reasons of faults never quote a caption, which may contain
patient data.
"""

import random
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from medmoe_hf.data.caption_templates import choose_template, fill_template
from medmoe_hf.data.captions import RULE_MODALITY, apply_rule, detect_rule, is_empty
from medmoe_hf.data.faults import SampleError
from medmoe_hf.data.fields import CAPTION_FIELDS, MODALITY_FIELDS, find_field
from medmoe_hf.data.modality_words import modality_from_text
from medmoe_hf.data.sources import PhantomSource
from medmoe_hf.errors import CaptionError
from medmoe_hf.model.modalities_medmoe import MODALITIES, UNKNOWN_MODALITY, modality_id

_UNKNOWN = ("unknown", "Unknown", "UNKNOWN", b"unknown")


def subject_of(row: Mapping[str, Any], field: str | None) -> str | None:
    """Returns the subject of a row as text, equal for 7, 7.0 and " 7 ".

    Args:
        row: Fields of the sample.
        field: Field with the subject, if any.

    Returns:
        The subject; None without a field and for an empty cell.

    Raises:
        SampleError: If the row lacks the field.
    """
    if field is None:
        return None
    if field not in row:
        raise SampleError("no subject field", f"the row has no field `{field}`, which `subject` names", field)
    value = row[field]
    if is_empty(value):
        return None
    text = value.decode("utf-8", errors="replace") if isinstance(value, (bytes, bytearray)) else str(value)
    return re.sub(r"\.0+$", "", text.strip()) if re.fullmatch(r"-?\d+\.0+", text.strip()) else text.strip()


def label_of(row: Mapping[str, Any], field: str | None) -> str | int | float | None:
    """Returns the label of a row.

    Args:
        row: Fields of the sample.
        field: Field with the label; None for `label`.

    Returns:
        The label. Several labels are sorted and joined, so that their order does not matter. None for an empty cell,
        and for a value that is neither text nor a number (a field `label` may also be a mask, for example).
    """
    value = row.get(field or "label")
    if isinstance(value, (bytes, bytearray)):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (list, tuple)) and all(isinstance(part, (str, int)) for part in value):
        value = ", ".join(sorted(map(str, value)))
    return None if is_empty(value) or not isinstance(value, (str, int, float)) else value


def caption_of(source: Any, row: dict[str, Any], rng: random.Random, fixed: bool = False) -> tuple[str, str]:
    """Returns the caption rule of a row, and the caption.

    Args:
        source: The source.
        row: Fields of the sample.
        rng: Generator for rules that choose one of several sentences, for templates and for synonyms.
        fixed: Whether to use the first template that fits, and the first synonym, instead of random ones.

    Raises:
        SampleError: If there is no caption.
    """
    template, drawn = source.caption_template, None if fixed else rng
    if source.captions is not None:
        entry = choose_template(source.captions, row, drawn)
        if entry.field is not None:
            return "plain", _text(row[entry.field], entry.field).strip()
        template = entry.template
    if template is not None:
        return "plain", fill_template(template, row, source.synonyms, drawn)
    key = find_field(row, source.caption, CAPTION_FIELDS)
    if key is None:
        wanted = f"`{source.caption}`" if source.caption is not None else ", ".join(CAPTION_FIELDS)
        raise SampleError(
            "no caption field", f"the row has no field {wanted}; specify it with `caption`", source.caption
        )
    text = row[key]
    if is_empty(text):
        raise SampleError("empty caption", "the caption is empty", key)
    text = _text(text, key)
    rule = detect_rule(text) if source.caption_rule == "auto" else source.caption_rule
    try:
        return rule, apply_rule(rule, text, rng)
    except CaptionError as error:
        raise SampleError("caption does not match its rule", str(error), key) from None


def _text(value: Any, key: str) -> str:
    if isinstance(value, (bytes, bytearray)):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise SampleError("caption is not UTF-8", "the caption is not UTF-8; convert it to UTF-8", key) from None
    if not isinstance(value, str):
        kind = f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (list, tuple, dict)) else "")
        raise SampleError("caption is not text", f"the caption is {kind}; one text is expected", key)
    return value


def modality_of(source: Any, row: dict[str, Any], rule: str, caption: str, header: str | None) -> int:
    """Returns the modality id of a sample.

    Args:
        source: The source; its `modality` specifies where to look.
        row: Fields of the sample.
        rule: Caption rule of the sample.
        caption: Caption of the sample, after the rule.
        header: Modality from the image's header; None if it has none or has not been read.

    Returns:
        The id 0..5, or -100 if the modality is unknown.

    Raises:
        SampleError: For a value that is not a modality.
    """
    for origin in _modality_origins(source, row, rule):
        if origin == "unknown":
            return UNKNOWN_MODALITY
        key = origin.removeprefix("field:") if origin.startswith("field:") else None
        if origin == "caption":
            name: Any = modality_from_text(caption)
        elif origin == "dicom":
            name = header
        elif key is None:
            name = origin
        elif key in row:
            name = row[key]
        elif isinstance(source.modality, list):
            continue
        else:
            raise SampleError(f"no field {key}", f"the row has no field `{key}`, which `modality` names", key)
        try:
            found = UNKNOWN_MODALITY if is_empty(name) or name in _UNKNOWN else modality_id(name)
        except ValueError:
            known = ", ".join(MODALITIES)
            raise SampleError(
                "unknown modality name", f"the value is not a modality; use {known}, or an id from 0 to 5", key
            ) from None
        if found != UNKNOWN_MODALITY:
            return found
    return UNKNOWN_MODALITY


def _modality_origins(source: Any, row: dict[str, Any], rule: str) -> list[str]:
    """Returns where to look for the modality of a row, in order."""
    if isinstance(source.modality, list):
        return list(source.modality)
    if source.modality is not None:
        return [source.modality]
    of_rule = RULE_MODALITY.get(rule)
    if of_rule is not None:
        return [of_rule]
    return [f"field:{key}" for key in MODALITY_FIELDS if key in row][:1]


def modality_of_source(source: Any) -> int | None:
    """Returns the modality id of all samples of a source, as far as it is known before an image is read.

    Returns:
        The id; -100 if nothing is known; None if each row has its own modality.
    """
    if source.modality is None:
        if isinstance(source, PhantomSource):
            # Drawing all samples in advance would take as long as training on them.
            return modality_id(source.modalities[0]) if len(source.modalities) == 1 else UNKNOWN_MODALITY
        of_rule = RULE_MODALITY.get(_rule(source))
        return None if of_rule is None else modality_id(of_rule)
    for origin in source.modality if isinstance(source.modality, list) else [source.modality]:
        if origin == "caption" or origin.startswith("field:"):
            return UNKNOWN_MODALITY if isinstance(source, PhantomSource) else None
        if origin != "dicom":
            try:
                return modality_id(origin)
            except ValueError:
                return UNKNOWN_MODALITY
    return UNKNOWN_MODALITY


def modality_before_reading(source: Any, row: dict[str, Any]) -> int:
    """Returns the modality id of a row without reading its image.

    Args:
        source: The source.
        row: Fields of the sample; those of `fields_before_reading` are sufficient.

    Returns:
        The id; -100 if the modality is unknown, or only the image's header tells it.
    """
    try:
        rule, caption = _rule(source), ""
        if _needs_caption(source):
            # Where a rule chooses one of several sentences, any of them represents the others.
            rule, caption = caption_of(source, row, random.Random(0), fixed=True)
        return modality_of(source, row, rule, caption, None)
    except SampleError:
        return UNKNOWN_MODALITY  # counted as a fault when the sample is read


def fields_before_reading(source: Any) -> set[str]:
    """Returns the fields that `modality_before_reading` uses."""
    origins = source.modality if isinstance(source.modality, list) else [source.modality or ""]
    fields = {origin.removeprefix("field:") for origin in origins if origin.startswith("field:")}
    if source.modality is None:
        fields |= set(MODALITY_FIELDS)
    if _needs_caption(source):
        fields |= {source.caption} if source.caption is not None else set(CAPTION_FIELDS)
        fields |= set(source.caption_fields)
    return fields


def _needs_caption(source: Any) -> bool:
    origins = source.modality if isinstance(source.modality, list) else [source.modality]
    return "caption" in origins or (source.modality is None and _rule(source) == "auto")


def _rule(source: Any) -> str:
    rule: str = source.caption_rule if source.caption_template is None else "plain"
    return rule
