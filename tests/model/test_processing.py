"""The processor as a whole: one call, saving, loading in a process without this package, heat-maps back to pixels."""

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clean_process import run_clean
from PIL import Image
from transformers import BertTokenizer
from transformers.utils import ModelOutput

from medmoe_hf.model.image_processing_medmoe import MedMoEImageProcessor, MedMoEImageProcessorPil
from medmoe_hf.model.processing_medmoe import MedMoEProcessor
from medmoe_hf.model.tokenization_medmoe import MedMoETokenizer

TEXTS = ["No pleural effusion, no pneumothorax.", "chest X-ray"]
KEYS = ["input_ids", "token_type_ids", "attention_mask", "word_ids", "pixel_values"]


def build(max_length=None, backend=MedMoEImageProcessor):
    tokenizer = MedMoETokenizer.from_words(["no pleural effusion chest"], max_length=16)
    return MedMoEProcessor(backend(size={"height": 40, "width": 64}), tokenizer, max_length=max_length)


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)
    return [Image.fromarray(colour), rng.integers(0, 4096, (33, 20)).astype(np.uint16)]


@dataclass
class Grounding(ModelOutput):
    heatmaps: torch.Tensor | None = None
    word_mask: torch.Tensor | None = None


# --- the call


@pytest.mark.parametrize("backend", [MedMoEImageProcessor, MedMoEImageProcessorPil])
def test_one_call_is_both_parts(images, backend):
    processor = build(backend=backend)
    batch = processor(images=images, text=TEXTS, return_tensors="pt")
    assert list(batch) == KEYS
    assert set(processor.model_input_names) == set(KEYS)
    assert torch.equal(batch["pixel_values"], processor.image_processor(images, return_tensors="pt")["pixel_values"])
    for key, value in processor.tokenizer(TEXTS, return_tensors="pt").items():
        assert torch.equal(batch[key], value)
    assert torch.equal(batch.word_ids, batch["word_ids"])  # no method of that name in the way here
    assert batch["pixel_values"].shape == (2, 3, 40, 64)


def test_one_modality_or_other_counts(images, tmp_path):
    processor = build()
    assert list(processor(images=images[0], return_tensors="pt")) == ["pixel_values"]
    assert list(processor(text=TEXTS, return_tensors="pt")) == KEYS[:4]
    batch = processor(images[0], TEXTS, return_tensors="pt")
    assert batch["pixel_values"].shape[0] == 1
    assert batch["input_ids"].shape[0] == 2
    assert processor(text=TEXTS[1])["word_ids"] == processor.tokenizer(TEXTS[1])["word_ids"]
    images[0].save(tmp_path / "a.png")
    both = processor(images=[tmp_path / "a.png", str(tmp_path / "a.png")], return_tensors="pt")["pixel_values"]
    assert torch.equal(both[0], both[1])
    with pytest.raises(ValueError, match="at least one input"):
        processor()


def test_arguments_of_the_call_reach_both_parts(images):
    processor = build()
    batch = processor(images=images, text=TEXTS, size=16, max_length=6, padding="max_length", return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["word_ids"].shape == (2, 6)
    nested = processor(
        images=images, text=TEXTS, images_kwargs={"size": 16}, text_kwargs={"max_length": 5}, return_tensors="np"
    )
    assert nested["pixel_values"].shape == (2, 3, 16, 16)
    assert nested["input_ids"].shape == (2, 5)
    loose = processor(text=TEXTS, padding=False, truncation=False)
    assert len(loose["input_ids"][0]) > 16 > len(loose["input_ids"][1])


def test_max_length(tmp_path):
    assert build()(text=TEXTS, return_tensors="pt")["input_ids"].shape == (2, 16)
    processor = build(max_length=7)
    assert processor(text=TEXTS, return_tensors="pt")["input_ids"].shape == (2, 7)
    assert processor(text=TEXTS, max_length=9, return_tensors="pt")["input_ids"].shape == (2, 9)
    assert build()(text=TEXTS, return_tensors="pt")["input_ids"].shape == (2, 16)  # no leak between processors
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["max_length"] == 7
    assert MedMoEProcessor.from_pretrained(tmp_path).max_length == 7
    for wrong in (0, -1, 17):
        with pytest.raises(ValueError, match=f"within 1..16, .*got {wrong}"):
            build(max_length=wrong)


def test_other_tokenizers_are_wrapped():
    vocab = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "chest"])}
    processor = MedMoEProcessor(MedMoEImageProcessor(), BertTokenizer(vocab=vocab, model_max_length=9))
    assert processor(text="chest")["word_ids"] == [-1, 0, -1]
    assert processor.tokenizer.model_max_length == 9
    with pytest.raises(TypeError, match="NoneType"):
        MedMoEProcessor(MedMoEImageProcessor())


# --- saving and loading


def test_round_trip(images, tmp_path):
    processor = build(max_length=9)
    processor.save_pretrained(tmp_path)
    loaded = MedMoEProcessor.from_pretrained(tmp_path)
    expected = processor(images=images, text=TEXTS, return_tensors="pt")
    for key, value in loaded(images=images, text=TEXTS, return_tensors="pt").items():
        assert torch.equal(value, expected[key]), key
    assert {file.name for file in tmp_path.iterdir()} == {
        "configuration_medmoe.py",
        "errors_medmoe.py",
        "image_processing_medmoe.py",
        "image_files_medmoe.py",
        "medical_images_medmoe.py",
        "medical_pixels_medmoe.py",
        "dicom_medmoe.py",
        "dicom_files_medmoe.py",
        "studies_medmoe.py",
        "study_files_medmoe.py",
        "tasks_medmoe.py",
        "losses_medmoe.py",
        "local_loss_kernel_medmoe.py",
        "local_loss_triton_medmoe.py",
        "word_regions_medmoe.py",
        "nifti_medmoe.py",
        "modalities_medmoe.py",
        "presets_medmoe.py",
        "processing_medmoe.py",
        "processor_config.json",
        "saving_medmoe.py",
        "tokenization_medmoe.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["auto_map"] == {"AutoProcessor": "processing_medmoe.MedMoEProcessor"}
    assert set(saved["image_processor"]["auto_map"]["AutoImageProcessor"]) == {"torchvision", "pil"}


CLEAN_PROCESS = """
import sys
import numpy as np
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
pictures, texts = list(np.load("pictures.npz").values()), sys.argv[1:]
trust = {"trust_remote_code": True}
found = {}

def add(name, thing, batch):
    assert type(thing).__module__.startswith("transformers_modules."), type(thing)
    found[name + ":class"] = type(thing).__name__
    found.update({f"{name}:{key}": value for key, value in batch.items()})

def whole(name, folder, **kwargs):
    processor = AutoProcessor.from_pretrained(folder, **trust, **kwargs)
    add(name, processor, processor(images=pictures, text=texts, return_tensors="np"))
    found[name + ":backend"] = processor.image_processor.backend
    return processor

whole("processor", "processor").save_pretrained("again")
whole("again", "again")
whole("processor-pil", "processor", backend="pil").save_pretrained("again-pil")
whole("again-pil", "again-pil")
for folder in ("processor", "image_processor"):
    for backend in ("torchvision", "pil"):
        part = AutoImageProcessor.from_pretrained(folder, backend=backend, **trust)
        add(f"{folder}-{backend}-images", part, part(pictures, return_tensors="np"))
for folder in ("processor", "tokenizer"):
    part = AutoTokenizer.from_pretrained(folder, **trust)
    add(f"{folder}-texts", part, part(texts, return_tensors="np"))
    assert part.words(texts[0], max_length=5) == ["No", "pleural", "effusion"]
np.savez("found.npz", **found)
"""


def test_clean_process(images, tmp_path):
    """Everything loads from the saved folders alone, with the same numbers, and can be saved again from there."""
    processor = build(max_length=9)
    processor.save_pretrained(tmp_path / "processor")
    processor.image_processor.save_pretrained(tmp_path / "image_processor")
    processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    pictures = [np.asarray(image) for image in images]
    np.savez(tmp_path / "pictures.npz", *pictures)
    run_clean(CLEAN_PROCESS, *TEXTS, folder=tmp_path, HF_HOME=tmp_path / "hf")
    found = dict(np.load(tmp_path / "found.npz"))

    whole = processor(images=pictures, text=TEXTS, return_tensors="np")
    texts = processor.tokenizer(TEXTS, return_tensors="np")
    for name, backend in (
        ("processor", "torchvision"),
        ("again", "torchvision"),
        ("processor-pil", "pil"),
        ("again-pil", "torchvision"),  # the file names both; the default decides
    ):
        assert found.pop(f"{name}:class") == "MedMoEProcessor"
        assert found.pop(f"{name}:backend") == backend
        for key in KEYS:
            np.testing.assert_allclose(found.pop(f"{name}:{key}"), whole[key], atol=1e-5)
    for folder in ("processor", "image_processor"):
        for backend, suffix in (("torchvision", ""), ("pil", "Pil")):
            name = f"{folder}-{backend}-images"
            assert found.pop(f"{name}:class") == f"MedMoEImageProcessor{suffix}"
            np.testing.assert_allclose(found.pop(f"{name}:pixel_values"), whole["pixel_values"], atol=1e-5)
    for folder in ("processor", "tokenizer"):
        assert found.pop(f"{folder}-texts:class") == "MedMoETokenizer"
        for key in KEYS[:4]:
            np.testing.assert_array_equal(found.pop(f"{folder}-texts:{key}"), texts[key])
    assert not found


# --- heat-maps


def test_grounding_is_a_bilinear_resize():
    maps = torch.randn(2, 3, 7, 7)
    grounded = build().post_process_grounding(maps, target_sizes=[(30, 50), (33, 20)])
    for row, result, size in zip(maps, grounded, [(30, 50), (33, 20)], strict=True):
        expected = torch.nn.functional.interpolate(row[None], size=size, mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(result, expected)
    for other in (torch.tensor([[30, 50], [33, 20]]), np.array([[30, 50], [33, 20]])):
        again = build().post_process_grounding(maps, target_sizes=other)
        assert all(torch.equal(one, two) for one, two in zip(grounded, again, strict=True))


def test_grounding_without_sizes_uses_the_models():
    grounded = build().post_process_grounding(torch.randn(2, 3, 5, 8))
    assert [tuple(row.shape) for row in grounded] == [(3, 40, 64)] * 2


def test_grounding_keeps_the_place_of_the_peak():
    maps = torch.zeros(1, 2, 7, 7)
    maps[0, 0, 1, 5] = maps[0, 1, 6, 2] = 1
    for height, width in ((70, 35), (31, 402), (7, 7), (700, 14)):
        grounded = build().post_process_grounding(maps, target_sizes=[(height, width)])[0]
        for word, (row, column) in zip(grounded, ((1, 5), (6, 2)), strict=True):
            y, x = divmod(int(word.argmax()), width)
            assert row <= (y + 0.5) / height * 7 <= row + 1
            assert column <= (x + 0.5) / width * 7 <= column + 1


@pytest.mark.parametrize("sigma", [0.7, 1.5])
def test_smoothing_is_a_gaussian_with_repeated_borders(sigma):
    maps = torch.randn(2, 3, 9, 12)
    smooth = build().post_process_grounding(maps, target_sizes=[(9, 12)] * 2, sigma=sigma)
    reach = math.ceil(3 * sigma)
    for image, word, row, column in ((0, 0, 4, 5), (1, 2, 0, 11)):
        total = weights = 0.0
        for dy in range(-reach, reach + 1):
            for dx in range(-reach, reach + 1):
                weight = math.exp(-(dy * dy + dx * dx) / (2 * sigma * sigma))
                y, x = min(max(row + dy, 0), 8), min(max(column + dx, 0), 11)
                total += weight * maps[image, word, y, x].item()
                weights += weight
        assert smooth[image][word, row, column].item() == pytest.approx(total / weights, abs=1e-5)


@pytest.mark.parametrize("output", [Grounding, SimpleNamespace])
def test_grounding_takes_only_real_words(output):
    maps = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    sizes = [(12, 9)] * 3
    everything = build().post_process_grounding(maps, sizes)
    for chosen in (mask, mask.long()):
        grounded = build().post_process_grounding(output(heatmaps=maps, word_mask=chosen), sizes)
        assert [len(row) for row in grounded] == [2, 3, 0]
        torch.testing.assert_close(grounded[1], everything[1][[0, 2, 3]])
        assert grounded[2].shape == (0, 12, 9)
    plain = build().post_process_grounding(output(heatmaps=maps, word_mask=None), sizes)
    assert all(torch.equal(one, two) for one, two in zip(plain, everything, strict=True))
    assert everything[0].dtype == torch.float32


def test_labels_fit_the_words():
    processor = build(max_length=9)
    batch = processor(text=TEXTS, return_tensors="pt")
    labels = processor.tokenizer.words(TEXTS, max_length=processor.max_length)
    assert [len(row) for row in labels] == (batch["word_ids"].amax(1) + 1).tolist()
    assert labels[0][:4] == ["No", "pleural", "effusion", ","]
    assert labels[1] == ["chest", "X", "-", "ray"]


@pytest.mark.parametrize(
    ("heatmaps", "sizes", "message"),
    [
        (torch.zeros(2, 3, 4, 4), [(5, 5)], "heatmaps of 2 images but 1 target_sizes"),
        (torch.zeros(2, 3, 4, 4), torch.ones(3, 2), "heatmaps of 2 images but 3 target_sizes"),
        (torch.zeros(3, 4, 4), None, r"\(images, words, height, width\), got shape \(3, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4), [(0, 5)], r"pixels, got \(0, 5\)"),
        (SimpleNamespace(logits=1), None, "SimpleNamespace has no heatmaps"),
        (Grounding(torch.zeros(2, 3, 4, 4), torch.ones(2, 2)), None, r"word_mask \(2, 2\) does not fit"),
    ],
)
def test_grounding_errors(heatmaps, sizes, message):
    with pytest.raises(ValueError, match=message):
        build().post_process_grounding(heatmaps, sizes)


def test_smoothing_needs_a_width():
    with pytest.raises(ValueError, match="cannot be negative, got -1"):
        build().post_process_grounding(torch.zeros(1, 1, 4, 4), sigma=-1)
