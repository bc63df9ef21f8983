"""The folder of the kernels for the library `kernels`: it stands alone, and computes what the package computes."""

import ast
import importlib.util
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from medmoe_hf.model.word_regions_medmoe import gloria_logits

SCRIPT = Path(__file__).parents[2] / "examples" / "experiments" / "gpu" / "kernel_package.py"
ALLOWED = {"torch", "triton"} | set(sys.stdlib_module_names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("kernels")
    runpy.run_path(str(SCRIPT))["write"](folder)
    return folder


def similarity(kernel):
    """Values and gradients of the package's kernels and of the formulation without them."""
    torch.manual_seed(0)
    mask = torch.arange(5) < torch.tensor([[5], [0], [2]])
    found = []
    for function in (kernel.fused_gloria_logits, gloria_logits):
        torch.manual_seed(1)
        local, words = torch.randn(2, 20, 3, 4, requires_grad=True), torch.randn(3, 5, 20, requires_grad=True)
        logits = function(local, words, mask, 4.0, 5.0, 10.0)
        found.append([logits.detach(), *torch.autograd.grad(logits.square().sum(), (local, words))])
    return zip(*found, strict=True)


def test_the_written_folder_runs_by_itself(folder):
    path = folder / "build" / "torch-cuda" / "__init__.py"
    spec = importlib.util.spec_from_file_location("_written_kernels", path)
    kernel = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = kernel
    try:
        spec.loader.exec_module(kernel)
        for own, expected in similarity(kernel):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
        used = {name for name in sys.modules if name.startswith(spec.name)}
        assert used == {spec.name, *(f"{spec.name}.local_loss_{part}_medmoe" for part in ("kernel", "triton"))}
        assert sorted(kernel.__all__) == ["MAX_TEMP1", "MAX_WORDS", "fused_gloria_logits", "kernel_bytes"]
    finally:
        for name in [name for name in sys.modules if name.startswith(spec.name)]:
            del sys.modules[name]


def test_only_torch_triton_and_itself_are_imported(folder):
    """What the library demands of a kernel: nothing else may be imported, and itself relatively."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED, path
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (not node.level and node.module.split(".")[0] in ALLOWED), path


def test_sources_and_build_are_the_same(folder):
    for path in (folder / "torch-ext" / "medmoe_local_loss").iterdir():
        assert path.read_bytes() == (folder / "build" / "torch-cuda" / path.name).read_bytes()
    build = (folder / "build.toml").read_text(encoding="utf-8")
    metadata = json.loads((folder / "build" / "torch-cuda" / "metadata.json").read_text(encoding="utf-8"))
    assert f'name = "{metadata["name"]}"' in build
    assert f"version = {metadata['version']}" in build


def test_the_library_loads_it(folder, tmp_path):
    """Under the name of a CPU build: that of CUDA is the same code, but the library does not load it here."""
    kernels = pytest.importorskip("kernels")
    target = tmp_path / "build" / "torch-cpu"
    shutil.copytree(folder / "build" / "torch-cuda", target)
    metadata = json.loads((target / "metadata.json").read_text(encoding="utf-8"))
    metadata["backend"]["type"] = "cpu"
    (target / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    for own, expected in similarity(kernels.get_local_kernel(tmp_path, backend="cpu")):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
