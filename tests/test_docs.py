"""Commands, YAML and Python code in the Markdown pages: they parse and refer to existing things, and most are run."""

import argparse
import ast
import importlib
import importlib.metadata
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from markdown_it import MarkdownIt
from pydicom.data import get_testdata_file
from typer.testing import CliRunner

from medmoe_hf.cli import app
from medmoe_hf.common import packaged
from medmoe_hf.data import phantom_sample, write_webdataset, zero_shot_prompts
from medmoe_hf.data.phantom import FINDINGS
from medmoe_hf.data.sources import load_sources
from medmoe_hf.evaluation.calibration import fit_calibration
from medmoe_hf.evaluation.recipes import load_recipe
from medmoe_hf.evaluation.rejector import add_rejector
from medmoe_hf.inference.studies.tasks import read_task
from medmoe_hf.inference.task_files import read_task_file
from medmoe_hf.model import MedMoEModel, MedMoEProcessor, Task
from medmoe_hf.training import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = {
    path.name: path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "AGENTS.md",
        *sorted((ROOT / "docs" / "pages").glob("*.md")),
    )
}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LAUNCHERS = ("torchrun", "accelerate")


@dataclass(frozen=True)
class Piece:
    """A fenced block or a span of code, and its location."""

    page: str
    line: int
    kind: str  # "bash", "python", "yaml"; "span" for inline code
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pieces(page: str) -> list[Piece]:
    found = []
    for token in MarkdownIt().enable("table").parse(PAGES[page].read_text(encoding="utf-8")):
        line = (token.map or [0])[0] + 1
        if token.type == "fence":
            found.append(Piece(page, line, token.info.strip(), token.content))
        for child in token.children or ():
            if child.type == "code_inline":
                found.append(Piece(page, line, "span", child.content))
    return found


EVERYTHING = [piece for page in PAGES for piece in pieces(page)]


def of_kind(kind: str) -> list[Piece]:
    return [piece for piece in EVERYTHING if piece.kind == kind]


def commands_in(text: str) -> list[list[str]]:
    """Return the words of each command of a shell block, without comments."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        current: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                current.append(word)
            elif current:
                found.append(current)
                current = []
    return found


def is_command(span: str) -> bool:
    words = span.split()
    if len(words) < 2:
        return False
    scripts = words[0] == "python" and words[1].endswith(".py")
    tools = ("medmoe", "pip", "mkdocs", "pytest", "nox", "pre-commit")
    return scripts or words[0] in tools or (words[0] in LAUNCHERS and "-m" in words)


COMMANDS = [
    pytest.param(command, piece.kind == "span", id=f"{piece}-{shlex.join(command)[:60]}")
    for piece in EVERYTHING
    if piece.kind == "bash" or (piece.kind == "span" and is_command(piece.text))
    for command in commands_in(piece.text)
]


def medmoe(words: list[str], mentioned: bool = False) -> tuple[str, ...]:
    """Parse the arguments of `medmoe` as the program does; returns the names of the command.

    Args:
        words: The arguments.
        mentioned: Whether the command is inline code, which may omit the arguments.
    """
    command, context, names = typer.main.get_command(app), None, []
    rest = list(words)
    while hasattr(command, "commands"):
        context = command.context_class(command, info_name="medmoe", parent=context)
        assert rest, f"medmoe {' '.join(names)} needs a command"
        name = rest.pop(0)
        command = command.get_command(context, name)
        assert command is not None, f"medmoe has no command {' '.join([*names, name])}"
        names.append(name)
    if rest or not mentioned:
        try:
            command.make_context(names[-1], rest, parent=context)
        except Exception as error:  # of click, or typer's copy of it
            said = error.format_message() if hasattr(error, "format_message") else error
            pytest.fail(f"medmoe {shlex.join(words)}: {said}")
    return tuple(names)


class Parsed(Exception):
    """Raised after a script has parsed its arguments."""


def example(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script until it has parsed its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, *given):
        raise Parsed(parse(parser, *given))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


def extras() -> set[str]:
    # Python 3.10 cannot read TOML.
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))


def nox_sessions() -> set[str]:
    functions = (
        node for node in ast.parse((ROOT / "noxfile.py").read_text()).body if isinstance(node, ast.FunctionDef)
    )
    return {function.name for function in functions if function.decorator_list}


def check(command: list[str], mentioned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *rest = command
    if program in LAUNCHERS:
        if "--config_file" in rest:
            assert (ROOT / rest[rest.index("--config_file") + 1]).is_file()
        assert rest[rest.index("-m") + 1] == "medmoe_hf.cli"
        program, rest = "medmoe", rest[rest.index("-m") + 2 :]
    if program == "medmoe":
        medmoe(rest, mentioned)
    elif program == "python":
        script = (ROOT / rest[0]).resolve()
        assert script.is_file(), f"there is no {rest[0]}"
        if "gradio" in script.read_text():
            pytest.importorskip("gradio")
        example(script, rest[1:], monkeypatch)
    elif program == "pip":
        assert rest[0] == "install"
        for named in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
            assert set(named.split(",")) <= extras(), f"pyproject.toml has no extra {named}"
        if "-r" in rest:
            assert (ROOT / rest[rest.index("-r") + 1]).is_file()
    elif program == "mkdocs":
        assert (ROOT / rest[rest.index("-f") + 1]).is_file()
    elif program == "nox":
        named = rest[rest.index("-s") + 1 :] if "-s" in rest else []
        assert set(named) <= nox_sessions(), f"noxfile.py lacks one of the sessions {', '.join(named)}"
    elif program == "pre-commit":
        assert (ROOT / ".pre-commit-config.yaml").is_file()
    elif program == "pytest":
        for path in (word for word in rest if "/" in word):
            assert (ROOT / path).exists(), f"there is no {path}"
    elif program == "uv":
        assert rest[0] == "run"
        script = next(word for word in rest[1:] if word.endswith(".py"))
        check(["python", *rest[rest.index(script) :]], mentioned, monkeypatch)
    elif program == "ruff":
        assert rest in (["check", "."], ["format", "."])
    elif program == "mypy":
        assert rest == []
    else:
        assert command == ["hf", "auth", "login"], f"nothing checks `{shlex.join(command)}`"


@pytest.mark.parametrize(("command", "mentioned"), COMMANDS)
def test_a_command_parses(command, mentioned, monkeypatch):
    check(command, mentioned, monkeypatch)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("medmoe trian run.yaml", "no command trian"),
        ("medmoe train run.yaml --dry", "No such option"),
        ("medmoe train", "Missing argument 'config'"),
        ("medmoe encode s.yaml out --model m --dtype float8", "float8"),
        ("python examples/nothing.py", "no examples/nothing.py"),
        ("python examples/search.py --sample 3 --modle x", None),
        ('pip install -e ".[dicom,nothing]"', "no extra"),
        ("nox -s lint typse", "lacks one of the sessions"),
        ("pytest tests/nothing", "no tests/nothing"),
        ("rm -r /", "nothing checks"),
    ],
)
def test_a_wrong_command_is_noticed(command, message, monkeypatch):
    with pytest.raises((pytest.fail.Exception, AssertionError, SystemExit), match=message):
        check(shlex.split(command), False, monkeypatch)


# The first comment of a YAML block is the name of its file.


def yaml_files(page: str) -> dict[str, str]:
    found = {}
    for piece in of_kind("yaml"):
        name = re.match(r"# (\S+\.yaml)\n", piece.text)
        # A file on the same page takes precedence over a file of the same name on another page.
        if name and (piece.page == page or name[1] not in found):
            found[name[1]] = piece.text
    return found


@pytest.mark.parametrize("piece", of_kind("yaml"), ids=str)
def test_yaml_is_what_the_package_reads(piece, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in yaml_files(piece.page).items():
        Path(name).write_text(text)
    part = re.match(r"# in (\S+\.yaml)\n", piece.text)
    content = yaml.safe_load(piece.text)
    if isinstance(content, list):
        Path("these.yaml").write_text(piece.text)
        assert len(load_sources("these.yaml")) == len(content)
    elif "layout" in content:
        Path("this.yaml").write_text(piece.text)
        assert load_recipe("this.yaml").name == content["name"]
    elif "prompts" in content:
        Path("this.yaml").write_text(piece.text)
        assert list(read_task("this.yaml").prompts) == list(content["prompts"])
        if "name" in content:
            assert read_task_file("this.yaml")[0].name == content["name"]
    elif part:
        TrainConfig.from_dict({**yaml.safe_load(Path(part[1]).read_text()), **content})
    else:
        TrainConfig.from_dict(content)


@pytest.mark.parametrize("piece", of_kind("python"), ids=str)
def test_python_compiles_and_its_imports_resolve(piece):
    for node in ast.walk(ast.parse(piece.text)):
        if isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"


def test_blocks_state_their_language():
    assert {piece.kind for piece in EVERYTHING} <= {"bash", "python", "yaml", "json", "span"}
    assert all(json.loads(piece.text) for piece in of_kind("json"))
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "AGENTS.md"])
def test_links_lead_to_existing_files(page):
    tokens = MarkdownIt().enable("table").parse(PAGES[page].read_text(encoding="utf-8"))
    children = [child for token in tokens for child in token.children or ()]
    links = [str(child.attrs.get("href") or child.attrs.get("src")) for child in children if child.attrs]
    for link in links:
        if not link.startswith("http"):
            assert (ROOT / link.split("#")[0]).exists(), f"{page} links to {link}, which does not exist"


# The layers of the package


def draw_imports() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_imports", ROOT / "docs" / "draw_imports.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_imports_lead_to_lower_layers_without_cycles():
    module = draw_imports()
    edges = module.graph()
    assert module.upward(edges) == []
    assert module.cycles(edges) == []


def test_the_picture_of_the_imports_is_up_to_date():
    module = draw_imports()
    drawn = (ROOT / "docs" / "pages" / "imports.svg").read_text(encoding="utf-8")
    assert drawn == module.draw(module.graph()), "run: python docs/draw_imports.py"


def test_wrong_imports_are_noticed():
    module = draw_imports()
    edges = {"model.a": {"data.b"}, "data.b": {"data.c"}, "data.c": {"data.b"}, "errors": {"model.a"}}
    assert module.upward(edges) == ["model.a -> data.b"]
    assert module.cycles(edges) == [["data.b", "data.c"]]


def test_example_scripts_are_short():
    lengths = {path.name: len(path.read_text().split("# ///\n")[-1].splitlines()) for path in EXAMPLES}
    assert {name for name, length in lengths.items() if length > 120} == set()


# What `uv run` installs for a script (PEP 723)


def script_header(path: Path) -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    (found,) = re.findall(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", path.read_text(encoding="utf-8"))
    return tomllib.loads("".join(line[2:] + "\n" for line in found.splitlines()))


def imported_by(path: Path) -> set[str]:
    """Return the top-level modules that a script imports when it starts, and those of the scripts that it runs."""
    text, modules, others = path.read_text(encoding="utf-8"), set(), []
    for node in ast.parse(text).body:
        names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        others += [f"{name.split('.')[1]}.py" for name in names if name.startswith("experiments.")]
        modules |= {name.split(".")[0] for name in names}
    others += re.findall(r'"experiments" / "(\w+\.py)"', text)
    for other in others:
        modules |= imported_by(ROOT / "examples" / "experiments" / other)
    return modules - sys.stdlib_module_names - {"experiments"}


def distribution(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def required(dependencies: list[str]) -> set[str]:
    """Return the distributions that requirements name, with those of this package and its extras."""
    found = {distribution(one) for one in dependencies}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for one in dependencies:
        if distribution(one) != "medmoe-hf":
            continue
        lists = re.findall(r"(?m)^dependencies = (\[(?:.|\n)*?^\])", project)
        for extra in re.findall(r"\[([\w,-]+)\]", one):
            lists += [re.search(rf"(?m)^{name} = (\[(?:[^\[\]]|\[\w+\])*\])", project)[1] for name in extra.split(",")]
        found |= {distribution(part) for text in lists for part in ast.literal_eval(text)}
    return found


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_header_of_an_example_names_what_it_imports(path):
    header = script_header(path)
    known = importlib.metadata.packages_distributions()
    needed = {name: {distribution(one) for one in known.get(name, [name])} for name in imported_by(path)}
    given = required(header["dependencies"])
    assert {name for name, sources in needed.items() if not sources & given} == set()
    # nothing is installed in vain
    direct = {distribution(one) for one in header["dependencies"]}
    # a script that starts `medmoe` need not import it
    runs = {"medmoe-hf"} if "medmoe" in path.read_text(encoding="utf-8").split("# ///")[2] else set()
    assert direct <= runs.union(*needed.values())
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-python = "{header["requires-python"]}"' in project
    sources = header.get("tool", {}).get("uv", {}).get("sources", {})
    assert set(sources) == {one.split("[")[0] for one in header["dependencies"] if "medmoe_hf" in one}
    assert all((path.parent / source["path"] / "pyproject.toml").is_file() for source in sources.values())


# The documented commands


# Documented commands that run one after another, and arguments that make them fast.
CHAIN = (
    ("medmoe phantom data/phantoms --shards 4", "--samples 12 --image-size 64"),
    ("medmoe data inspect sources.yaml", ""),
    ("medmoe data inspect sources.yaml --problems problems.csv --validation-share 0.1", ""),
    ("medmoe data overlap train.yaml test.yaml", ""),
    ("medmoe train run.yaml --dry-run", ""),
    ("medmoe train run.yaml", ""),
    ("medmoe train run.yaml --resume auto", ""),
    ("medmoe evaluate recipes", ""),
    ("medmoe evaluate check phantoms --data scratch", ""),
    (
        "medmoe evaluate zero-shot scratch/model --recipe phantoms --data scratch --output zero-shot",
        "--resamples 9",
    ),
    ("medmoe evaluate all scratch/model --recipe phantoms --data scratch --output evaluation", "--resamples 9"),
    (
        "medmoe card quickstart/model --repo you/medmoe --license cc-by-4.0 --results evaluation/results.json",
        "",
    ),
    ("medmoe encode sources.yaml embeds", ""),
    ('medmoe search embeds --text "a large pleural effusion" -k 5', ""),
    ("medmoe search embeds --image quickstart/scan.png --modality ct --among reports", ""),
    ("medmoe push quickstart/model you/medmoe --private --dry-run", ""),
    ("medmoe push quickstart/model you/medmoe --private --tag v1", ""),
    ("medmoe verify you/medmoe --revision v1", ""),
    ("medmoe verify quickstart/model", ""),
    ("medmoe verify quickstart/model --record", ""),
    ("medmoe data push sources.yaml you/pairs --private --license cc-by-4.0", ""),
)
# Where the other commands run.
ELSEWHERE = {
    ("convert", "official"): ("tests/test_cli.py", '"convert", "official"'),
    ("convert", "medclip"): ("tests/hub/test_convert.py", '"convert", "medclip"'),
    ("init",): ("tests/test_cli.py", '"init"'),
    ("predict",): ("tests/inference/test_study_predictor.py", '["predict", '),
    ("fit-rejector",): ("tests/evaluation/test_rejector.py", '"fit-rejector"'),
    ("calibrate",): ("tests/evaluation/test_calibrate.py", '"calibrate"'),
    ("evaluate", "robustness"): ("tests/evaluation/test_robustness.py", '"evaluate robustness one'),
    ("shrink",): ("tests/hub/test_half_precision.py", '"shrink"'),
    ("serve",): ("tests/inference/test_serving.py", '["serve", '),
    ("demo",): ("tests/browser/test_demo.py", '"medmoe_hf.cli", "demo"'),
    ("data", "export"): ("tests/neighbours/test_clip_benchmark.py", '["data", "export", '),
    ("export",): ("noxfile.py", '"medmoe", "export"'),
    ("merge",): ("tests/training/test_adapters.py", '"merge"'),
    **{
        # `evaluate all` on phantoms runs these
        ("evaluate", protocol): ("noxfile.py", '"medmoe", "evaluate", "all"')
        for protocol in ("linear-probe", "retrieval", "grounding", "routing")
    },
}


def documented() -> dict[tuple[str, ...], list[list[str]]]:
    """Return the commands in all shell blocks, by the names of the `medmoe` command."""
    found: dict[tuple[str, ...], list[list[str]]] = {}
    for piece in of_kind("bash"):
        for command in commands_in(piece.text):
            if command[0] == "medmoe":
                found.setdefault(medmoe(command[1:]), []).append(command)
    return found


def test_every_documented_command_is_run_somewhere():
    known = documented()
    written = [command for commands in known.values() for command in commands]
    for command, _ in CHAIN:
        assert shlex.split(command) in written, f"no page contains `{command}`"
    run = {medmoe(shlex.split(command)[1:]) for command, _ in CHAIN}
    for file, text in ELSEWHERE.values():
        assert text in (ROOT / file).read_text()
    mentioned = {medmoe(p.text.split()[1:], True) for p in of_kind("span") if re.match(r"medmoe \w", p.text)}
    assert not (known.keys() | mentioned) - run - ELSEWHERE.keys()
    scripts = {word for p in EVERYTHING for word in re.findall(r"examples/[\w/]+\.py", p.text)}
    sessions = (ROOT / "noxfile.py").read_text()
    names = {one.removeprefix("examples/").removesuffix(".py") for one in scripts}
    assert {name for name in names if f'"{name}"' not in sessions} == set()


def write_small_data() -> None:
    """Write the files that the commands read but do not write themselves."""
    run = yaml.safe_load(yaml_files("training.md")["run.yaml"])
    run |= {"max_steps": 3, "batch_size": 8, "evaluate_every": 3, "evaluation_samples": 8, "warmup_steps": 1}
    run["checkpoints"] = {"every_steps": 2}
    run["data"]["num_workers"] = 0
    Path("run.yaml").write_text(yaml.safe_dump(run))
    tars = [{"kind": "webdataset", "files": ["data/phantoms/*.tar"]}]
    Path("sources.yaml").write_text(yaml.safe_dump(tars))
    Path("train.yaml").write_text(yaml.safe_dump(tars))
    others = [{"kind": "phantom", "seed": 5, "image_size": 64, "length": 12}]
    Path("test.yaml").write_text(yaml.safe_dump(others))
    write_webdataset("scratch/unseen", shards=1, samples_per_shard=48, seed=2, image_size=64)
    prompts = {modality: zero_shot_prompts(modality) for modality in FINDINGS}
    Path("scratch/prompts.json").write_text(json.dumps(prompts))
    Path("quickstart/scans").mkdir(parents=True)
    phantom_sample(3, 0, image_size=64)["image"].save("quickstart/scan.png")
    Path("exports/study").mkdir(parents=True)
    for copy in ("quickstart/scans/ct-head.dcm", "exports/study/ct-head.dcm"):
        shutil.copyfile(get_testdata_file("CT_small.dcm"), copy)


def write_calibrated_task(folder: str) -> None:
    """Add the task of the page on calibration to a model; the phantoms here are too few to fit one to them."""
    model, processor = MedMoEModel.from_pretrained(folder), MedMoEProcessor.from_pretrained(folder)
    prompts = {"no finding": ["The lungs are clear."], "pneumonia": ["Signs of pneumonia."]}
    task = processor.tokenize_task(Task("chest", prompts, modality="xray"))
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    scores = np.eye(2)[labels] + rng.normal(size=(60, 2))
    model.tasks["chest"] = fit_calibration(task, scores, labels, resamples=9)
    model.save_pretrained(folder)


def write_model_with_rejector(folder: str, out: str) -> None:
    """Give a copy of a model a rejector, which needs more phantoms than the commands here draw."""
    Path("many.yaml").write_text(yaml.safe_dump([{"kind": "phantom", "image_size": 64, "length": 300}]))
    add_rejector(folder, load_sources("many.yaml"), out)


@pytest.mark.slow
def test_the_documented_commands_run_one_after_another(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "hub"))
    from loopback_hub import Account, LoopbackHub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(packaged, "CHECKPOINTS", tmp_path / "checkpoints")
    write_small_data()
    output = {}
    with LoopbackHub() as hub:
        hub.accounts["hf_write"] = Account("you")
        hub.use(monkeypatch, tmp_path / "home", token="hf_write")
        for command, added in CHAIN:
            if "--resume" in command:
                # As if the run had been stopped before it wrote its model.
                before = Path("runs/first/model.safetensors").read_bytes()
                shutil.rmtree("runs/first")
            result = CliRunner().invoke(app, shlex.split(f"{command} {added}")[1:])
            assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
            output[command] = result.stdout
            if "--resume" in command:
                assert Path("runs/first/model.safetensors").read_bytes() == before
                # in the place of the examples' models and of the packaged checkpoint
                for model in ("scratch/model", "quickstart/model", "checkpoints/small"):
                    shutil.copytree("runs/first", model)
            if "--dry-run" in command:
                assert not Path("runs").exists() or "push" in command
                assert not hub.repos, "a dry run has uploaded something"
        write_calibrated_task("runs/first")
        write_model_with_rejector("runs/first", "models/ours")
        for piece in of_kind("python"):
            # A block without imports is an illustration; the export takes a minute and has its own tests.
            if "import" in piece.text and "hub.export" not in piece.text:
                exec(compile(piece.text, str(piece), "exec"), {})
        repos = dict(hub.repos)

    results = json.loads(Path("evaluation/results.json").read_text())
    assert {result["protocol"] for result in results} == {
        "zero-shot", "linear-probe", "retrieval", "grounding", "routing"
    }  # fmt: skip
    card = Path("quickstart/model/README.md").read_text()
    assert "license: cc-by-4.0" in card
    assert "you/medmoe" in card
    hits = output['medmoe search embeds --text "a large pleural effusion" -k 5'].splitlines()
    assert hits.pop(0).split()[0] == "cosine"
    scores = [float(hit.split()[0]) for hit in hits]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    model, pairs = repos["model", "you/medmoe"], repos["dataset", "you/pairs"]
    assert model.private
    assert pairs.private
    held = model.commits[model.tags["v1"]].files
    local = {path.name for path in Path("quickstart/model").iterdir()}
    assert local <= set(held) <= local | {".gitattributes"}
    assert any(path.endswith(".parquet") for path in pairs.commits[pairs.branches["main"]].files)
    assert "has the outputs it was published with" in output["medmoe verify you/medmoe --revision v1"]
