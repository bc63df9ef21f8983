"""The ready-made YAML, through the whole stream: every caption rule on a shard in its layout."""

import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medmoe_hf.cli import app
from medmoe_hf.data import write_webdataset
from medmoe_hf.data.inspection import inspect_sources
from medmoe_hf.data.sources import SourceError, load_sources
from medmoe_hf.data.stream import SampleStream

READY = Path(__file__).parents[2] / "examples" / "sources"
run = CliRunner().invoke


def joined(tag, items):
    return "".join(f"{item}_{tag}_" for item in items)


def items(prefix, count):
    return [f"{prefix} {index}." for index in range(count)]


# source -> (text in the shard, captions that may come of it, modality id)
LAYOUTS = {
    "radimagenet": (joined("radimagenet", items("A CT slice", 10)), items("A CT slice", 10), 1),
    "chexpert": (joined("chexpert", items("view", 10)), items("view", 10), 0),
    "chestxray8": (joined("chestxray8", items("film", 10)), items("film", 10), 0),
    "openi": (joined("openi", ["The report.", *items("template", 3)]), ["The report."], 0),
    "mimiccxr": (joined("mimiccxr", [*items("template", 10), "", "The report."]), ["The report."], 0),
    "retina_merged": (joined("all_retina_merged", items("retina", 11)), items("retina", 10), 5),
    "dr": (joined("dr", items("eye", 15)), items("eye", 15), 5),
    "medicat": (joined("medicat", ["Figure one.", "nothingpresent"]), ["Figure one."], -100),
    "quilt": ("Nuclei in a row.", ["Nuclei in a row."], 4),
    "retina": ("An eye.", ["An eye."], 5),
    "pmc_oa": ("Figure 2.", ["Figure 2."], -100),
    "roco": ("Axial CT of the abdomen.", ["Axial CT of the abdomen."], 1),
    "llava_med": ("Something.", ["Something."], -100),
}


def png(number):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for index, sample in enumerate(samples):
            for extension, content in sample.items():
                member = tarfile.TarInfo(f"{index:06d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def test_unimed_s_thirteen_sources(tmp_path, monkeypatch):
    """PNG bytes under names that end in jpg, as in the real shards."""
    for number, (name, (text, _, _)) in enumerate(LAYOUTS.items()):
        write(tmp_path / name / "dataset-000000.tar", [{"jpg": png(number), "txt": text.encode()}] * 40)
    monkeypatch.setenv("UNIMED", str(tmp_path))
    sources = load_sources(READY / "unimed.yaml")
    assert [source.name for source in sources] == list(LAYOUTS)
    stream = SampleStream(sources)
    found = {name: Counter() for name in LAYOUTS}
    for sample in stream:
        name = sources[sample["source"]].name
        found[name][sample["caption"]] += 1
        assert sample["image"].getpixel((0, 0))[0] == list(LAYOUTS).index(name)
        assert sample["modality"] == LAYOUTS[name][2], name
    assert not stream.faults.counts
    for name, (_, captions, _) in LAYOUTS.items():
        assert sum(found[name].values()) == 40
        assert set(found[name]) <= set(captions), name
        # Of ten equally likely ones, forty draws leave hardly any out.
        assert len(found[name]) >= 0.7 * len(captions), name


def test_inspection_says_when_a_rule_is_missing(tmp_path):
    write(tmp_path / "a.tar", [{"jpg": png(1), "txt": LAYOUTS["dr"][0].encode()}])
    sources = load_sources_of(f"- {{kind: webdataset, files: ['{tmp_path}/a.tar']}}", tmp_path)
    assert inspect_sources(sources)[0].problems == ["captions hold the tag of another rule; say `caption_rule: dr`"]


def test_the_official_shards(tmp_path, monkeypatch):
    write(tmp_path / "a.tar", [{"jpg": png(k), "txt": f"c{k}".encode(), "cls": str(k).encode()} for k in range(6)])
    monkeypatch.setenv("MEDMOE", str(tmp_path))
    found = {sample["caption"]: sample["modality"] for sample in SampleStream(load_sources(READY / "official.yaml"))}
    assert found == {f"c{k}": k for k in range(6)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- {kind: webdataset, fles: [a]}", r"0\.fles: unknown key\. Did you mean `files`"),
        ("- {kind: webdataset, files: [a], weight: 0}", r"0\.weight: .*greater than 0.*got 0"),
        ("- {kind: tar, files: [a]}", "'phantom', 'webdataset'"),
        ("kind: phantom", "must hold a list of sources"),
        ("- [", "no valid YAML"),
        (None, "Cannot read"),
    ],
)
def test_wrong_files_are_explained(tmp_path, content, message):
    path = tmp_path / "sources.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SourceError, match=message):
        load_sources(path)


# medmoe data inspect


def test_inspection_counts_and_shows_what_is_wrong(tmp_path):
    write_webdataset(tmp_path / "good", shards=2, samples_per_shard=15, image_size=48)
    write(tmp_path / "bad.tar", [{"jpg": b"x", "txt": b"x"}, {"jpg": png(1), "txt": b"A chest radiograph."}])
    (tmp_path / "sources.yaml").write_text(
        f"- {{kind: webdataset, name: good, files: ['{tmp_path}/good/*.tar']}}\n"
        f"- {{kind: webdataset, name: bad, files: ['{tmp_path}/bad.tar'], modality: caption}}\n"
        f"- {{kind: webdataset, name: none, files: ['{tmp_path}/none*.tar']}}\n"
        "- {kind: phantom, image_size: 50}\n"
    )
    reports = inspect_sources(load_sources(tmp_path / "sources.yaml"), tmp_path / "sheet.png", samples=20)
    good, bad, none, phantom = reports
    assert (good.shards, good.samples, good.looked_at, good.problems) == (2, 30, 20, [])
    assert {"png", "txt", "cls"} <= set(good.fields)
    assert (good.sizes, phantom.sizes) == (((48, 48), (48, 48)), ((50, 50), (50, 50)))
    assert (bad.samples, dict(bad.modalities), bad.captions) == (2, {"xray": 1}, ["A chest radiograph."])
    assert bad.problems == ["1 of unreadable image"]
    assert "No file fits" in none.problems[0]
    assert phantom.samples is None
    assert Image.open(tmp_path / "sheet.png").size == (12 * 116, 4 * 146)
    result = run(app, ["data", "inspect", str(tmp_path / "sources.yaml"), "--sheet", str(tmp_path / "again.png")])
    assert result.exit_code == 1
    assert "PROBLEM     1 of unreadable image" in result.output
    assert "good: 2 shards, 30 samples" in result.output


# medmoe data overlap


def test_overlap_finds_equal_and_similar_images(tmp_path):
    from medmoe_hf.data import phantom_sample

    drawn = [phantom_sample(3, index, image_size=128)["image"].convert("RGB") for index in range(24)]
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        (tmp_path / f"{part}.yaml").write_text(
            f"- {{kind: imagefolder, path: '{tmp_path}/{part}', caption_template: x}}\n"
        )
    for index, image in enumerate(drawn[:12]):
        image.save(tmp_path / "a" / f"{index}.png")
    for index, image in enumerate(drawn[12:]):
        image.save(tmp_path / "b" / f"{index}.png")
    result = run(app, ["data", "overlap", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "--distance", "0"])
    assert result.exit_code == 0, result.output
    drawn[4].save(tmp_path / "b" / "copy.bmp")
    drawn[7].resize((100, 100)).save(tmp_path / "b" / "smaller.jpg", quality=80)
    result = run(app, ["data", "overlap", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "--distance", "2"])
    assert result.exit_code == 1
    lines = result.output.splitlines()[1:]
    assert [line.split()[0] for line in lines if "/4.png" in line and "copy.bmp" in line] == ["equal"]
    assert [line.split()[1] for line in lines if "/7.png" in line and "smaller.jpg" in line] == ["bits"]


def test_overlap_equals_comparing_every_pair(tmp_path):
    """The pieces of the hashes against a plain loop over all pairs."""
    import imagehash

    from medmoe_hf.data import phantom_sample
    from medmoe_hf.data.overlap import find_overlap

    sources = [
        load_sources_of(f"- {{kind: phantom, seed: {seed}, image_size: 48, length: 40}}", tmp_path) for seed in (1, 2)
    ]
    hashes = [
        [imagehash.phash(phantom_sample(seed, i, image_size=48)["image"].convert("RGB")) for i in range(40)]
        for seed in (1, 2)
    ]
    for distance in (0, 6, 12):
        expected = Counter(one - two for one in hashes[0] for two in hashes[1] if one - two <= distance)
        assert Counter(bits for *_, bits in find_overlap(*sources, distance=distance).near) == expected
    assert expected  # look-alikes there are


def load_sources_of(text, folder):
    (folder / "s.yaml").write_text(text)
    return load_sources(folder / "s.yaml")


# What tells one content from another


def test_content_facts_change_with_the_content_alone(tmp_path, monkeypatch):
    """Files added, removed, swapped behind a pattern, cut or edited; not times, and not where the folder is."""
    monkeypatch.chdir(tmp_path)
    for name, number in (("a", 1), ("b", 2)):
        write(tmp_path / "x" / f"{name}.tar", [{"jpg": png(number), "txt": b"c"}])
    source = load_sources_of("- {kind: webdataset, files: ['x/*.tar', 'gone.tar']}", tmp_path)[0]
    first = source.content_facts()
    assert [entry[:2] for entry in first] == [["a.tar", 10240], ["b.tar", 10240], ["gone.tar", None]]
    os.utime(tmp_path / "x" / "a.tar", (1, 1))
    assert source.content_facts() == first == json.loads(json.dumps(first))
    (tmp_path / "x" / "a.tar").rename(tmp_path / "x" / "c.tar")
    (tmp_path / "x" / "b.tar").rename(tmp_path / "x" / "a.tar")
    (tmp_path / "x" / "c.tar").rename(tmp_path / "x" / "b.tar")
    swapped = source.content_facts()
    assert [entry[:2] for entry in swapped] == [entry[:2] for entry in first]
    assert swapped != first
    assert [entry[2] for entry in swapped[:2]] == [first[1][2], first[0][2]]
    write(tmp_path / "x" / "c.tar", [{"jpg": png(1), "txt": b"c"}])
    assert len(source.content_facts()) == 4


@pytest.mark.parametrize("rows", [3, 5000])
def test_content_facts_of_tables_count_every_byte(tmp_path, rows):
    lines = ["image,caption", *(f"{index}.png,a caption" for index in range(rows))]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines))
    source = load_sources_of(f"- {{kind: csv, files: ['{path}']}}", tmp_path)[0]
    first = source.content_facts()
    lines[rows // 2] = lines[rows // 2].replace("caption", "caption"[::-1])
    path.write_text("\n".join(lines))
    (changed,) = source.content_facts()
    assert changed[:2] == first[0][:2] == ["a.csv", len("\n".join(lines))]
    assert changed[2] != first[0][2]


def test_content_facts_of_image_folders_and_saved_sets(tmp_path):
    import datasets

    (tmp_path / "f" / "cyst").mkdir(parents=True)
    (tmp_path / "f" / "cyst" / "1.png").write_bytes(png(1))
    folder = load_sources_of(f"- {{kind: imagefolder, path: '{tmp_path}/f'}}", tmp_path)[0]
    first = folder.content_facts()
    assert first[0][:2] == ["f", len(png(1))]
    (tmp_path / "f" / "cyst" / "1.png").rename(tmp_path / "f" / "cyst" / "2.png")
    assert folder.content_facts() != first
    found = []
    for number in (1, 1, 2):
        one = datasets.Dataset.from_dict({"image": [png(number)], "caption": ["c"]})
        one.save_to_disk(tmp_path / "saved")
        source = load_sources_of(f"- {{kind: saved, path: '{tmp_path}/saved'}}", tmp_path)[0]
        found.append(source.content_facts())
    assert found[0] == found[1]
    assert found[1][0][:2] == found[2][0][:2]
    assert found[1] != found[2]
    assert load_sources_of("- {kind: phantom}", tmp_path)[0].content_facts() == []
