"""Groups of rows for balanced sampling, by the keys of `balance`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from medmoe_hf.common.yaml_files import nearest
from medmoe_hf.data.balancing import BalancedRows, group_shares, powers_of
from medmoe_hf.data.cells import cell_text, cell_texts
from medmoe_hf.data.known_rows import KnownRows
from medmoe_hf.data.parsing import (
    fields_before_reading,
    label_of,
    modality_before_reading,
    modality_of_source,
    subject_of,
)
from medmoe_hf.data.sources import PhantomSource, source_fields
from medmoe_hf.data.split import Split
from medmoe_hf.data.tables import FaultyRow
from medmoe_hf.errors import SourceError, StreamError
from medmoe_hf.model.modalities_medmoe import MODALITIES, UNKNOWN_MODALITY


def check_groups(known: KnownRows, balance: Sequence[str]) -> None:
    """Checks that sources can be divided into groups, before their rows are looked up.

    Args:
        known: The sources.
        balance: `modality`, `source`, `label` or the name of a field, for each level.

    Raises:
        StreamError: If rows of a source are not known before they are read.
        SourceError: If no source has a field of `balance`. The message suggests the nearest one.
    """
    for name, model in zip(known.names, known.sources, strict=True):
        if isinstance(model, PhantomSource):
            raise StreamError(
                f"`balance` requires groups that are known before a sample is read, and {name} draws samples "
                "while they are read. Write them to tars with `medmoe phantom`, or use `weight`."
            )
    fields = {name for shards in known.shards for name in source_fields(shards)}
    for key in balance:
        if key in ("modality", "source") or not fields:
            continue
        names = {model.label or "label" for model in known.sources} if key == "label" else {key}
        if not names & fields:
            near = nearest(key, [*fields, "modality", "source", "label"])
            raise SourceError(
                f"`balance`: no source has a field `{key}`"
                + (f"; did you mean `{near}`?" if near else ".")
                + (" Specify the field with the label by `label` in a source." if key == "label" else "")
                + f" The fields are: {', '.join(sorted(fields))}."
            )


def find_groups(
    known: KnownRows,
    balance: Sequence[str],
    power: float | Mapping[str, float],
    split: Split | None,
    on_fault: Callable[[FaultyRow, int, int, int], None],
) -> BalancedRows:
    """Returns the groups of all used rows, with their shares.

    Args:
        known: The sources.
        balance: Key of each level.
        power: Power of all levels, or of some by key.
        split: Part of the data to use, as far as the subject of a row tells; None for all.
        on_fault: Called with each row that cannot be read, and its source, shard and index; it is in no group.

    Raises:
        StreamError: If there are no rows.
    """
    numbers: dict[tuple[str, ...], int] = {}
    codes = np.full(int(known.starts[-1]), -1, dtype=np.int32)
    for source, model in enumerate(known.sources):
        fields = {*balance}
        if "label" in balance:
            fields.add(model.label or "label")
        if "modality" in balance:
            fields |= fields_before_reading(model)
        if split is not None and model.subject is not None:
            fields.add(model.subject)
        selection, first = known.selection(source), known.first_shards[source]
        for shard, rows, peeked in known.peek(source, fields, "groups"):
            start = int(known.starts[first + shard])
            used = rows if selection is None else set(selection[shard].tolist())
            for row, found in zip(rows, peeked, strict=True):
                if isinstance(found, FaultyRow):
                    on_fault(found, source, shard, row)
                elif row in used and _is_in_split(split, model.subject, found):
                    group = (*_group(model, known.names[source], balance, found), str(source))
                    codes[start + row] = numbers.setdefault(group, len(numbers))
    if not numbers:
        raise StreamError("No row can be drawn in a balanced way: all of them are faulty or in the other set.")
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes[codes >= 0], minlength=len(numbers))
    parts = np.split(order[len(order) - counts.sum() :], np.cumsum(counts)[:-1])
    # Sorted, so that the draws of a group do not depend on the order of the files.
    rows_of = {group: parts[numbers[group]] for group in sorted(numbers)}
    shares = group_shares(
        {group: len(rows) for group, rows in rows_of.items()},
        [*powers_of(balance, power), 0.0],
        {group: known.sources[int(group[-1])].weight for group in rows_of},
        weighted=[level for level, key in enumerate(balance) if key == "source"] + [len(balance)],
    )
    return BalancedRows(tuple(balance), rows_of, shares)


def _group(model: Any, name: str, balance: Sequence[str], row: dict[str, Any]) -> Iterator[str]:
    """Yields the value of each key of `balance` for a row of the source `model`."""
    for key in balance:
        if key == "modality":
            known = modality_of_source(model)
            modality = modality_before_reading(model, row) if known is None else known
            yield "unknown" if modality == UNKNOWN_MODALITY else MODALITIES[modality]
        elif key == "source":
            yield cell_text(row.get("source")) or name
        elif key == "label":
            yield cell_text(label_of(row, model.label))
        else:
            yield ", ".join(sorted(cell_texts(row.get(key))))


def _is_in_split(split: Split | None, subject: str | None, row: dict[str, Any]) -> bool:
    """Returns whether a row belongs to the part of the split; True if only its image tells, which is read later."""
    if split is None or subject is None or subject not in row or subject_of(row, subject) is None:
        return True
    return split.contains(row, subject, None)
