"""Captions of UniMed's layout, several sentences joined by a tag: which of them to train on."""

import math
import random
from typing import Any, NamedTuple

from medmoe_hf.errors import ArgumentError, CaptionError


class CaptionRule(NamedTuple):
    """How the sentences of one kind of source are joined, and which of them is the caption.

    Attributes:
        tag: what stands between the items (and mostly after the last); empty where the text is one item.
        least: the fewest items that a text has, blank ones counted.
        most: the most items that a text has.
        drawn: how many of the first items one is drawn from; blank items and placeholders are never drawn.
        report: position of the item that is taken instead wherever it says something.
        placeholder: what an item says in place of nothing.
    """

    tag: str
    least: int = 1
    most: int = 1
    drawn: int = 0
    report: int | None = None
    placeholder: str = ""


# Fewer items do no harm where each is as good as another; where a position means something, all have to be there.
CAPTION_RULES: dict[str, CaptionRule] = {
    "plain": CaptionRule("", report=0),
    "radimagenet": CaptionRule("_radimagenet_", most=10, drawn=10),
    "chexpert": CaptionRule("_chexpert_", most=10, drawn=10),
    "chestxray8": CaptionRule("_chestxray8_", most=10, drawn=10),
    "openi": CaptionRule("_openi_", most=4, report=0),
    "mimiccxr": CaptionRule("_mimiccxr_", least=12, most=12, drawn=10, report=11, placeholder="noreportpresent"),
    # A blank eleventh item looks like the end of the text.
    "all_retina_merged": CaptionRule("_all_retina_merged_", least=10, most=11, drawn=10),
    "dr": CaptionRule("_dr_", most=15, drawn=15),
    "medicat": CaptionRule("_medicat_", least=2, most=2, drawn=2, placeholder="nothingpresent"),
}
"""Name -> rule, `plain` first, then the tags of UniMed's shards."""

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
"""Name -> the modality that all images of the rule's source have, None where it is known from elsewhere or unknown."""


_EMPTY_WORDS = frozenset(
    ("nan", "-nan", "na", "n/a", "n.a.", "none", "null", "nil", "nat", "<na>", "#n/a", "#n/a n/a", "#na", "#null!")
)


def is_empty(value: Any) -> bool:
    """Whether a cell says nothing: None, NaN, no letter or digit ("", "-", "..."), or what tables write for that
    ("NaN", "n/a", "none", "null" and the like)."""
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
        return math.isnan(value)  # numpy's numbers too
    except (TypeError, ValueError, OverflowError):
        return False


def apply_rule(rule: str, text: str, rng: random.Random) -> str:
    """The caption to train on.

    Args:
        rule: a name in `CAPTION_RULES`.
        text: what the shard holds.
        rng: draws where the rule leaves a choice; nothing else is random.

    Returns:
        One item of `text`, without the white space around it.

    Raises:
        CaptionError: if `text` is not laid out as the rule says or nothing remains of it. It gives counts and lengths.
        ValueError: if there is no such rule.
    """
    if rule not in CAPTION_RULES:
        raise ArgumentError(f"Unknown caption rule {rule!r}; there are {', '.join(CAPTION_RULES)}.")
    tag, least, most, drawn, report, placeholder = CAPTION_RULES[rule]
    if tag not in text:
        raise CaptionError(f"Caption rule {rule!r} needs the tag {tag!r}; a text of {len(text)} characters has none.")
    items = [item.strip() for item in text.split(tag)] if tag else [text.strip()]
    if len(items) > 1 and not items[-1]:
        items.pop()  # the trailing tag
    if not least <= len(items) <= most:
        expected = str(most) if least == most else f"{least} to {most}"
        raise CaptionError(
            f"Caption rule {rule!r} needs {expected} items; a text of {len(text)} characters has {len(items)}."
        )
    if report is not None and items[report] != placeholder and not is_empty(items[report]):
        return items[report]
    choices = [item for item in items[:drawn] if item != placeholder and not is_empty(item)]
    if not choices:
        raise CaptionError(
            f"Caption rule {rule!r} finds nothing to train on among {len(items)} items of a text of "
            f"{len(text)} characters."
        )
    return rng.choice(choices)


def detect_rule(text: str) -> str:
    """The rule whose tag the text contains, `plain` if none; of several tags the most frequent one.

    A file name such as `left_dr_01` in a sentence can look like a tag, but the real one stands after every item.
    """
    counts = {name: text.count(rule.tag) for name, rule in CAPTION_RULES.items() if rule.tag}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else "plain"
