"""Long texts: runs of whole sentences that are no longer than a text tower reads."""

import random
import re
from collections.abc import Callable, Sequence

# After a full stop, unless it follows a number ("1. No effusion"), a single letter ("e.g.") or a common abbreviation;
# between lines; at a bar, as in lists of questions. An answer stays with its question ("Is the heart large? A: No").
_NOT_AFTER = r"(?<!\b\w[.])(?<!\b\d\d[.])(?<!\bDr[.])(?<!\bvs[.])"
_BOUNDARY = re.compile(
    # White space is tried from its beginning only, or long runs of it would take ages.
    rf"(?:(?<=[.!?]){_NOT_AFTER}|(?<=[.!?][\"')\]]))\s+(?!A:)|(?<!\s)\s*[\n|]\s*|[\n|]\s*",
)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Returns the start and end of each sentence of a text.

    Example:
        >>> from medmoe_hf.data.sentences import sentence_spans
        >>> text = "No effusion. Nodule of 1.5 cm | Q: Large? A: No"
        >>> [text[start:end] for start, end in sentence_spans(text)]
        ['No effusion.', 'Nodule of 1.5 cm', 'Q: Large? A: No']
    """
    spans, start = [], 0
    for boundary in [*_BOUNDARY.finditer(text), None]:
        end, following = (len(text), len(text)) if boundary is None else boundary.span()
        if text[start:end].strip():
            spans.append((start, end))
        start = following
    return spans


def sample_run(text: str, limit: int, lengths: Callable[[Sequence[str]], Sequence[int]], rng: random.Random) -> str:
    """Returns a random run of adjacent sentences that fits, from a text that does not.

    Each run begins at a sentence and is as long as possible; runs within another one are left out, and all others are
    equally frequent. A sentence that is too long by itself is divided between words.

    Args:
        text: A text.
        limit: Largest length.
        lengths: Returns the length of each of several texts, in the units of `limit`.
        rng: Generator that draws.

    Returns:
        A part of `text`. It exceeds the limit only if a single word does.

    Example:
        >>> import random
        >>> from medmoe_hf.data.sentences import sample_run
        >>> words = lambda texts: [len(one.split()) for one in texts]
        >>> sample_run("No effusion. Heart normal. Old rib fracture.", 4, words, random.Random(0))
        'No effusion. Heart normal.'
    """
    pieces: list[tuple[int, int]] = []
    spans = sentence_spans(text)
    for span, length in zip(spans, lengths([text[start:end] for start, end in spans]), strict=True):
        pieces += [span] if length <= limit else _divided(text, span, limit, lengths)
    runs: list[tuple[int, int]] = []
    last = 0  # the last piece of a run: it never decreases from one beginning to the next
    for first in range(len(pieces)):
        before, last = last, max(last, first)
        while last + 1 < len(pieces) and lengths([text[pieces[first][0] : pieces[last + 1][1]]])[0] <= limit:
            last += 1
        if not runs or last > before:
            runs.append((pieces[first][0], pieces[last][1]))
    start, end = rng.choice(runs) if runs else (0, len(text))
    return text[start:end]


def _divided(
    text: str, span: tuple[int, int], limit: int, lengths: Callable[[Sequence[str]], Sequence[int]]
) -> list[tuple[int, int]]:
    """Divides a sentence between words into the longest parts that fit."""
    words = [(span[0] + word.start(), span[0] + word.end()) for word in re.finditer(r"\S+", text[slice(*span)])]
    parts: list[tuple[int, int]] = []
    while words:
        fitting, above = 1, len(words) + 1
        while above - fitting > 1:
            middle = (fitting + above) // 2
            if lengths([text[words[0][0] : words[middle - 1][1]]])[0] <= limit:
                fitting = middle
            else:
                above = middle
        parts.append((words[0][0], words[fitting - 1][1]))
        words = words[fitting:]
    return parts
