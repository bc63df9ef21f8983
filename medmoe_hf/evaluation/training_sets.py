"""Which public sets are in the training data of published models, and so overlap with a recipe.

`training_sets.yaml` beside this module lists them by corpus; recipes name the sets of their images in `public_sets`.
"""

from collections.abc import Sequence
from functools import cache
from importlib import resources

import yaml
from pydantic import BaseModel, ConfigDict, Field


class Corpus(BaseModel):
    """Training data of published models.

    Attributes:
        models: Models that were trained on it.
        stated: Where its makers state what it is made of.
        sets: Names of public sets that it contains images of.

    Example:
        >>> corpora()["UniMed"].models
        'UniMed-CLIP, and MedMoE as published'
    """

    model_config = ConfigDict(extra="forbid")

    models: str
    stated: str
    sets: list[str] = Field(min_length=1)


@cache
def corpora() -> dict[str, Corpus]:
    """Reads the list of corpora.

    Returns:
        Name -> corpus.
    """
    file = resources.files("medmoe_hf.evaluation") / "training_sets.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {name: Corpus(**entry) for name, entry in content.items()}


def overlaps_of(public_sets: Sequence[str]) -> list[str]:
    """Describes the training corpora that contain images of the same public sets.

    Args:
        public_sets: Names of sets, each followed by a part in parentheses if it is not the whole set.

    Returns:
        A sentence per set that is in a corpus.

    Example:
        >>> overlaps_of(["CheXpert (validation part)", "a set of our own"])
        ['CheXpert (validation part): images of CheXpert are in UniMed (UniMed-CLIP, and MedMoE as published).']
    """
    sentences = []
    for entry in public_sets:
        name = entry.partition(" (")[0].strip()
        found = [
            f"{corpus} ({facts.models})"
            for corpus, facts in corpora().items()
            if name.casefold() in (one.casefold() for one in facts.sets)
        ]
        if found:
            what = f"images of {name}" if entry == name else f"{entry}: images of {name}"
            sentences.append(f"{what[0].upper()}{what[1:]} are in {', '.join(found)}.")
    return sentences
