"""YAML that people write, and that others may have written for them: bounds, and words for what is wrong."""

import time

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from medmoe_hf.common import yaml_files
from medmoe_hf.common.yaml_files import explain, nearest, read_yaml
from medmoe_hf.data.sources import load_sources
from medmoe_hf.errors import ConfigError, RecipeError, SourceError
from medmoe_hf.evaluation.recipes import load_recipe
from medmoe_hf.training import TrainConfig


def laughs(levels):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    return "\n".join(lines)


def merges(levels):
    """Merge keys are copied, not shared: this one would fill the memory while it is read."""
    lines = ["a0: &a0 {k: v}"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 10)}]}}")
    return "\n".join(lines)


HOSTILE = {
    "aliases": (laughs(9), "line 6: more than 200000 values"),
    "merges": (merges(9), "more than 200000 values"),
    "itself": ("a: &a [1, *a]", "line 1: `\\*a` stands for nothing, or within itself"),
    "nowhere": ("a: *b", "`\\*b`|undefined alias"),
    "flow": ("[" * 100_000, "more than 50 levels deep|maximum nesting depth"),
    "block": ("- " * 100_000 + "x", "line 1: more than 50 levels deep"),
    "keys": ("? " * 100_000 + "x", "line 1: more than 50 levels deep"),
    "sexagesimal": ("a: 1" + ":1" * 100_000, "line 1: a number of 200001 digits"),
    "digits": ("a: " + "9" * 100_000, "line 1: a number of 100000 digits"),
    "tagged": ('a: !!int "' + "1:" * 100_000 + '1"', "line 1: a number of 200001 digits"),
    "twice": ("kind: a\nfiles: b\nkind: c", "line 3: `kind` stands here a second time"),
    "date": ("a: 2001-99-99", "value that YAML cannot read"),
    "code": ("a: !!python/object/apply:os.system [ls]", "no valid YAML"),
}


@pytest.mark.parametrize("loader", ["CSafeLoader", "SafeLoader"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_refused_fast(tmp_path, monkeypatch, name, loader):
    """With libyaml, and where PyYAML comes without it."""
    monkeypatch.setattr(yaml_files, "_Loader", getattr(yaml, loader))
    text, message = HOSTILE[name]
    path = tmp_path / "a.yaml"
    path.write_text(text)
    started = time.process_time()
    for read, error in (
        (lambda path: read_yaml(path, ValueError), ValueError),
        (load_sources, SourceError),
        (TrainConfig.from_yaml, ConfigError),
        (load_recipe, RecipeError),
    ):
        with pytest.raises(error, match=rf"(?s)a\.yaml .*({message})"):
            read(path)
    # minutes, or for ever, without the bounds
    assert time.process_time() - started < 20


def test_large_files_are_not_read(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"#" * (4 * 2**20 + 1))
    with pytest.raises(ValueError, match="more than 4 MiB"):
        read_yaml(tmp_path / "a.yaml", ValueError)
    with pytest.raises(ValueError, match="more than 4 MiB"):
        read_yaml("/dev/zero", ValueError)


def test_what_people_write_is_read(tmp_path):
    """Anchors, merges with a key of their own, long lists, long texts of digits, byte order marks."""
    path = tmp_path / "a.yaml"
    files = [f"shards/{number:05}.tar" for number in range(5000)]
    text = (
        "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\nd: "
        + str(files)
        + f"\ne: '{'9' * 200}'\nf: größer\ng: 5e-5"
    )
    expected = {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": [{"x": 1, "y": 2}] * 2,
        "d": files,
        "e": "9" * 200,
        "f": "größer",
        "g": "5e-5",
    }
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(text.encode(encoding))
        assert read_yaml(path, ValueError) == expected
    path.write_bytes(text.encode("cp1252"))
    with pytest.raises(ValueError, match=r"a\.yaml is no UTF-8 text"):
        read_yaml(path, ValueError)


# Words


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    num_workers: int = 0
    batch_size: int = 1


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    data: Inner = Inner()
    steps: int = 1

    @model_validator(mode="after")
    def _positive(self):
        if self.steps < 1:
            raise ValueError("`steps` must be 1 or more")
        return self


SECTIONS = {"": list(Outer.model_fields), "data": list(Inner.model_fields)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"num_workers": 0}, "num_workers: unknown key. It belongs under `data`."),
        ({"data": {"steps": 2}}, "data.steps: unknown key. It belongs at the top level."),
        ({"num_worker": 0}, "num_worker: unknown key. Did you mean `num_workers`, under `data`?"),
        ({"data": {"Num-Workers": 0}}, "data.Num-Workers: unknown key. Did you mean `num_workers`?"),
        ({"xyz": 0}, "xyz: unknown key."),
        ({"steps": 0, "data": {"batch_size": 77}}, "`steps` must be 1 or more"),
        (
            {"steps": "many"},
            "steps: Input should be a valid integer, unable to parse string as an integer (got 'many')",
        ),
        ({"steps": {"a": "secret"}}, "steps: Input should be a valid integer"),
    ],
)
def test_problems_in_words(content, words):
    with pytest.raises(ValidationError) as error:
        Outer.model_validate(content)
    assert explain(error.value, SECTIONS) == f"  {words}"


def test_nearest_is_never_the_word_itself():
    assert nearest("path", ["path", "caption"]) is None
    assert nearest("Path", ["path", "caption"]) == "path"
    assert nearest("PATIENT ID", ["patient_id", "path"]) == "patient_id"
