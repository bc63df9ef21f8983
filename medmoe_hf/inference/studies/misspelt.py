"""Labels that look like misspelt ones: they are answered as any other text, with a probability that means nothing."""

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches

_CLOSE = 0.82  # of difflib, for each word: above "pneumonitis" and "pneumonia", below "pnuemonia" and "pneumonia"


def spelling_notes(labels: Sequence[str], known: Iterable[str]) -> list[str]:
    """Finds labels that are not known, but close to one that is.

    Labels are equal whatever their case. Words that only add something to another one, such as "abnormal" to "normal",
    are words of their own, and so is what is asked beside the known label.

    Args:
        labels: Labels as the user wrote them.
        known: Classes of the model's tasks, and the labels that are asked by default.

    Returns:
        A sentence for each such label.

    Example:
        >>> spelling_notes(["no finding", "pnuemonia", "tooth"], ["no finding", "pneumonia"])
        ['"pnuemonia" is no word of the model\\'s tasks; did you mean "pneumonia"?']
    """
    names = {name.casefold(): name for name in known}
    asked = [label.strip().casefold() for label in labels]
    others = [name for name in names if name not in asked]
    notes = []
    for label, plain in zip(labels, asked, strict=True):
        if plain in names:
            continue
        alike = [name for name in get_close_matches(plain, others, n=5, cutoff=_CLOSE) if _is_close(plain, name)]
        if alike:
            notes.append(f'"{label.strip()}" is no word of the model\'s tasks; did you mean "{names[alike[0]]}"?')
    return notes


def _is_close(label: str, name: str) -> bool:
    """Whether each word is equal, or nearly so: "renal cell carcinoma" is no misspelt "small cell carcinoma"."""
    one, two = label.split(), name.split()
    return len(one) == len(two) and all(
        first == second
        or (first not in second and second not in first and SequenceMatcher(None, first, second).ratio() >= _CLOSE)
        for first, second in zip(one, two, strict=True)
    )
