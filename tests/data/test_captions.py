"""Caption rules, on texts in the layouts of UniMed's tags."""

import collections
import itertools
import random

import pytest

from medmoe_hf.data.captions import CAPTION_RULES, RULE_MODALITY, apply_rule, detect_rule
from medmoe_hf.errors import CaptionError
from medmoe_hf.model.modalities_medmoe import MODALITIES

DRAWS = 400


def joined(rule, items, trailing=True):
    tag = f"_{rule}_"
    return tag.join(items) + tag * trailing


def sentences(count):
    return [f"sentence {i}" for i in range(count)]


def drawn(rule, text):
    rng = random.Random(0)
    return collections.Counter(apply_rule(rule, text, rng) for _ in range(DRAWS))


def mimic(report):
    return [*sentences(10), "", report]


def test_rules_match_unimeds_table():
    assert list(CAPTION_RULES) == [
        "plain",
        "radimagenet",
        "chexpert",
        "chestxray8",
        "openi",
        "mimiccxr",
        "all_retina_merged",
        "dr",
        "medicat",
    ]
    assert all(rule.tag == f"_{name}_" for name, rule in CAPTION_RULES.items() if name != "plain")
    assert list(RULE_MODALITY) == list(CAPTION_RULES)
    assert {modality for modality in RULE_MODALITY.values() if modality} == {"xray", "fundus"} <= set(MODALITIES)
    assert [name for name, modality in RULE_MODALITY.items() if modality is None] == [
        "plain",
        "radimagenet",
        "medicat",
    ]


@pytest.mark.parametrize("trailing", [True, False])
@pytest.mark.parametrize(
    ("rule", "items", "expected"),
    [
        ("radimagenet", sentences(10), sentences(10)),
        ("chexpert", sentences(10), sentences(10)),
        ("chestxray8", sentences(10), sentences(10)),
        ("chestxray8", sentences(4), sentences(4)),
        ("openi", ["the report", *sentences(3)], ["the report"]),
        ("mimiccxr", mimic("the report"), ["the report"]),
        ("mimiccxr", mimic("noreportpresent"), sentences(10)),
        ("all_retina_merged", sentences(11), sentences(10)),
        ("all_retina_merged", sentences(10), sentences(10)),
        ("dr", sentences(15), sentences(15)),
        ("medicat", ["caption", "mention"], ["caption", "mention"]),
        ("medicat", ["caption", "nothingpresent"], ["caption"]),
    ],
)
def test_possible_captions(rule, items, expected, trailing):
    counts = drawn(rule, joined(rule, items, trailing))
    assert set(counts) == set(expected)
    share = DRAWS / len(expected)
    assert all(0.4 * share < count < 1.7 * share for count in counts.values())


def test_plain_returns_the_text():
    assert apply_rule("plain", "  Chest film.\nClear lungs. \n", random.Random(0)) == "Chest film.\nClear lungs."


def test_items_are_stripped_and_empty_ones_are_ignored():
    assert set(drawn("chexpert", " a _chexpert_ \n _chexpert_\tb\n_chexpert__chexpert_ ")) == {"a", "b"}
    assert set(drawn("mimiccxr", joined("mimiccxr", mimic(" noreportpresent\n")))) == set(sentences(10))
    assert set(drawn("mimiccxr", joined("mimiccxr", mimic(" ")))) == set(sentences(10))
    assert set(drawn("medicat", "caption_medicat__medicat_")) == {"caption"}


def test_choices_depend_on_the_generator_only():
    text = joined("dr", sentences(15))

    def draws(seed):
        rng = random.Random(seed)
        return [apply_rule("dr", text, rng) for _ in range(8)]

    random.seed(0)
    state = random.getstate()
    assert draws(3) == draws(3) != draws(4)
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("rule", "text", "message"),
    [
        ("plain", " \n", "'plain' finds no caption among 1 items of a text of 2 characters"),
        ("plain", "", "among 1 items of a text of 0 characters"),
        ("dr", "SECRET name", "'dr' requires the tag '_dr_'; a text of 11 characters has none"),
        ("dr", "SECRET_openi_", "'dr' requires the tag '_dr_'; a text of 13 characters has none"),
        ("dr", "", "a text of 0 characters has none"),
        ("dr", "_dr__dr__dr_", "among 3 items of a text of 12 characters"),
        ("dr", joined("dr", ["SECRET"] * 16), "'dr' requires 1 to 15 items; a text of 160 characters has 16"),
        ("radimagenet", joined("radimagenet", ["SECRET"] * 11), "requires 1 to 10 items; .* has 11"),
        ("openi", joined("openi", ["", "SECRET"]), "finds no caption among 2 items"),
        ("openi", joined("openi", ["SECRET"] * 5), "requires 1 to 4 items; .* has 5"),
        ("mimiccxr", joined("mimiccxr", ["SECRET"] * 10), "requires 12 items; .* has 10"),
        ("mimiccxr", joined("mimiccxr", [""] * 11 + ["noreportpresent"]), "finds no caption among 12 items"),
        ("all_retina_merged", joined("all_retina_merged", ["SECRET"] * 9), "requires 10 to 11 items; .* has 9"),
        ("medicat", joined("medicat", ["SECRET"]), "requires 2 items; .* has 1"),
        ("medicat", joined("medicat", ["", "nothingpresent"]), "finds no caption among 2 items"),
    ],
)
def test_errors_have_counts_and_never_the_caption(rule, text, message):
    with pytest.raises(CaptionError, match=message) as caught:
        apply_rule(rule, text, random.Random(0))
    assert "SECRET" not in str(caught.value)


def test_an_unknown_rule_is_not_a_caption_error():
    with pytest.raises(ValueError, match="Unknown caption rule 'auto'; known rules are plain, radimagenet") as caught:
        apply_rule("auto", "text", random.Random(0))
    assert not isinstance(caught.value, CaptionError)


def test_detect_rule():
    for rule, trailing in itertools.product(list(CAPTION_RULES)[1:], (True, False)):
        assert detect_rule(joined(rule, sentences(3), trailing)) == rule
    assert detect_rule("Axial CT of the dr.") == "plain"
    assert detect_rule("") == "plain"
    assert detect_rule(joined("medicat", ["file left_dr_01", "nothingpresent"])) == "medicat"
