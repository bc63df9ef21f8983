"""A short, deterministic fuzzing of every reader, inputs that once were findings, and the guard that finds them."""

import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

sys.path.insert(0, str(Path(__file__).parent))

import campaign
import seeds
from findings import FINDINGS, million_slices
from harnesses import HARNESSES, Harness

from medmoe_hf.data.modality_words import modality_from_text
from medmoe_hf.data.sentences import sentence_spans
from medmoe_hf.errors import ImageError, MedicalImageError
from medmoe_hf.model import load_image, read_studies, studies_medmoe, study_files_medmoe

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, about what is damaged
# Executions that take about half a second, less where each of them is slow.
EXECUTIONS = {
    "studies": 40,
    "words": 60,
    "picture": 150,
    "dicom": 80,
    "nifti": 80,
    "parquet": 60,
    "config": 60,
    "tar": 40,
    "csv": 100,
}


@pytest.mark.parametrize("name", HARNESSES)
def test_a_few_hundred_inputs(name):
    harness = HARNESSES[name]
    guard = campaign.Guard(harness)
    campaign.deterministic(harness, guard, EXECUTIONS.get(name, 200), None, seed=5)
    assert guard.executions >= len(harness.seeds())


@pytest.mark.parametrize(("name", "what", "content"), FINDINGS, ids=[f"{one[0]}: {one[1]}" for one in FINDINGS])
def test_what_once_was_a_finding(name, what, content):
    assert len(content) < 4096
    campaign.Guard(HARNESSES[name]).run(content)


def test_a_small_file_that_states_millions_of_slices(tmp_path):
    content = million_slices()
    assert len(content) < 8192
    (tmp_path / "x.nii.gz").write_bytes(content)
    with pytest.raises(MedicalImageError, match="at most 100000 are listed"):
        read_studies(tmp_path)


def test_texts_of_reports_are_read_in_linear_time():
    """A text that is four times as long takes some four times as long; it was sixty times."""

    def seconds(text):
        started = time.process_time()
        modality_from_text(text)
        sentence_spans(text)
        return time.process_time() - started

    for text in ("no x-ray " * 2000, "compared with ct " * 1000, "a" + " " * 16_000 + "b"):
        assert seconds(text) < 1


def test_a_file_of_thousands_of_orientations():
    """Each is a series of its own; comparing them one by one took 4 s."""
    rng = np.random.default_rng(0)
    places = rng.normal(size=(2000, 6)), rng.normal(size=(2000, 3))
    numbers = (1.0, 1.0, 1.0, 1.0)
    instance = study_files_medmoe.Instance(
        *("a.dcm", "s", "e", "u", "1.2", None, 0, numbers, (8, 8), 2000, (1.0, 1.0), None), *places
    )
    started = time.process_time()
    assert len(studies_medmoe._series_of("e", [instance], 10**6)) == 2000
    assert time.process_time() - started < 2


def test_postscript_is_not_run(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments: started.append(arguments))
    for name in ("a.eps", "a.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, "EPS")
        with pytest.raises(ImageError, match="it is PostScript"):
            load_image(tmp_path / name)
    with pytest.raises(ImageError, match="it is PostScript"):
        load_image(Image.open(tmp_path / "a.eps"))
    assert not started


def test_a_file_beyond_memory_is_left_out_alone(tmp_path, monkeypatch):
    (tmp_path / "a.dcm").write_bytes(seeds.dicom()[0])

    def reading(*arguments):
        raise MemoryError

    monkeypatch.setattr(study_files_medmoe, "read_header", reading)
    assert "more memory" in study_files_medmoe.read_file(str(tmp_path / "a.dcm"), 10**6)


def test_a_checkpoint_leaves_functions_as_they_are():
    before = torch._utils._rebuild_tensor_v2.__defaults__
    (content,) = [content for _, what, content in FINDINGS if "defaults" in what]
    campaign.Guard(HARNESSES["checkpoint"]).run(content)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


@pytest.mark.parametrize("name", HARNESSES)
def test_mutators_are_deterministic_and_bounded(name):
    harness = HARNESSES[name]
    first = harness.seeds()
    assert first == harness.seeds()
    assert all(len(content) <= 4096 for content in first if name != "tar")
    made = [
        [harness.mutate(content, random.Random(index), 1000) for index, content in enumerate(first * 3)] for _ in "ab"
    ]
    assert made[0] == made[1]
    assert all(len(content) <= 1000 for content in made[0])
    assert len(set(made[0])) > len(set(first))


def harness_of(run):
    return Harness(run, lambda: [b"seed"], lambda content, rng, maximum: content + b"!", ())


def fails(content):
    if len(content) > 4:
        raise KeyError("x")


def answers(content):
    raise ImageError("damaged")


def takes_long(content):
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass


def grows(content):
    bytearray(b"x" * 300 * 2**20)


def test_the_guard_finds_other_errors_and_lets_ours_pass(tmp_path):
    guard = campaign.Guard(harness_of(answers), tmp_path / "passed")
    campaign.deterministic(guard.harness, guard, 10, None, 0)
    assert not (tmp_path / "passed").exists()
    guard = campaign.Guard(harness_of(fails), tmp_path)
    campaign.deterministic(guard.harness, guard, 10, None, 0)
    assert min(path.read_bytes() for path in tmp_path.glob("*.bin")) == b"seed!"
    assert "KeyError" in next(tmp_path.glob("*.txt")).read_text()


@pytest.mark.parametrize(("run", "kind"), [(takes_long, "time"), (grows, "memory")])
def test_the_guard_finds_time_and_memory(tmp_path, monkeypatch, run, kind):
    monkeypatch.setattr(campaign, "SECONDS_PER_EXECUTION", 0.1 if kind == "time" else 60)
    campaign._reset_peak_memory()
    guard = campaign.Guard(harness_of(run), tmp_path)
    guard.run(b"seed")
    assert [path.read_text().split()[0] for path in tmp_path.glob("*.txt")] == [kind]
