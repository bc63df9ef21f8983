"""The keys that all kinds of sources share, and the check that their fields exist."""

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from medmoe_hf.common.yaml_files import nearest
from medmoe_hf.data.caption_templates import Captions, Synonyms, check_template
from medmoe_hf.data.captions import CAPTION_RULES
from medmoe_hf.data.cells import cell_text
from medmoe_hf.data.fields import CAPTION_FIELDS, IMAGE_FIELDS, template_fields
from medmoe_hf.data.shards import DatasetShard, Shard
from medmoe_hf.data.tables import TableShard
from medmoe_hf.errors import ShardError, SourceError
from medmoe_hf.model.medical_images_medmoe import WINDOWS

MAX_CHECKED_SHARDS = 20
"""Shards that are opened to look for a field: tars may differ in their fields."""
_MAX_NAMED_FIELDS = 20  # fields listed in a message


def _as_values(value: Any) -> Any:
    """Converts the wanted values of a field, one or a list, to texts as of `cell_text`."""
    values = value if isinstance(value, list) else [value]
    for one in values:
        if isinstance(one, bool) or not (one is None or isinstance(one, (str, int, float))):
            raise ValueError(f"the value {one!r} is not text; put it in quotation marks")
    return [cell_text(one) for one in values]


_Values = dict[str, Annotated[list[str], BeforeValidator(_as_values), Field(min_length=1)]]


class BaseSource(BaseModel):
    """The keys that all kinds of sources share.

    Attributes:
        kind: Kind of source.
        name: Name in reports and model cards; by default the path, pattern or Hub id.
        weight: Relative frequency of samples of this source when sources are mixed, above 0.
        image: Field with the image; by default the first of `image`, `jpg`, `jpeg`, `png`, `webp`, `tif`, `tiff`,
            `dcm`, `nifti`, `nii`, `nii.gz`, `file_name`, `path` and `filepath`.
        caption: Field with the caption; by default the first of `caption`, `txt`, `text`, `report` and `title`.
        caption_rule: How the caption is taken from the field: `plain` (as it is), the rule of a tag (see
            `medmoe_hf.data.captions`), or `auto` (the rule whose tag the text contains).
        caption_template: Caption with fields in braces, such as `"a chest radiograph with {label}"`, used instead of
            the field; short for a single entry of `captions`, except that it is used as long as one of its fields has
            a value.
        captions: Several templates, one of which is drawn for each visit of a row, among those whose fields all have a
            value in it. An entry is a text with fields in braces, or has the keys of
            `medmoe_hf.data.caption_templates.CaptionTemplate`: `{template: "{label}", weight: 0.5}`, or
            `{field: report, weight: 3}` for the text of a field. Held-out pairs have the first one that fits.
        synonyms: Field to values to words, for templates: `{label: {"no finding": [normal, unremarkable]}}`. One of
            the words, drawn for each visit, replaces the value (held-out pairs: the first one). The letter case of
            values does not matter.
        where: Field to one value or a list: only rows with one of these values in each of the fields are used.
            `msd-*` is a pattern, and `null` an empty cell.
        where_not: Likewise: rows with one of these values in any of the fields are not used.
        modality: Where the modality comes from: its name, alias or DICOM code; `field:NAME` (a field with a name,
            alias or id); `caption` (the words of the caption); `dicom` (the header); or `unknown`. The entries of a
            list are tried in order until one yields a modality. By default it is that of the caption rule, if the rule
            has one, otherwise the field `modality` or `cls`, otherwise unknown.
        subject: Field with the patient or other subject of the image, by which data are split.
        label: Field with the class of the image, for training with `positives: label`; by default `label`, if it
            exists.
        window: Window for DICOM and NIfTI: name of a CT window, (center, width), or three names for three channels; by
            default as specified by the file (see `read_medical_image`).
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: str
    name: str | None = None
    weight: float = Field(default=1.0, gt=0)
    image: str | None = None
    caption: str | None = None
    caption_rule: str = "plain"
    caption_template: str | None = None
    captions: Captions | None = None
    synonyms: Synonyms | None = None
    where: _Values | None = None
    where_not: _Values | None = None
    modality: str | Annotated[list[str], Field(min_length=1)] | None = None
    subject: str | None = None
    label: str | None = None
    window: str | tuple[float, float] | tuple[str, str, str] | None = None

    later_keys: ClassVar[frozenset[str]] = frozenset(
        ("captions", "label", "synonyms", "where", "where_not", "revision", "rows")
    )

    @model_validator(mode="after")
    def _known_rule(self) -> "BaseSource":
        if self.caption_rule not in (*CAPTION_RULES, "auto"):
            raise ValueError(f"`caption_rule` must be one of {', '.join(CAPTION_RULES)} or auto")
        for name in (self.window,) if isinstance(self.window, str) else self.window or ():
            if isinstance(name, str) and name not in WINDOWS:
                raise ValueError(f"unknown `window` {name}; use {', '.join(WINDOWS)}")
        if self.caption_template is not None:
            check_template(self.caption_template, "caption_template")
        if self.captions is not None and (self.caption, self.caption_template, self.caption_rule) != (
            None,
            None,
            "plain",
        ):
            raise ValueError(
                "`captions` replaces `caption`, `caption_template` and `caption_rule`; write them as entries of it: "
                "`{field: report}` or a template"
            )
        templates = [entry.template for entry in self.captions or ()] + [self.caption_template]
        used = {name for template in templates if template is not None for name in template_fields(template)}
        if unused := sorted((self.synonyms or {}).keys() - used):
            raise ValueError(f"`synonyms` apply to fields of templates, and no template has `{{{unused[0]}}}`")
        return self

    @property
    def caption_fields(self) -> list[str]:
        """Fields that captions are made of, as far as `caption_template` or `captions` name them."""
        fields = [name for entry in self.captions or () for name in entry.fields]
        return list(dict.fromkeys(fields + template_fields(self.caption_template or "")))

    @property
    def filter_fields(self) -> list[str]:
        """Fields that `where` and `where_not` use."""
        return list(dict.fromkeys([*(self.where or {}), *(self.where_not or {})]))

    def identity(self) -> dict[str, Any]:
        """Returns what the order and content of samples depend on, as plain values for JSON.

        Keys that an earlier version did not have are left out unless they are set, so that its states stay valid.
        """
        return {
            name: value
            for name, value in self.model_dump(mode="json").items()
            if value is not None or name not in self.later_keys
        }

    def check(self, shards: Sequence[Shard]) -> None:
        """Checks that the fields of this source exist, before a sample is read.

        Args:
            shards: The source's shards, from `shards`.

        Raises:
            SourceError: If there are no samples, or no sample has the field that `image`, `caption`,
                `caption_template`, `captions`, `where`, `where_not`, `modality`, `subject` or `label` requires. The
                message lists the fields and suggests the nearest one.
        """
        if all(isinstance(shard, (TableShard, DatasetShard)) and not len(shard) for shard in shards):
            raise SourceError(f"{self.name or (shards[0].name if shards else self.kind)} has no samples.")
        fields: dict[str, None] = {}
        first = None
        for shard in shards[:MAX_CHECKED_SHARDS]:
            try:
                fields.update(dict.fromkeys(name for name in shard.fields() if name is not None))
            except (ShardError, OSError):
                continue  # counted as a fault when it is read
            first = first or shard.name
            problems = [problem for key, names in self._needed() if (problem := _missing_field(key, names, fields))]
            if not problems:
                return
        if fields:
            known = list(fields)
            some = ", ".join(known[:_MAX_NAMED_FIELDS]) + (", ..." if len(known) > _MAX_NAMED_FIELDS else "")
            raise SourceError(f"{first}: {'; '.join(problems)}. The columns are: {some}.")

    def _needed(self) -> list[tuple[str, Sequence[str]]]:
        """Returns the keys that require a field, each with the fields that it accepts."""
        needed: list[tuple[str, Sequence[str]]] = [("image", IMAGE_FIELDS if self.image is None else (self.image,))]
        if self.caption_template is not None or self.captions is not None:
            key = "captions" if self.caption_template is None else "caption_template"
            needed += [(key, (name,)) for name in self.caption_fields]
        else:
            needed.append(("caption", CAPTION_FIELDS if self.caption is None else (self.caption,)))
        conditions: dict[str, Mapping[str, Any] | None] = {"where": self.where, "where_not": self.where_not}
        needed += [(key, (name,)) for key, fields in conditions.items() for name in fields or ()]
        said = [self.modality] if isinstance(self.modality, str) else self.modality or []
        needed += [("modality", (one.removeprefix("field:"),)) for one in said if one.startswith("field:")]
        named = {"subject": self.subject, "label": self.label}
        return needed + [(key, (name,)) for key, name in named.items() if name is not None]

    def content_checksums(self) -> list[Any]:
        """Returns what identifies the content of this source, as plain values for JSON.

        Returns:
            `[name, size, checksum]` of each file, in the order of the shards. Names are without folders, so that data
            can be moved. Checksums cover the beginning and end of tars and parquet files, all bytes of tables, and the
            names and sizes of the images of a folder. Size and checksum of a missing file are None.
        """
        return []


def _missing_field(key: str, names: Sequence[str], fields: Collection[str]) -> str | None:
    """Returns a message if none of the fields that a key accepts exists, otherwise None."""
    if any(name in fields for name in names):
        return None
    if len(names) > 1:
        return f"no column for the {key}: specify it with `{key}`"
    near = nearest(names[0], fields)
    return f"no column `{names[0]}`" + (f"; did you mean `{near}`?" if near else "") + f" (`{key}`)"
