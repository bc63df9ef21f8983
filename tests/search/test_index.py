"""Search in embeddings: brute force, planted neighbours, the filter, and invalid folders."""

import json
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from encoding_process import add_samples, model_folder, png
from typer.testing import CliRunner

from medmoe_hf import MedMoEModel, MedMoEProcessor
from medmoe_hf.cli import app
from medmoe_hf.data import MODALITIES, phantom_sample, write_webdataset
from medmoe_hf.data.sources import PhantomSource, TableSource, WebDatasetSource
from medmoe_hf.errors import ArgumentError, EncodeError
from medmoe_hf.search import EmbeddingIndex, Hit, encode_sources, hits_table, index, search

faiss = pytest.importorskip("faiss")

SIZE, ROWS = 16, 700


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_embeddings(out, images, reports, modalities, per_shard=100, processes=1, dtype=np.float16):
    """A folder like those of `encode_sources`, with given embeddings."""
    out.mkdir()
    manifest = {"modalities": list(MODALITIES), "processes": processes, "dtype": np.dtype(dtype).name}
    manifest |= {"fingerprint": "0", "keep_captions": False, "model": "none"}
    (out / "encoding.json").write_text(json.dumps(manifest))
    order, rows = [], np.arange(len(images))
    for rank in range(processes):
        own = rows[rank::processes]
        order.append(own)
        # the last shard of a process may be empty
        for number, start in enumerate(range(0, len(own) + per_shard, per_shard)):
            some = own[start : start + per_shard]
            columns = {name: [f"{name} {row}" for row in some] for name in ("source", "shard", "key")}
            table = pyarrow.table(
                {name: pyarrow.array(values, pyarrow.string()) for name, values in columns.items()}
                | {
                    "row": pyarrow.array(some),
                    "modality": pyarrow.array([MODALITIES[modalities[row]] for row in some], pyarrow.string()),
                    "probability": pyarrow.array(np.full(len(some), 0.5, np.float32)),
                    "image_embeds": vectors(images[some].astype(dtype)),
                    "text_embeds": vectors(reports[some].astype(dtype)),
                }
            )
            state = json.dumps({"complete": start + per_shard >= len(own) + 1, "stream": {}})
            table = table.replace_schema_metadata({b"medmoe": state.encode()})
            pyarrow.parquet.write_table(table, out / f"embeds-{rank:05d}-of-{processes:05d}-{number:06d}.parquet")
    return np.concatenate(order)


def vectors(rows):
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), SIZE)


@pytest.fixture
def embeddings():
    rng = np.random.default_rng(0)
    images, reports = (unit(rng.standard_normal((ROWS, SIZE))).astype(np.float16) for _ in range(2))
    modalities = rng.integers(0, 3, ROWS)
    modalities[[5, 600]] = 4
    return images, reports, modalities


@pytest.fixture
def large(monkeypatch):
    """Settings for more than `EXACT` pairs, applied to a few hundred."""
    for name, value in {"EXACT": 100, "SEGMENT": 250, "LISTS": 8, "PROBES": 8, "_TRAINED_ON": 40}.items():
        monkeypatch.setattr(index, name, value)


def brute_force(query, rows, k, among=None):
    scores = rows.astype(np.float64) @ query.astype(np.float64)
    allowed = np.arange(len(rows)) if among is None else np.flatnonzero(among)
    best = allowed[np.argsort(-scores[allowed], kind="stable")[:k]]
    return best.tolist(), scores[best]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("processes", [1, 3])
def test_hits_are_the_nearest_by_brute_force(tmp_path, embeddings, dtype, processes):
    images, reports, modalities = embeddings
    write_embeddings(tmp_path / "out", images, reports, modalities, processes=processes, dtype=dtype)
    query = unit(np.random.default_rng(1).standard_normal((1, SIZE)))[0].astype(np.float32)
    for among, rows in (("images", images), ("reports", reports)):
        found = EmbeddingIndex(tmp_path / "out", among)
        assert len(found) == ROWS
        for modality, mask in ((None, None), ("ct", modalities == 1), ("histopathology", modalities == 4)):
            expected, scores = brute_force(query, rows, 10, mask)
            hits = found.search(query, 10, modality)
            assert [hit.row for hit in hits] == expected
            assert [hit.key for hit in hits] == [f"key {row}" for row in expected]
            np.testing.assert_allclose([hit.score for hit in hits], scores, atol=1e-5)
            assert modality is None or {hit.modality for hit in hits} == {modality}
        assert found.search(query, 10, "fundus") == []  # nothing is sent there
        with pytest.raises(ValueError, match="no modality pet"):
            found.search(query, 10, "pet")


def test_probing_all_inverted_lists_finds_the_same(tmp_path, embeddings, large):
    images, reports, modalities = embeddings
    write_embeddings(tmp_path / "out", images, reports, modalities, processes=2)
    found = EmbeddingIndex(tmp_path / "out")
    assert len(list((tmp_path / "out" / "index" / "images").glob("segment-*"))) == 3
    for query in unit(np.random.default_rng(1).standard_normal((20, SIZE))).astype(np.float32):
        for modality, mask in ((None, None), ("mri", modalities == 2)):
            expected, scores = brute_force(query, images, 10, mask)
            hits = found.search(query, 10, modality)
            assert [hit.row for hit in hits] == expected
            np.testing.assert_allclose([hit.score for hit in hits], scores, atol=1e-5)


def test_a_few_lists_find_copies_and_all_of_a_rare_modality(tmp_path, embeddings, large, monkeypatch):
    monkeypatch.setattr(index, "PROBES", 1)
    images, reports, modalities = embeddings
    images[333] = images[44]
    write_embeddings(tmp_path / "out", images, reports, modalities)
    found = EmbeddingIndex(tmp_path / "out")
    assert {hit.row for hit in found.search(images[44].astype(np.float32), 2)} == {44, 333}
    hits = found.search(images[0].astype(np.float32), 10, "histopathology")
    assert {hit.row for hit in hits} == {5, 600}


def test_an_index_is_kept_and_rebuilt_for_other_shards(tmp_path, embeddings, monkeypatch):
    images, reports, modalities = embeddings
    write_embeddings(tmp_path / "out", images, reports, modalities)
    EmbeddingIndex(tmp_path / "out")
    monkeypatch.setattr(index, "_build", None)  # a second time nothing is built
    query = reports[3].astype(np.float32)
    with pytest.raises(TypeError):
        EmbeddingIndex(tmp_path / "out", "reports")
    assert EmbeddingIndex(tmp_path / "out").search(images[7].astype(np.float32), 1)[0].row == 7
    monkeypatch.undo()
    kept = tmp_path / "kept"
    shutil.move(tmp_path / "out", kept)  # an index does not care where its folder is
    assert EmbeddingIndex(kept).search(images[7].astype(np.float32), 1)[0].row == 7
    write_embeddings(tmp_path / "out", images[:300], reports[:300], modalities)
    shutil.move(kept / "index", tmp_path / "out" / "index")
    assert len(EmbeddingIndex(tmp_path / "out")) == 300
    assert EmbeddingIndex(tmp_path / "out", "reports").search(query, 1)[0].row == 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory, model):
    """120 phantoms, and a copy of the image of one and of the report of another."""
    folder = tmp_path_factory.mktemp("planted")
    write_webdataset(folder, shards=2, samples_per_shard=60, image_size=64)
    image, report, other = (phantom_sample(0, number, image_size=64) for number in (70, 20, 5000))
    words = "a report like no other"
    copies = [("image", png(image["image"]), words), ("report", png(other["image"]), report["caption"])]
    add_samples(folder / "planted.tar", copies)
    files = [str(folder / "phantom-*.tar"), str(folder / "planted.tar")]
    source = WebDatasetSource(kind="webdataset", files=files, name="mine")
    encode_sources([source], folder / "out", model, samples_per_shard=50, keep_captions=True)
    image["image"].save(folder / "query.png")
    return folder, report["caption"]


def test_planted_copies_are_found(planted, model):
    folder, caption = planted
    first, second = search(folder / "out", image=folder / "query.png", k=2)
    assert {first.key, second.key} == {f"{folder}/phantom-000001.tar/000000070", f"{folder}/planted.tar/image"}
    assert first.score == pytest.approx(1, abs=2e-3)
    assert second.score == pytest.approx(first.score, abs=1e-6)
    assert "a report like no other" in {first.caption, second.caption}
    hits = search(folder / "out", text=caption, among="reports", k=120)
    copies = {hit.key for hit in hits if hit.caption == caption}
    assert {f"{folder}/phantom-000000.tar/000000020", f"{folder}/planted.tar/report"} <= copies
    assert {hit.key for hit in hits[: len(copies)]} == copies
    # across: the order of the model's own similarity
    hits = search(folder / "out", text=caption, k=122)
    loaded, processor = MedMoEModel.from_pretrained(model).eval(), MedMoEProcessor.from_pretrained(model)
    index = EmbeddingIndex(folder / "out")
    assert len(hits) == len(index) == 122
    embeds = loaded.get_text_features(**processor(text=[caption], return_tensors="pt")).pooler_output[0]
    query = (embeds / embeds.norm()).detach().numpy()
    tables = [pyarrow.parquet.read_table(path) for path in sorted((folder / "out").glob("*.parquet"))]
    table = pyarrow.concat_tables([table.replace_schema_metadata() for table in tables])
    scores = np.stack(table["image_embeds"].to_numpy()).astype(np.float32) @ query
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores)[::-1], atol=1e-5)


def test_the_routed_modality_is_a_filter_by_any_of_its_names(planted):
    folder, caption = planted
    everything = search(folder / "out", text=caption, k=122)
    routed = {hit.modality for hit in everything}
    assert len(routed) > 1
    for modality in routed:
        hits = search(folder / "out", text=caption, k=122, modality=modality.upper())
        assert hits == [hit for hit in everything if hit.modality == modality]
    xray = search(folder / "out", text=caption, k=122, modality="xray")
    assert search(folder / "out", text=caption, k=122, modality="cxr") == xray
    with pytest.raises(ValueError, match="Unknown modality 'pet'"):
        search(folder / "out", text=caption, modality="pet")
    for unknown in ("", "-100"):
        with pytest.raises(ArgumentError, match="names no expert; known: xray, ct"):
            search(folder / "out", text=caption, modality=unknown)


def test_folders_that_cannot_be_searched_say_why(planted, model, tmp_path):
    folder, _ = planted
    for text, image in ((None, None), ("a", "b.png")):
        with pytest.raises(ValueError, match="either a text or an image"):
            search(folder / "out", text, image)
    with pytest.raises(EncodeError, match="contains no embeddings"):
        search(tmp_path, "effusion")
    half = tmp_path / "half"
    shutil.copytree(folder / "out", half)
    sorted(half.glob("*.parquet"))[-1].unlink()
    with pytest.raises(EncodeError, match="not finished: 1 of 1 processes"):
        search(half, "effusion")
    for path in half.glob("*.parquet"):
        path.unlink()
    with pytest.raises(EncodeError, match="not finished"):
        search(half, "effusion")
    broken = add_samples(tmp_path / "broken.tar", [("0", b"no image", "effusion")])
    sources = [
        WebDatasetSource(kind="webdataset", files=[str(broken)]),
        PhantomSource(kind="phantom", image_size=64, length=1),
    ]
    encode_sources(sources, tmp_path / "one", model, max_bad_fraction=1)
    assert len(search(tmp_path / "one", "effusion")) == 1
    write_embeddings(tmp_path / "none", np.zeros((0, SIZE)), np.zeros((0, SIZE)), [])
    with pytest.raises(EncodeError, match="is empty"):
        search(tmp_path / "none", "effusion")
    other = model_folder(tmp_path / "other", seed=1)
    with pytest.raises(EncodeError, match="another model"):
        search(folder / "out", "effusion", model=other)
    with pytest.raises(OSError, match=r"none\.png"):
        search(folder / "out", image=tmp_path / "none.png")


@pytest.fixture
def copied(planted, tmp_path):
    shutil.copytree(planted[0] / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "index", ignore_errors=True)
    return tmp_path / "out"


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


def test_a_damaged_shard_is_named_when_an_index_is_built(copied):
    path = sorted(copied.glob("*.parquet"))[1]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(EncodeError, match=f"{path.name} is damaged: it has {len(content) // 2} bytes"):
        EmbeddingIndex(copied)
    path.write_bytes(content)
    for position in (len(content) // 4, len(content) // 2, len(content) - 100):
        flip(path, position)
        with pytest.raises(EncodeError, match=f"{path.name} is damaged"):
            EmbeddingIndex(copied)
        path.write_bytes(content)
    assert len(EmbeddingIndex(copied)) == 122


def test_a_shard_that_is_damaged_later_is_named_by_the_search_that_reads_it(copied):
    found = EmbeddingIndex(copied)
    hit = found.search(np.eye(found._segments[0].d, dtype=np.float32)[0], 1)[0]
    path = next(path for path in sorted(copied.glob("*.parquet")) if hit.key.encode() in path.read_bytes())
    group = pyarrow.parquet.read_metadata(path).row_group(0)
    (keys,) = (
        group.column(number) for number in range(group.num_columns) if group.column(number).path_in_schema == "key"
    )
    flip(path, keys.data_page_offset + keys.total_compressed_size // 2)
    again = EmbeddingIndex(copied)
    with pytest.raises(EncodeError, match=f"{path.name} is damaged"):
        again.search(np.eye(found._segments[0].d, dtype=np.float32)[0], 1)


def test_a_truncated_index_and_one_of_other_embeddings_are_rebuilt(copied, planted, model, tmp_path):
    query = np.eye(EmbeddingIndex(copied)._segments[0].d, dtype=np.float32)[0]
    expected = EmbeddingIndex(copied).search(query, 5)
    (segment,) = (copied / "index" / "images").glob("segment-*")
    segment.write_bytes(segment.read_bytes()[:-1000])
    assert EmbeddingIndex(copied).search(query, 5) == expected
    # Other pairs in as many shards with the same names and sizes: only their checksums differ.
    source = PhantomSource(kind="phantom", seed=9, image_size=64, length=122)
    encode_sources([source], tmp_path / "other", model, samples_per_shard=50, keep_captions=True)
    right = EmbeddingIndex(tmp_path / "other").search(query, 5)
    shutil.rmtree(tmp_path / "other" / "index")
    shutil.copytree(copied / "index", tmp_path / "other" / "index")
    assert EmbeddingIndex(tmp_path / "other").search(query, 5) == right


def test_a_folder_of_an_earlier_version_is_searched(copied):
    expected = EmbeddingIndex(copied).search(np.eye(64, dtype=np.float32)[0][: EmbeddingIndex(copied)._segments[0].d])
    manifest = json.loads((copied / "encoding.json").read_text())
    (copied / "encoding.json").write_text(json.dumps({**manifest, "format": 1}))
    (copied / "shards-00000-of-00001.json").unlink()
    shutil.rmtree(copied / "index")
    found = EmbeddingIndex(copied)
    assert found.search(np.eye(64, dtype=np.float32)[0][: found._segments[0].d]) == expected
    path = sorted(copied.glob("*.parquet"))[0]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(EncodeError, match=f"{path.name} is damaged"):
        EmbeddingIndex(copied)


@pytest.fixture(scope="module")
def several_reports(tmp_path_factory, model):
    """Three images, the first of them with three reports; without captions."""
    folder = tmp_path_factory.mktemp("several")
    rows = ["path,report"]
    for number, times in ((0, 3), (1, 1), (2, 1)):
        phantom_sample(0, number, image_size=64)["image"].save(folder / f"{number}.png")
        rows += [f"{number}.png,report {number} {time}" for time in range(times)]
    (folder / "reports.csv").write_text("\n".join(rows) + "\n")
    source = TableSource(kind="csv", files=[str(folder / "reports.csv")], name=str(folder))
    encode_sources([source], folder / "out", model)
    return folder


@pytest.mark.parametrize("among", ["images", "reports"])
def test_an_image_with_several_reports_is_found_once_by_its_nearest(several_reports, among):
    folder = several_reports
    pairs = EmbeddingIndex(folder / "out", among)
    assert len(pairs) == 5
    hits = search(folder / "out", image=folder / "0.png", among=among, k=2)
    assert len({hit.key for hit in hits}) == 2
    hits = search(folder / "out", image=folder / "0.png", among=among, k=5)
    assert {hit.key for hit in hits} == {str(folder / f"{number}.png") for number in range(3)}
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    if among == "reports":
        table = pyarrow.parquet.read_table(sorted((folder / "out").glob("*.parquet"))[0])
        query = np.stack(table["image_embeds"].to_numpy())[0].astype(np.float32)
        scores = np.stack(table["text_embeds"].to_numpy()).astype(np.float32) @ query
        (first,) = (hit for hit in hits if hit.key.endswith("0.png"))
        assert first.score == pytest.approx(scores[:3].max(), abs=1e-3)
        assert scores[:3].max() - scores[:3].min() > 2e-3


def test_output_of_the_command(several_reports, planted):
    folder = several_reports
    arguments = ["search", str(folder / "out"), "--image", str(folder / "0.png")]
    result = CliRunner().invoke(app, [*arguments, "--k", "2"])
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["cosine", "routed", "to", "image"]
    assert len(lines) == 2
    assert lines[0].endswith(f"  {folder}/0.png")
    assert lines[0].startswith("1.000  ")
    assert "--keep-captions" not in result.stdout
    result = CliRunner().invoke(app, [*arguments, "-k", "2", "--among", "reports"])
    assert "--keep-captions" in result.stdout

    folder, caption = planted
    result = CliRunner().invoke(app, ["search", str(folder / "out"), "--text", caption, "--among", "reports"])
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["cosine", "routed", "to", "source", "image", "report"]
    assert len(lines) == 10
    assert lines[0].endswith(f"  {caption}")
    assert "  mine    " in lines[0]
    assert len({line.index("mine") for line in lines} | {header.index("source")}) == 1
    assert "--keep-captions" not in result.stdout


def test_rows_of_a_file_that_contains_images_are_distinguished(planted):
    hits = [Hit(0.5, "a.parquet", "a.parquet", row, "a.parquet", "ct", 0.9) for row in (3, 17)]
    assert [hit.location for hit in hits] == ["a.parquet, row 4", "a.parquet, row 18"]
    assert hits_table(hits, "images").splitlines() == [
        "cosine  routed to  image",
        "0.500   ct (0.90)  a.parquet, row 4",
        "0.500   ct (0.90)  a.parquet, row 18",
    ]


def test_without_faiss_it_says_what_to_install(planted, monkeypatch):
    monkeypatch.setattr(index, "faiss", None)
    with pytest.raises(ImportError, match=r"medmoe_hf\[search\]"):
        EmbeddingIndex(planted[0] / "out")
