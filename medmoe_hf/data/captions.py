"""Caption rules: which sentence to train on where, as in UniMed, several are joined by a tag."""

import math
import random
from typing import Any, NamedTuple

from medmoe_hf.errors import ArgumentError, CaptionError


class CaptionRule(NamedTuple):
    """How the sentences (items) of a text are joined, and which of them is the caption.

    Attributes:
        tag: Separator between the items (and usually after the last one); empty if the text is a single item.
        least: Minimum number of items, including empty ones.
        most: Maximum number of items.
        drawn: Number of leading items from which one is chosen at random, ignoring empty items and placeholders.
        report: Index of the item that is preferred if it is not empty.
        placeholder: Text that stands for an empty item.
    """

    tag: str
    least: int = 1
    most: int = 1
    drawn: int = 0
    report: int | None = None
    placeholder: str = ""


# Items may be missing where any of them will do; where the position matters, all are required.
CAPTION_RULES: dict[str, CaptionRule] = {
    "plain": CaptionRule("", report=0),
    "radimagenet": CaptionRule("_radimagenet_", most=10, drawn=10),
    "chexpert": CaptionRule("_chexpert_", most=10, drawn=10),
    "chestxray8": CaptionRule("_chestxray8_", most=10, drawn=10),
    "openi": CaptionRule("_openi_", most=4, report=0),
    "mimiccxr": CaptionRule("_mimiccxr_", least=12, most=12, drawn=10, report=11, placeholder="noreportpresent"),
    # An empty eleventh item is indistinguishable from the end of the text.
    "all_retina_merged": CaptionRule("_all_retina_merged_", least=10, most=11, drawn=10),
    "dr": CaptionRule("_dr_", most=15, drawn=15),
    "medicat": CaptionRule("_medicat_", least=2, most=2, drawn=2, placeholder="nothingpresent"),
}
"""Rules by name: `plain`, then the tags of UniMed's shards."""

RULE_MODALITY: dict[str, str | None] = {
    "plain": None,
    "radimagenet": None,
    "chexpert": "xray",
    "chestxray8": "xray",
    "openi": "xray",
    "mimiccxr": "xray",
    "all_retina_merged": "fundus",
    "dr": "fundus",
    "medicat": None,
}
"""Modality of all images of a rule's source, by name of the rule; None if the rule does not determine it."""


_EMPTY_WORDS = frozenset(
    ("nan", "-nan", "na", "n/a", "n.a.", "none", "null", "nil", "nat", "<na>", "#n/a", "#n/a n/a", "#na", "#null!")
)


def is_empty(value: Any) -> bool:
    """Returns whether a cell is empty.

    Empty are None, NaN, text without letters and digits ("", "-", "..."), and "NaN", "n/a", "none", "null" and the
    like.
    """
    if value is None:
        return True
    if isinstance(value, (bytes, bytearray)):
        value = value.decode("utf-8", errors="replace")
        if "\ufffd" in value:
            return False
    if isinstance(value, str):
        text = value.strip().casefold()
        return text in _EMPTY_WORDS or not any(letter.isalnum() for letter in text)
    try:
        return math.isnan(value)  # including numpy's numbers
    except (TypeError, ValueError, OverflowError):
        return False


def apply_rule(rule: str, text: str, rng: random.Random) -> str:
    """Returns the caption to train on.

    Args:
        rule: Name of the rule, a key of `CAPTION_RULES`.
        text: Text of the caption field.
        rng: Generator for rules that choose an item at random.

    Returns:
        One item of `text`, without surrounding white space.

    Raises:
        CaptionError: If `text` does not match the rule, or all items are empty. The message has counts and lengths.
        ValueError: If there is no such rule.

    Example:
        >>> import random
        >>> from medmoe_hf.data.captions import apply_rule
        >>> text = "No effusion._openi_Clear lungs._openi_"
        >>> apply_rule("openi", text, random.Random(0))
        'No effusion.'
    """
    if rule not in CAPTION_RULES:
        raise ArgumentError(f"Unknown caption rule {rule!r}; known rules are {', '.join(CAPTION_RULES)}.")
    tag, least, most, drawn, report, placeholder = CAPTION_RULES[rule]
    if tag not in text:
        raise CaptionError(
            f"Caption rule {rule!r} requires the tag {tag!r}; a text of {len(text)} characters has none."
        )
    items = [item.strip() for item in text.split(tag)] if tag else [text.strip()]
    if len(items) > 1 and not items[-1]:
        items.pop()  # the trailing tag
    if not least <= len(items) <= most:
        expected = str(most) if least == most else f"{least} to {most}"
        raise CaptionError(
            f"Caption rule {rule!r} requires {expected} items; a text of {len(text)} characters has {len(items)}."
        )
    if report is not None and items[report] != placeholder and not is_empty(items[report]):
        return items[report]
    choices = [item for item in items[:drawn] if item != placeholder and not is_empty(item)]
    if not choices:
        raise CaptionError(
            f"Caption rule {rule!r} finds no caption among {len(items)} items of a text of {len(text)} characters."
        )
    return rng.choice(choices)


def detect_rule(text: str) -> str:
    """Returns the rule whose tag the text contains, or `plain`. Of several tags, the most frequent one counts.

    A file name such as `left_dr_01` in a sentence can look like a tag, but the actual tag follows every item.
    """
    counts = {name: text.count(rule.tag) for name, rule in CAPTION_RULES.items() if rule.tag}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else "plain"
