"""The size of modules, and the version, which several files state."""

import re
from pathlib import Path

import medmoe_hf

ROOT = Path(__file__).resolve().parent.parent
# modeling_medmoe.py stays one file, as in transformers, and so does the app of a Space.
LONG = {"model/modeling_medmoe.py", "hub/space/app.py"}


def test_modules_have_600_lines_at_most():
    package = ROOT / "medmoe_hf"
    lengths = {
        path.relative_to(package).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in package.rglob("*.py")
        if package / "checkpoints" not in path.parents  # copies of the code in `model`
    }
    assert {name for name, length in lengths.items() if length > 600} <= LONG


def test_version_is_stated_once_and_repeated_in_the_citation():
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation is not None
    assert citation[1] == medmoe_hf.__version__
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project
    assert not re.search(r"^version = \"", project, re.MULTILINE)


def test_changelog_has_the_released_version_or_unreleased_changes_first():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] in ("Unreleased", medmoe_hf.__version__)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert not released or released[0] == medmoe_hf.__version__
