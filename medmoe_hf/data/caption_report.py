"""What `medmoe data inspect` prints about captions from fields: how many rows each template fits, and examples."""

import random
from collections.abc import Sequence
from typing import Any

from medmoe_hf.data.caption_templates import CaptionTemplate
from medmoe_hf.data.cells import cell_texts
from medmoe_hf.data.faults import SampleError
from medmoe_hf.data.parsing import caption_of

_EXAMPLES = 3  # captions per template


def caption_lines(source: Any, rows: Sequence[dict[str, Any]], seed: int) -> list[str]:
    """Returns the lines of a report: each template, its weight, and some captions that are made of it.

    Args:
        source: A source with `captions` or `caption_template`.
        rows: Fields of some rows.
        seed: Seed that selects rows, synonyms and captions.
    """
    rng = random.Random(seed)
    lines = []
    for entry in source.captions or [CaptionTemplate(template=source.caption_template)]:
        fitting = [row for row in rows if entry.fits(row)]
        lines.append(f"{entry}: weight {entry.weight:g}, fits {len(fitting):,} of {len(rows):,} rows")
        alone = source if source.captions is None else source.model_copy(update={"captions": [entry]})
        for row in rng.sample(fitting, min(_EXAMPLES, len(fitting))):
            try:
                lines.append(f"  {caption_of(alone, row, rng)[1]}")
            except SampleError as problem:
                lines.append(f"  {problem.reason}")
    return lines


def caption_warnings(source: Any, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns warnings of rows without a caption, and of values in `synonyms` that no row has.

    Args:
        source: A source with `captions` or `caption_template`.
        rows: Fields of all rows.
    """
    warnings = []
    without = sum(not any(entry.fits(row) for entry in source.captions) for row in rows) if source.captions else 0
    if without:
        warnings.append(f"no entry of `captions` fits {without:,} of {len(rows):,} rows, which cannot be used")
    for name, words in (source.synonyms or {}).items():
        found = {text.casefold() for row in rows for text in cell_texts(row.get(name))}
        missing = [value for value in words if value not in found]
        if missing:
            warnings.append(f"`synonyms` of `{name}`: no row has the value {', '.join(missing)}")
    return warnings
