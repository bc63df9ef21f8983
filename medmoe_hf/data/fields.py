"""Names of the fields of a sample: which ones are looked for where a source does not specify them."""

import re
from collections.abc import Collection, Sequence
from string import Formatter

from medmoe_hf.errors import ArgumentError

IMAGE_FIELDS = (
    *("image", "jpg", "jpeg", "png", "webp", "tif", "tiff", "dcm"),
    # the column of `niftifolder`, and the extensions in tars
    *("nifti", "nii", "nii.gz"),
    # `filepath` and `title` are the columns of open_clip's CSV
    *("file_name", "path", "filepath"),
)
CAPTION_FIELDS = ("caption", "txt", "text", "report", "title")
MODALITY_FIELDS = ("modality", "cls")


def find_field(row: Collection[str], name: str | None, defaults: Sequence[str]) -> str | None:
    """Returns the name of a field that a row has.

    Args:
        row: The row, or the names of its fields.
        name: Field that the source specifies, if any.
        defaults: Names to look for otherwise, in order.

    Returns:
        The name, or None if the row has no such field.
    """
    if name is not None:
        return name if name in row else None
    return next((default for default in defaults if default in row), None)


def template_fields(template: str) -> list[str]:
    """Returns the fields of a caption template.

    Raises:
        ValueError: For unbalanced braces, and for `{}` and `{0}`, which name no field.
    """
    names = [re.split(r"[.\[]", name)[0] for _, name, _, _ in Formatter().parse(template) if name is not None]
    for name in names:
        if not name or name.isdigit():
            raise ArgumentError("`{" + name + "}` names no field")
    return names
