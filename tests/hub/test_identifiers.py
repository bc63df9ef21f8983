"""The patterns of a push: how long a search takes, on the texts that are worst for them."""

import re
import time

import pytest

from medmoe_hf.hub import identifiers
from medmoe_hf.hub.identifiers import cells, kinds, personal_column, unescaped

PATTERNS = {
    # Those of columns are held against whole names of columns alone.
    **{
        name: value
        for name, value in vars(identifiers).items()
        if isinstance(value, re.Pattern) and not name.endswith("_COLUMN")
    },
    **{f"caption {i}": pattern for i, (_, pattern) in enumerate(identifiers._CAPTION_PATTERNS)},
    **{f"path {kind}": pattern for kind, pattern in identifiers.machine_paths(["/a/b"]).items()},
}
# Runs of one character, and beginnings of what the patterns look for that never end.
RUNS = ["a", "A", "1", " ", ".", "-", "_", "^", "@", "\\", "/", "=", '"', "é", "\n", "\t"]
PARTS = [
    *(
        "born ",
        "dob:",
        "dob: ",
        "mrn",
        "mrn1",
        "mrn ",
        "jan",
        "1 jan",
        "a@",
        "a.",
        "1.",
        "1.2.",
        "a-",
        "12-",
        "1-",
        "eyJ",
    ),
    *(
        "eyJaaaaaaaaa.",
        "patient",
        "patient:",
        "patient id",
        "name=",
        "Name: ",
        "patient_id",
        "hf_",
        "sk-",
        "-----BEGIN ",
    ),
    *("api_key=", "password=", "://a:", "://", "machine a ", "machine a login b ", "C:\\", "C:\\a", "/home/", "\\u00"),
    *(
        "&#0",
        "<",
        " on",
        "href=",
        "url(",
        "accession ",
        "AA^",
        "A^",
        "Dr. ",
        "(12) ",
        "+1 ",
        "date of birth",
        "0a1b2c3d-",
    ),
]


def seconds(pattern, text):
    start = time.process_time()
    pattern.search(text)
    return time.process_time() - start


@pytest.mark.parametrize("lead", ["", "born "], ids=repr)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_search_takes_time_in_proportion_to_the_text(name, lead):
    """Eight times the text takes about eight times as long; a quadratic pattern would take 64 times."""
    pattern = PATTERNS[name]
    for unit in RUNS + PARTS:
        small, large = (lead + unit * (size // len(unit)) for size in (1_500, 12_000))
        # What is over in a moment needs no comparison, and has too much noise for one.
        if seconds(pattern, large) > 0.01:
            ratio = min(seconds(pattern, large) for _ in range(3)) / min(seconds(pattern, small) for _ in range(3))
            assert ratio < 24, unit


def test_a_caption_of_100_kb_without_spaces():
    start = time.process_time()
    assert kinds("a" * 100_000) == []
    assert kinds("a.b-c+" * 17_000) == []
    # It took a minute; this is some milliseconds.
    assert time.process_time() - start < 10


@pytest.mark.parametrize("caption", ["Patient: Müller, cough", "Read by Dr. Ångström", "MÜLLER^ANNA"])
def test_names_may_have_any_letters(caption):
    assert kinds(caption) == ["a name"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a,b,c", ["a", "b", "c"]),
        ("a;b,5;c", ["a", "b,5", "c"]),
        ("| a | b |", ["a", "b"]),
        ('"a, b"\tc', ["a, b", "c"]),
        ("alone", ["alone"]),
    ],
)
def test_cells_of_a_line(line, expected):
    assert cells(line) == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["Name", "Age", "Diagnosis"], "Name"),
        (["Patient ID", "x"], "Patient ID"),
        (["Geburtsdatum"], "Geburtsdatum"),
        (["name", "auc"], None),
        (["sex", "auc"], None),
        (["diagnosis", "auc"], None),
        (["sex", "diagnosis"], "diagnosis"),
    ],
)
def test_columns_of_patients(columns, expected):
    assert personal_column(columns) == expected


def test_escapes_keep_lines():
    assert unescaped("plain") is None
    assert unescaped(r"\u0068\x66_ &#104;&#x66; \/a" + "\n" + r"\u000ab") == "hf_ hf /a\n b"
