"""The wheel: its bytes depend on the sources only, and it holds what the package needs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EPOCH = 1_700_000_000


def build(folder, seed):
    """Builds the wheel from a copy of the sources: with other times, and with another order of Python's sets."""
    sources = folder / "sources"
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "model.safetensors")
    # `copyfile` keeps no times.
    shutil.copytree(ROOT / "medmoe_hf", sources / "medmoe_hf", ignore=left_out, copy_function=shutil.copyfile)
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, sources / name)
    (folder / "dist").mkdir()
    command = "from setuptools import build_meta; build_meta.build_wheel('../dist')"
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(EPOCH), "PYTHONHASHSEED": str(seed)}
    subprocess.run([sys.executable, "-c", command], cwd=sources, env=environment, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


@pytest.mark.slow
def test_two_builds_have_equal_bytes(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    first, second = (build(tmp_path / name, seed) for name, seed in (("one", 1), ("another", 2)))
    assert first.name == second.name
    with zipfile.ZipFile(first) as archive:
        names = archive.namelist()
        dates = {info.date_time for info in archive.infolist()}
    assert {"medmoe_hf/cli/__init__.py", "medmoe_hf/py.typed", "medmoe_hf/checkpoints/small/config.json"} <= set(names)
    assert len(dates) == 1  # not those of the files
    assert first.read_bytes() == second.read_bytes()
