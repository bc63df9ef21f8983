"""Phantoms: reports match the drawings."""

import collections
import hashlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import ImageFilter
from tokenizers.pre_tokenizers import BertPreTokenizer

from medmoe_hf.data.phantom import (
    FINDINGS,
    PHRASES,
    phantom_sample,
    phantom_vocabulary,
    write_webdataset,
    zero_shot_prompts,
)
from medmoe_hf.model.modalities_medmoe import MODALITIES

SIZE = 64
COUNT = 2000
RADIOLOGICAL = ("xray", "ct", "mri")


def bert_words(text):
    return [word for word, _ in BertPreTokenizer().pre_tokenize_str(text.lower())]


def digest(sample):
    parts = [sample["image"].tobytes(), sample["mask"].tobytes(), sample["image"].mode.encode()]
    parts += [repr(sample[name]).encode() for name in ("id", "caption", "modality", "finding", "finding_word", "box")]
    return hashlib.sha256(b"|".join(parts)).hexdigest()


def contrast(sample):
    """Mean intensity of the mask minus that of a ring of 4 pixels around it, 1 pixel away since edges are soft."""
    image = np.asarray(sample["image"].convert("L"), dtype=float)
    wide, tight = (np.asarray(sample["mask"].filter(ImageFilter.MaxFilter(size))) > 0 for size in (11, 3))
    return image[np.asarray(sample["mask"]) > 0].mean() - image[wide & ~tight].mean()


@pytest.fixture(scope="module")
def samples():
    return [phantom_sample(11, index, image_size=SIZE) for index in range(COUNT)]


@pytest.fixture(scope="module")
def abnormal(samples):
    return [sample for sample in samples if sample["finding"] != "normal"]


def test_sample_has_the_declared_fields_and_types(samples):
    assert set(samples[0]) == {"id", "image", "caption", "modality", "finding", "finding_word", "box", "mask"}
    for sample in samples[:300]:
        modality = MODALITIES[sample["modality"]]
        colour = modality in ("histopathology", "fundus")
        assert sample["image"].mode == ("RGB" if colour else "L")
        assert sample["image"].size == sample["mask"].size == (SIZE, SIZE)
        assert sample["mask"].mode == "L"
        assert set(np.unique(np.asarray(sample["mask"]))) <= {0, 255}
        assert sample["finding"] in FINDINGS[modality]
    assert samples[17]["id"] == "phantom-11-17"


def test_another_process_draws_the_same_bytes_and_caches_nothing(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_phantom import digest, phantom_sample\n"
        "print(*[digest(phantom_sample(5, i, image_size=80)) for i in range(12)])"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_DATASETS_OFFLINE": "1", "PYTHONHASHSEED": "77"}
    environment.pop("HF_DATASETS_CACHE", None)
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == [digest(phantom_sample(5, index, image_size=80)) for index in range(12)]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == 0


def test_seed_and_index_change_the_sample_and_modalities_restrict_it():
    digests = {digest(phantom_sample(seed, index, image_size=48)) for seed in range(3) for index in range(20)}
    assert len(digests) == 60
    chosen = [phantom_sample(0, index, image_size=48, modalities=("fundus", "ct")) for index in range(30)]
    assert {MODALITIES[sample["modality"]] for sample in chosen} == {"ct", "fundus"}


@pytest.mark.parametrize("size", [48, 160])
def test_image_size_scales_the_same_scene(size):
    for index in range(40):
        small, large = phantom_sample(2, index, image_size=size), phantom_sample(2, index, image_size=320)
        assert (small["caption"], small["finding"]) == (large["caption"], large["finding"])
        if small["box"]:
            np.testing.assert_allclose(np.array(small["box"]) / size, np.array(large["box"]) / 320, atol=2.5 / size)


def test_boxes_are_tight_around_masks(samples):
    for sample in samples:
        rows, columns = np.nonzero(np.asarray(sample["mask"]))
        if sample["finding"] == "normal":
            assert sample["box"] == []
            assert len(rows) == 0
        else:
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert sample["box"] == [float(value) for value in expected]
            assert len(rows) >= 16


def test_smallest_images_still_show_every_finding():
    for index in range(300):
        sample = phantom_sample(4, index, image_size=48)
        assert (sample["box"] == []) == (sample["finding"] == "normal")


def test_modalities_and_findings_are_balanced(samples):
    modalities = collections.Counter(sample["modality"] for sample in samples)
    normal = collections.Counter(sample["modality"] for sample in samples if sample["finding"] == "normal")
    pairs = collections.Counter((sample["modality"], sample["finding"]) for sample in samples)
    assert len(pairs) == 24
    for modality in range(6):
        assert 270 < modalities[modality] < 400
        assert 0.16 < normal[modality] / modalities[modality] < 0.34
    assert min(pairs.values()) > 50


def test_caption_names_the_finding_with_its_word_and_no_other(samples):
    for sample in samples:
        modality = MODALITIES[sample["modality"]]
        words = bert_words(sample["caption"])
        assert 8 <= len(words) <= 25
        named = {phrases.word for phrases in PHRASES[modality].values()} & set(words)
        if sample["finding"] == "normal":
            assert sample["finding_word"] == ""
            assert not named
        else:
            assert sample["finding_word"] in sample["caption"]
            assert named == {sample["finding_word"].lower()}
            assert named == {PHRASES[modality][sample["finding"]].word}


def test_left_and_right_agree_with_the_mask(abnormal):
    checked = collections.Counter()
    for sample in abnormal:
        sides = {"left", "right"} & set(bert_words(sample["caption"]))
        assert len(sides) <= 1
        for side in sides:
            modality = MODALITIES[sample["modality"]]
            on_image_left = np.nonzero(np.asarray(sample["mask"]))[1].mean() < SIZE / 2 - 0.5
            assert (side == "left") == (on_image_left != (modality in RADIOLOGICAL)), sample["id"]
            checked[modality, sample["finding"]] += 1
    assert len(checked) == 16
    assert min(checked.values()) > 40


@pytest.mark.parametrize(
    ("upper", "lower"),
    [("upper", "lower"), ("upper", "middle"), ("anterior", "posterior"), ("frontal", "occipital"), ("near", "far")],
)
def test_levels_agree_with_the_mask(abnormal, upper, lower):
    heights = {upper: [], lower: []}
    for sample in abnormal:
        if (upper, lower) == PHRASES[MODALITIES[sample["modality"]]][sample["finding"]].levels:
            (word,) = {upper, lower} & set(bert_words(sample["caption"]))
            heights[word].append(np.nonzero(np.asarray(sample["mask"]))[0].mean() / SIZE)
    assert np.percentile(heights[upper], 99) < np.percentile(heights[lower], 1)


def test_size_words_agree_with_the_area(abnormal):
    areas = collections.defaultdict(list)
    for sample in abnormal:
        key = MODALITIES[sample["modality"]], sample["finding"]
        for size in set(PHRASES[key[0]][key[1]].sizes) & set(bert_words(sample["caption"])):
            areas[(*key, size)].append(np.count_nonzero(sample["mask"]))
    assert len(areas) == 18 * 3
    for modality, findings in FINDINGS.items():
        for finding in findings[1:]:
            sizes = [np.mean(areas[modality, finding, size]) for size in PHRASES[modality][finding].sizes]
            assert sizes[1] > 1.05 * sizes[0], (modality, finding)
            assert sizes[2] > 1.05 * sizes[1], (modality, finding)


def test_boxes_have_the_scale_of_their_modality_and_are_not_in_the_center(abnormal):
    areas, hits = collections.defaultdict(list), []
    for sample in abnormal:
        x0, y0, x1, y1 = sample["box"]
        areas[MODALITIES[sample["modality"]]].append((x1 - x0) * (y1 - y0) / SIZE**2)
        hits.append(x0 <= SIZE / 2 < x1 and y0 <= SIZE / 2 < y1)
    expected = {
        "xray": (0.08, 0.20),
        "ct": (0.03, 0.08),
        "mri": (0.01, 0.06),
        "ultrasound": (0.02, 0.08),
        "histopathology": (0.10, 0.25),
        "fundus": (0.01, 0.10),
    }
    for modality, (low, high) in expected.items():
        assert low < np.mean(areas[modality]) < high, modality
    assert np.mean(hits) < 0.3


@pytest.mark.parametrize(
    ("finding", "sign"),
    [
        ("effusion", 1),
        ("consolidation", 1),
        ("metastasis", 1),
        ("plaque", 1),
        ("hematoma", 1),
        ("nodule", 1),
        ("calcification", 1),
        ("carcinoma", -1),
        ("inflammation", -1),
        ("necrosis", 1),
        ("hemorrhages", -1),
        ("exudates", 1),
        ("cupping", 1),
    ],
)
def test_findings_differ_from_their_surroundings(abnormal, finding, sign):
    contrasts = np.array([sign * contrast(sample) for sample in abnormal if sample["finding"] == finding])
    assert contrasts.mean() > 15
    assert (contrasts > 0).mean() > 0.85


def test_a_hematoma_has_a_bright_fluid_above_a_dark_one(abnormal):
    differences = []
    for sample in abnormal:
        if sample["finding"] == "hematoma":
            mask = np.asarray(sample["mask"]) > 0
            pixels = np.asarray(sample["image"].convert("L")).astype(float)
            middle = np.nonzero(mask)[0].mean()
            above = np.arange(SIZE)[:, None] < middle
            differences.append(pixels[mask & above].mean() - pixels[mask & ~above].mean())
    assert min(differences) > 30


def test_a_cyst_is_black_inside_a_bright_wall(abnormal):
    for sample in abnormal:
        if sample["finding"] == "cyst":
            left, top, right, bottom = sample["box"]
            y, x = np.mgrid[:SIZE, :SIZE] + 0.5
            distance = np.hypot(
                2 * (x - (left + right) / 2) / (right - left), 2 * (y - (top + bottom) / 2) / (bottom - top)
            )
            pixels = np.asarray(sample["image"].convert("L")).astype(float)
            assert pixels[distance < 0.5].mean() < 25
            assert pixels[(distance > 0.8) & (distance < 1)].mean() > 120


def test_vocabulary_is_exactly_what_reports_and_prompts_use(samples):
    vocabulary = phantom_vocabulary()
    assert vocabulary == sorted(set(vocabulary))
    prompts = [text for m in MODALITIES for texts in zero_shot_prompts(m).values() for text in texts]
    used = {word for text in [sample["caption"] for sample in samples] + prompts for word in bert_words(text)}
    assert used <= set(vocabulary)
    # The vocabulary has no unused words: 2,000 reports use nearly all of it.
    assert len(used) > 0.98 * len(vocabulary)


def test_prompts_name_their_own_finding_only():
    for modality in MODALITIES:
        prompts = zero_shot_prompts(modality)
        assert tuple(prompts) == FINDINGS[modality]
        words = {phrases.word for phrases in PHRASES[modality].values()} - {""}
        for finding, texts in prompts.items():
            assert len(set(texts)) >= 6
            for text in texts:
                own = {PHRASES[modality][finding].word} - {""}
                assert words & set(bert_words(text)) == own
                assert "{" not in text
            used = {word for text in texts for word in bert_words(text)}
            assert set(PHRASES[modality][finding].sizes) <= used  # prompts vary over all sizes


def test_webdataset_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    out = tmp_path / "shards"
    paths = write_webdataset(out, shards=2, samples_per_shard=4, seed=6, image_size=48)
    assert sorted(out.iterdir()) == paths == [out / "phantom-000000.tar", out / "phantom-000001.tar"]
    read = datasets.load_dataset(
        "webdataset",
        data_files=[str(path) for path in paths],
        split="train",
        streaming=True,
        cache_dir=str(tmp_path / "cache"),
    )
    rows = list(read)
    assert len(rows) == 8
    for index, row in enumerate(rows):
        sample = phantom_sample(6, index, image_size=48)
        assert row["__key__"] == f"{index:09d}"
        assert row["png"].tobytes() == sample["image"].tobytes()
        assert row["mask.png"].tobytes() == sample["mask"].tobytes()
        assert row["txt"] == sample["caption"]
        assert int(row["cls"]) == sample["modality"]
        assert row["json"] == {name: sample[name] for name in ("id", "finding", "finding_word", "box")}
    with tarfile.open(paths[0]) as archive:
        assert archive.getnames()[:5] == [f"000000000.{name}" for name in ("png", "mask.png", "txt", "cls", "json")]
    again = write_webdataset(tmp_path / "again", shards=2, samples_per_shard=4, seed=6, image_size=48)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]
    with pytest.raises(FileExistsError, match=r"phantom-000000\.tar"):
        write_webdataset(out, shards=1, image_size=48)


def test_a_failed_write_leaves_no_shard(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("drawing failed")

    monkeypatch.setattr("medmoe_hf.data.phantom.samples.phantom_sample", fail)
    with pytest.raises(RuntimeError, match="drawing failed"):
        write_webdataset(tmp_path, shards=1, samples_per_shard=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: phantom_sample(0, 0, image_size=47), "image_size must be at least 48, got 47"),
        (lambda: phantom_sample(-1, 0), "seed must be at least 0"),
        (lambda: phantom_sample(0, -1), "index must be at least 0"),
        (lambda: phantom_sample(0, 0, modalities=("pet",)), "modalities must be .*xray.*got .*pet"),
        (lambda: phantom_sample(0, 0, modalities=()), "modalities must be one or more"),
        (lambda: phantom_sample(0, 0, modalities=("ct", "ct")), "distinct"),
        (lambda: zero_shot_prompts("pet"), "modality must be one of .*got 'pet'"),
        (lambda: write_webdataset("nowhere", shards=0), "shards must be at least 1"),
        (lambda: write_webdataset("nowhere", shards=1, samples_per_shard=0), "samples_per_shard must be at least 1"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
