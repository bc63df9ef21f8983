"""A small saved checkpoint and pictures, for the clients of other libraries."""

from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medmoe_hf.data import FINDINGS, phantom_sample
from medmoe_hf.model import MedMoEImageProcessor, MedMoEModel, MedMoEProcessor, MedMoETokenizer

LIBRARIES = {
    "test_clip_benchmark.py": ("clip-benchmark", "open_clip_torch"),
    "test_dicomweb.py": ("dicomweb-client",),
    "test_eva.py": ("kaiko-eva",),
    "test_kernels.py": ("kernels", "triton"),
    "test_mcp.py": ("mcp", "gradio"),
    "test_medmnist.py": ("medmnist",),
    "test_mteb.py": ("mteb",),
    "test_sentence_transformers.py": ("sentence-transformers",),
    "test_trident.py": ("trident-test",),
}


def pytest_terminal_summary(terminalreporter):
    """Prints which libraries were tried in which version, and what became of their tests."""
    counts = {name: Counter() for name in LIBRARIES}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            name = Path(report.nodeid.partition("::")[0]).name
            if name in counts:
                counts[name][outcome] += 1
    terminalreporter.section("other libraries")
    for name, libraries in LIBRARIES.items():
        outcomes = ", ".join(f"{number} {outcome}" for outcome, number in counts[name].items()) or "not run"
        versions = ", ".join(f"{library} {_version(library)}" for library in libraries)
        terminalreporter.write_line(f"{versions:<48} {outcomes}")


def _version(library):
    try:
        return version(library)
    except PackageNotFoundError:
        return "(missing)"


@dataclass
class Saved:
    """A folder that `save_pretrained` has written, and what it was written from."""

    folder: Path
    model: MedMoEModel
    processor: MedMoEProcessor

    def images(self, images):
        """Unit embeddings by the model itself, one image at a time, float32 `(B, D)`."""
        with torch.no_grad():
            rows = [
                self.model.get_image_features(**self.processor(images=[image], return_tensors="pt")).pooler_output
                for image in images
            ]
        return torch.nn.functional.normalize(torch.cat(rows), dim=-1).numpy()

    def texts(self, texts):
        with torch.no_grad():
            rows = [
                self.model.get_text_features(**self.processor(text=[text], return_tensors="pt")).pooler_output
                for text in texts
            ]
        return torch.nn.functional.normalize(torch.cat(rows), dim=-1).numpy()


@pytest.fixture(scope="module")
def saved(small_config, tmp_path_factory, lived_in):
    torch.manual_seed(0)
    reports = [phantom_sample(1, index, image_size=64)["caption"] for index in range(40)]
    tokenizer = MedMoETokenizer.from_words([*reports, *FINDINGS], max_length=24)
    processor = MedMoEProcessor(MedMoEImageProcessor(size={"height": 64, "width": 64}), tokenizer, max_length=16)
    config = small_config(projection_dim=32, text_config={"vocab_size": len(tokenizer)})
    model = lived_in(MedMoEModel(config))
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Saved(folder, model, processor)


@pytest.fixture(scope="module")
def pictures():
    """Six images of different sizes, in color and in gray."""
    draw = np.random.default_rng(0)
    color = [Image.fromarray(draw.integers(0, 256, (70, 64 + 9 * i, 3), dtype=np.uint8)) for i in range(5)]
    return [*color, color[0].convert("L")]
