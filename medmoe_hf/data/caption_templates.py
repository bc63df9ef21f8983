"""Captions from the fields of a row: weighted templates, and synonyms for values, drawn anew at each visit."""

import random
import re
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from medmoe_hf.data.captions import is_empty
from medmoe_hf.data.cells import cell_text, cell_texts
from medmoe_hf.data.faults import SampleError
from medmoe_hf.data.fields import template_fields


class CaptionTemplate(BaseModel):
    """One entry of a source's `captions`. It is used for the rows in which all of its fields have a value.

    Attributes:
        template: Text with fields in braces, such as `"{modality} image of the {body_part}"`. A plain text in
            `captions` is a template with weight 1.
        field: Field whose text is the caption, as it is, instead of a template.
        weight: Relative frequency among the entries that fit a row, above 0.

    Example:
        >>> from medmoe_hf.data.caption_templates import CaptionTemplate
        >>> entry = CaptionTemplate(template="{organ}: {label}", weight=0.5)
        >>> entry.fits({"organ": "lung", "label": "n/a"})
        False
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    template: str | None = None
    field: str | None = None
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _one_form(self) -> "CaptionTemplate":
        if (self.template is None) == (self.field is None):
            raise ValueError("an entry of `captions` has either a `template` or a `field`")
        if self.template is not None:
            check_template(self.template, "template")
        return self

    def __str__(self) -> str:
        return f"field {self.field}" if self.template is None else f'"{self.template}"'

    @property
    def fields(self) -> list[str]:
        """Fields of a row that the caption is made of."""
        return [self.field or ""] if self.template is None else template_fields(self.template)

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Returns whether no field of the caption is missing or empty in a row."""
        return not any(is_empty(row.get(name)) for name in self.fields)


def _as_entry(value: Any) -> Any:
    return {"template": value} if isinstance(value, str) else value


def _as_synonyms(value: Any) -> Any:
    """Converts the values that have synonyms, which may be numbers in YAML, to text, and single synonyms to lists."""
    if not isinstance(value, Mapping):
        return value
    found: dict[str, Any] = {}
    for name, words in value.items():
        if isinstance(name, bool) or not isinstance(name, (str, int, float)):
            raise ValueError(f"the value {name!r} is not text; put it in quotation marks")
        key = cell_text(name).casefold()
        if not key:
            raise ValueError(f"{name!r} is an empty cell, which is left out of captions")
        if key in found:
            raise ValueError(f"the value {name!r} occurs twice; upper and lower case do not matter")
        found[key] = [words] if isinstance(words, str) else words
    return found


Captions = Annotated[list[Annotated[CaptionTemplate, BeforeValidator(_as_entry)]], Field(min_length=1)]
"""Type of `captions`: templates as texts, or entries with a weight."""
Synonyms = dict[
    str,
    Annotated[
        dict[str, Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]],
        BeforeValidator(_as_synonyms),
    ],
]
"""Type of `synonyms`: field -> value, in lower case -> words for it."""


def check_template(template: str, key: str) -> None:
    """Checks the braces of a template.

    Raises:
        ValueError: For unbalanced braces and fields without a name; the message names `key`.
    """
    try:
        template_fields(template)
        if any(re.search(r"\d{5}|\{", form or "") for _, _, form, _ in Formatter().parse(template)):
            raise ValueError("a width is in braces, or above 9999")
    except ValueError as error:
        raise ValueError(f"`{key}`: {error}; write fields as `{{label}}`, braces as `{{{{`") from None


def choose_template(
    captions: Sequence[CaptionTemplate], row: Mapping[str, Any], rng: random.Random | None
) -> CaptionTemplate:
    """Returns the entry for one visit of a row.

    Args:
        captions: The entries of the source.
        row: Fields of the row.
        rng: Generator that draws among the entries that fit, by weight; None for the first of them.

    Raises:
        SampleError: If no entry fits. The message names the fields that are empty.
    """
    fitting = [entry for entry in captions if entry.fits(row)]
    if not fitting:
        empty = list(dict.fromkeys(name for one in captions for name in one.fields if is_empty(row.get(name))))
        raise SampleError(
            "no caption fits",
            f"every entry of `captions` needs a field that is empty in this row ({', '.join(empty)}); add a template "
            "without them",
            empty[0],
        )
    if rng is None or len(fitting) == 1:
        return fitting[0]
    return rng.choices(fitting, [entry.weight for entry in fitting])[0]


def fill_template(
    template: str,
    row: Mapping[str, Any],
    synonyms: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    rng: random.Random | None = None,
) -> str:
    """Returns a template filled with the values of a row.

    Args:
        template: Text with fields in braces.
        row: Fields of the row. Empty cells are replaced by nothing; lists are joined by commas.
        synonyms: Field -> value in lower case -> words, one of which replaces the value.
        rng: Generator that draws among the words; None for the first one.

    Returns:
        The text. White space and punctuation that empty cells, or the ends of values, leave behind are tidied.

    Raises:
        SampleError: If a field is missing, all fields are empty, or a value does not fit its format.

    Example:
        >>> from medmoe_hf.data.caption_templates import fill_template
        >>> words = {"label": {"0": ["no finding", "normal"]}}
        >>> fill_template("{view}, {label} .", {"view": None, "label": 0}, words)
        'no finding.'
    """
    # In the order of the template, so that draws do not depend on the hash of names.
    names = list(dict.fromkeys(template_fields(template)))
    values: dict[str, Any] = {}
    for name in names:
        if name not in row:
            raise SampleError(f"no field {name}", f"the row has no field `{name}`", name)
        values[name] = _worded(row[name], name, (synonyms or {}).get(name, {}), rng)
    if names and all(isinstance(value, str) and value == "" for value in values.values()):
        raise SampleError("empty caption", f"every field of the template is empty ({', '.join(names)})", min(names))
    try:
        return tidy(template.format(**values))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError, OverflowError, MemoryError):
        raise SampleError(
            "caption template does not fit", f"the row's values do not fit the template {template!r}"
        ) from None


def _worded(value: Any, field: str, synonyms: Mapping[str, Sequence[str]], rng: random.Random | None) -> Any:
    """Returns what replaces a field: "" for an empty cell, a synonym, or the value itself, which may have a format."""
    if isinstance(value, (list, tuple)) and value and not any(isinstance(one, (list, dict)) for one in value):
        words = [str(_worded(one, field, synonyms, rng)) for one in value]
        return ", ".join(word for word in words if word)
    if is_empty(value):
        return ""
    if synonyms and not isinstance(value, Mapping):
        words = list(synonyms.get(cell_texts(value)[0].casefold(), ()))
        if words:
            return words[0] if rng is None else rng.choice(words)
    if isinstance(value, (bytes, bytearray)):
        try:
            return value.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise SampleError("caption is not UTF-8", "the caption is not UTF-8; convert it to UTF-8", field) from None
    return value


def tidy(text: str) -> str:
    """Returns a filled template without doubled white space and punctuation; the letter case is unchanged.

    Example:
        >>> from medmoe_hf.data.caption_templates import tidy
        >>> tidy("CT of the  chest , : benign nodule. .")
        'CT of the chest: benign nodule.'
    """
    text = re.sub(r"\(\s*\)|\[\s*\]", " ", text)
    text = " ".join(text.split())
    text = re.sub(r" ([,;:.!?)\]](?!\w))", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    # What is left of "a, {empty}: b" and "{a.}." is the last mark, but a full stop wins over a comma after it.
    text = re.sub(r"(?<!\.)([.!?])[.,;:](?!\.)", r"\1", text)
    text = re.sub(r"[,;:]+([,;:.!?])", r"\1", text)
    return text.strip(" ,;:")
