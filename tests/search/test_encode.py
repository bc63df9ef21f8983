"""Bulk encoding: the shards, and that interruptions and several processes cause neither gaps nor duplicates."""

import hashlib
import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pyarrow.parquet
import pytest
import torch
from encoding_process import (
    PLACE,
    alone,
    encode_all,
    launched,
    model_folder,
    sources_of,
    table_of,
    write_sources,
)
from PIL import Image
from processes import context, free_port, launch

from medmoe_hf import MedMoEModel, MedMoEProcessor
from medmoe_hf.data import phantom_sample, write_webdataset
from medmoe_hf.data.shards import TarShard
from medmoe_hf.data.sources import PhantomSource, TableSource, WebDatasetSource
from medmoe_hf.errors import EncodeError, StreamError
from medmoe_hf.inference.texts import encode_texts
from medmoe_hf.search import encode_sources
from medmoe_hf.search.encode import _LocatedStream
from medmoe_hf.search.shards import ShardWriter
from medmoe_hf.training import build_model
from medmoe_hf.training.config import ModelSection

GOOD, BAD = 93, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_sources(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(data, model, tmp_path_factory):
    """A run without interruptions."""
    out = tmp_path_factory.mktemp("whole") / "out"
    record = encode_all(data, out, model)
    assert (record.samples, record.total) == (GOOD, GOOD)
    return out


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_each_row_is_what_the_model_computes_for_the_sample_at_its_location(data, model, tmp_path, dtype):
    encode_all(data, tmp_path / "out", model, dtype=dtype, keep_captions=True)
    rows = table_of(tmp_path / "out").to_pylist()
    assert len(rows) == len({row["position"] for row in rows}) == GOOD
    loaded, processor = MedMoEModel.from_pretrained(model).eval(), MedMoEProcessor.from_pretrained(model)
    bound = 1e-5 if dtype == "float32" else 5e-4  # half the distance of neighbouring 16-bit numbers below 1
    for row in rows[::7]:
        shard = TarShard(row["shard"])
        sample = shard.read(shard.locate(row["row"]))
        assert row["key"] == f"{shard.name}/{sample['__key__']}"
        assert row["caption"] == sample["txt"].decode()
        (tmp_path / "image.png").write_bytes(sample["png"])
        inputs = processor(images=[Image.open(tmp_path / "image.png")], text=[row["caption"]], return_tensors="pt")
        with torch.no_grad():
            output = loaded(**inputs, modality=loaded.route(pixel_values=inputs["pixel_values"]).modality)
            routed = loaded.route(pixel_values=inputs["pixel_values"])
        assert row["modality"] == routed.modality[0]
        assert row["probability"] == pytest.approx(routed.probabilities.max().item(), abs=1e-5)
        np.testing.assert_allclose(row["image_embeds"], output.image_embeds[0], atol=bound)
        np.testing.assert_allclose(row["text_embeds"], output.text_embeds[0], atol=bound)


def test_broken_samples_are_skipped_and_counted(data, model, tmp_path):
    with pytest.raises(StreamError, match="2 of 95 samples are faulty"):
        encode_all(data, tmp_path / "out", model, max_bad_fraction=0.01)
    record = encode_all(data, tmp_path / "out", model)  # what was written stays, and is gone on with
    assert record.samples < record.total == GOOD
    assert record.skipped == {"worse: unreadable image": BAD}
    assert "2 worse: unreadable image" in str(record)


class Stop(Exception):
    pass


def stopping(monkeypatch, owner, name, calls):
    """Makes a method fail at one of its calls."""
    method, counted = getattr(owner, name), [0]

    def replacement(self, *arguments):
        counted[0] += 1
        if counted[0] == calls:
            raise Stop
        return method(self, *arguments)

    monkeypatch.setattr(owner, name, replacement)


@pytest.mark.parametrize("seed", range(3))
def test_two_interruptions_do_not_change_the_shards(data, model, whole, tmp_path, monkeypatch, seed):
    rng, out = random.Random(seed), tmp_path / "out"
    for _ in range(2):
        with monkeypatch.context() as patch:
            if rng.random() < 0.5:
                stopping(patch, _LocatedStream, "location", rng.randint(1, 40))  # somewhere in a shard
            else:
                stopping(patch, ShardWriter, "write", rng.randint(1, 4))  # between two
            with pytest.raises(Stop):
                encode_all(data, out, model, num_workers=seed % 2)
    left = out / ".embeds-00000-of-00001-000001.parquet.partial"
    left.write_bytes(b"half")
    record = encode_all(data, out, model)
    assert record.total == GOOD
    assert record.skipped == {"worse: unreadable image": BAD}
    assert table_of(out).equals(table_of(whole))
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    again = encode_all(data, out, model)  # and there is nothing more to do
    assert (again.samples, again.total, again.skipped) == (0, GOOD, record.skipped)
    assert str(again).startswith(f"Nothing left to encode: the folder contains {GOOD} pairs.")


@pytest.mark.parametrize("samples", [GOOD, 31])
def test_a_run_may_end_at_the_end_of_a_shard(data, model, tmp_path, samples):
    source = PhantomSource(kind="phantom", image_size=64, length=samples)
    encode_sources([source], tmp_path / "out", model, samples_per_shard=samples)
    shards = sorted((tmp_path / "out").glob("*.parquet"))
    assert [pyarrow.parquet.read_metadata(path).num_rows for path in shards] == [samples, 0]
    assert encode_sources([source], tmp_path / "out", model, samples_per_shard=samples).samples == 0


@pytest.mark.slow
def test_two_kills_do_not_change_the_shards(data, model, whole, tmp_path):
    rng, out = random.Random(int.from_bytes(os.urandom(4), "big")), tmp_path / "out"
    for _ in range(2):
        before = len(list(out.glob("embeds-*")))
        process = context.Process(target=alone, args=(0, data, out, model))
        process.start()
        while len(list(out.glob("embeds-*"))) == before and process.is_alive():
            time.sleep(0.001)
        time.sleep(0.05 * rng.random())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    launch(alone, data, out, model, count=1)
    assert table_of(out).equals(table_of(whole))


@pytest.mark.slow
def test_two_processes_write_what_one_does(data, model, whole, tmp_path):
    launch(launched, 2, free_port(), data, tmp_path / "out", model, count=2)
    one, two = table_of(whole), table_of(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("embeds-00001-of-00002-*"))) > 3
    assert two.select(PLACE).equals(one.select(PLACE))
    for column in ("image_embeds", "text_embeds"):
        # other batches: the sums are added up in another order
        np.testing.assert_allclose(np.stack(two[column].to_numpy()), np.stack(one[column].to_numpy()), atol=5e-4)
    with pytest.raises(EncodeError, match="processes: 2 before, 1 now"):
        encode_all(data, tmp_path / "out", model)


def test_reports_are_not_written_by_default(whole, data):
    captions = {sample["caption"] for sample in _LocatedStream(sources_of(data))}
    written = b"".join(path.read_bytes() for path in whole.iterdir())
    assert b"xray" in written
    assert not any(caption.encode() in written for caption in captions)


def test_finished_source_shards_release_their_list_of_samples(data):
    stream = _LocatedStream(sources_of(data))
    for sample in stream:
        stream.location(sample)
    lists = [[vars(shard)["_samples"] is None for shard in shards] for shards in stream.shards]
    assert lists == [[True, True, False], [False]]


@pytest.mark.parametrize("preset", ["tiny", "official", "plus"])
def test_texts_in_a_batch_equal_single_texts(preset):
    torch.manual_seed(0)
    text = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    vision = {"image_size": 64, "local_size": 64, "expert_hidden_size": 8}
    overrides = {"text_config": text, "vision_config": vision}
    model, processor = build_model(ModelSection(preset=preset, overrides=overrides))
    model.eval()
    report = "chest radiograph with a large left pleural effusion and no other finding"
    texts = [report[:length] for length in (15, 60, 5, 47, 72, 15, 30, 20, 60)]
    together = encode_texts(model, processor, texts, batch_size=3)
    with torch.no_grad():
        alone = [
            model.get_text_features(**processor(text=[text], return_tensors="pt")).pooler_output for text in texts
        ]
    torch.testing.assert_close(together, torch.nn.functional.normalize(torch.cat(alone), dim=-1), atol=1e-5, rtol=0)


def test_a_batch_of_texts_is_padded_to_its_longest_text(model, monkeypatch):
    loaded, processor = MedMoEModel.from_pretrained(model).eval(), MedMoEProcessor.from_pretrained(model)
    shapes, features = [], loaded.get_text_features
    monkeypatch.setattr(
        loaded,
        "get_text_features",
        lambda **batch: shapes.append(tuple(batch["input_ids"].shape)) or features(**batch),
    )
    encode_texts(loaded, processor, ["effusion " * 20, "effusion", "effusion", "effusion", "a effusion"], batch_size=2)
    # equal texts once; two special tokens
    assert shapes == [(2, 4), (1, 22)]


def test_a_folder_of_other_settings_is_refused(data, model, whole, tmp_path):
    other = model_folder(tmp_path / "other", seed=1)
    with pytest.raises(EncodeError, match=r"fingerprint: [0-9a-f]{16} before, [0-9a-f]{16} now"):
        encode_all(data, whole, other)
    for changes in ({"dtype": "float32"}, {"samples_per_shard": 11}, {"keep_captions": True}):
        name = next(iter(changes))
        with pytest.raises(EncodeError, match=f"{name}: "):
            encode_all(data, whole, model, **changes)
    with pytest.raises(EncodeError, match="sources: "):
        encode_sources(sources_of(data)[:1], whole, model, samples_per_shard=10)
    with pytest.raises(EncodeError, match="not a folder of embeddings"):
        encode_all(data, data, model)
    with pytest.raises(EncodeError, match="`length`"):
        encode_sources([PhantomSource(kind="phantom")], tmp_path / "endless", model)


@pytest.fixture
def changing(tmp_path, model):
    """Tars behind a pattern, and their embeddings."""
    write_webdataset(tmp_path / "data", shards=3, samples_per_shard=4, image_size=64)
    source = WebDatasetSource(kind="webdataset", files=[f"{tmp_path}/data/*.tar"], name="mine")

    def encode():
        return encode_sources([source], tmp_path / "out", model, samples_per_shard=5)

    encode()
    return encode, sorted((tmp_path / "data").glob("*.tar"))


def test_changed_content_of_the_sources_is_refused_with_what_differs(changing, tmp_path):
    encode, tars = changing
    assert encode().samples == 0
    content, size = tars[1].read_bytes(), tars[1].stat().st_size
    tars[1].write_bytes(content + bytes(10240))
    with pytest.raises(EncodeError, match=rf"{tars[1].name} has changed: {size} bytes before, {size + 10240} now"):
        encode()
    tars[1].write_bytes(content[:600] + bytes([content[600] ^ 1]) + content[601:])
    with pytest.raises(EncodeError, match=rf"{tars[1].name} has changed: same size \({size} bytes\), other content"):
        encode()
    tars[1].rename(tmp_path / "aside")
    with pytest.raises(EncodeError, match=rf"mine: {tars[1].name} is missing\nUse the same"):
        encode()
    (tmp_path / "aside").rename(tars[1])
    tars[1].write_bytes(content)
    added = tars[0].with_name("another.tar")
    added.write_bytes(content)
    with pytest.raises(EncodeError, match=r"mine: another\.tar is new\nUse the same"):
        encode()
    added.unlink()
    assert encode().samples == 0


def test_a_table_with_a_new_row_is_refused(tmp_path, model):
    phantom_sample(0, 0, image_size=64)["image"].save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("path,report\n" + "a.png,normal\n" * 3)
    source = TableSource(kind="csv", files=[f"{tmp_path}/t.csv"])
    encode_sources([source], tmp_path / "out", model)
    with (tmp_path / "t.csv").open("a") as file:
        file.write("a.png,normal\n")
    with pytest.raises(EncodeError, match=r"t\.csv has changed: 51 bytes before, 64 now"):
        encode_sources([source], tmp_path / "out", model)


def test_shards_are_listed_with_their_sizes_and_checksums(whole):
    listed = json.loads((whole / "shards-00000-of-00001.json").read_text())
    shards = sorted(whole.glob("*.parquet"))
    assert listed == {
        path.name: [path.stat().st_size, hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()]
        for path in shards
    }
    assert len(shards) == 10


@pytest.mark.parametrize("number", [0, 2])
def test_a_changed_shard_is_named(changing, tmp_path, number):
    encode, _ = changing
    path = sorted((tmp_path / "out").glob("*.parquet"))[number]
    content = path.read_bytes()
    middle = len(content) // 2
    for damaged, reason in (
        (content[:-20], f"it has {len(content) - 20} bytes instead of {len(content)}"),
        (content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :], "its checksum differs"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(EncodeError, match=f"{path.name} is damaged: {reason}"):
            encode()
    path.write_bytes(content)
    assert encode().samples == 0
    shutil.copy(path, path.with_name("embeds-00000-of-00001-000003.parquet"))
    with pytest.raises(EncodeError, match=r"000003\.parquet is not listed in shards-00000-of-00001\.json"):
        encode()


def test_a_listed_shard_that_does_not_exist_is_encoded_again(data, model, whole, tmp_path, monkeypatch):
    out, replace = tmp_path / "out", os.replace

    def stop_at_the_third(source, target):
        if str(target).endswith("000002.parquet"):
            raise Stop
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_third)
        with pytest.raises(Stop):
            encode_all(data, out, model)
    assert len(json.loads((out / "shards-00000-of-00001.json").read_text())) == 3
    assert len(list(out.glob("*.parquet"))) == 2
    assert encode_all(data, out, model).total == GOOD
    assert table_of(out).equals(table_of(whole))
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())


def test_a_folder_of_an_earlier_version_is_not_resumed(changing, tmp_path):
    encode, _ = changing
    path = tmp_path / "out" / "encoding.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    with pytest.raises(EncodeError, match="format 1 instead of 2"):
        encode()


def test_a_moved_model_is_the_same(data, model, whole, tmp_path):
    MedMoEModel.from_pretrained(model).save_pretrained(tmp_path / "moved")
    MedMoEProcessor.from_pretrained(model).save_pretrained(tmp_path / "moved")
    assert encode_all(data, whole, tmp_path / "moved").samples == 0


def test_a_gap_and_a_damaged_shard_are_named(data, model, tmp_path):
    out = tmp_path / "out"
    encode_all(data, out, model)
    shards = sorted(out.glob("*.parquet"))
    content = shards[-1].read_bytes()
    shards[-1].write_bytes(content[:-20])
    with pytest.raises(EncodeError, match=f"{shards[-1].name} is damaged"):
        encode_all(data, out, model)
    shards[-1].write_bytes(content)
    shards[2].unlink()
    with pytest.raises(EncodeError, match=f"{shards[2].name} is missing"):
        encode_all(data, out, model)
    shutil.copy(shards[1], shards[2])
    (out / "shards-00000-of-00001.json").unlink()
    with pytest.raises(EncodeError, match=r"shards-00000-of-00001\.json is missing"):
        encode_all(data, out, model)
    (out / "encoding.json").write_text(json.dumps({})[:1])
    with pytest.raises(EncodeError, match=r"encoding\.json is damaged"):
        encode_all(data, out, model)
