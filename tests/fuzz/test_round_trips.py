"""What is written is read again unchanged: configurations, tasks, processors, shards and tables."""

import csv
import io
import json
import string
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from medmoe_hf.data.shards import ParquetShard, TarShard  # noqa: E402
from medmoe_hf.data.tables import read_table  # noqa: E402
from medmoe_hf.model import MedMoEConfig, MedMoEImageProcessor, MedMoEProcessor, MedMoETokenizer  # noqa: E402
from medmoe_hf.model.tasks_medmoe import Calibration, Task, read_tasks, write_tasks  # noqa: E402
from medmoe_hf.training.config import TrainConfig  # noqa: E402


def few(count):
    """A few examples, always the same ones; a failing one is not made smaller, which can take minutes."""
    phases = (Phase.explicit, Phase.generate)
    return settings(derandomize=True, database=None, deadline=None, max_examples=count, phases=phases)


# No half of a surrogate pair, which no encoding writes.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAME = st.text(string.ascii_lowercase, min_size=1, max_size=6)
NUMBER = st.floats(-1e6, 1e6, allow_nan=False)
SHARE = st.floats(0.001, 0.999)


@few(25)
@given(
    temps=st.tuples(*[st.floats(0.01, 100)] * 3),
    pooling=st.sampled_from(["sum", "mean"]),
    projection=st.integers(1, 64),
    layers=st.integers(1, 4),
    side=st.sampled_from([32, 64, 96]),
)
def test_model_configurations(temps, pooling, projection, layers, side):
    made = MedMoEConfig.from_preset(
        "tiny",
        **dict(zip(("temp1", "temp2", "temp3"), temps, strict=True)),
        word_pooling=pooling,
        projection_dim=projection,
        text_config={"num_hidden_layers": layers},
        num_summed_layers=1,
        vision_config={"image_size": side},
    )
    read = MedMoEConfig.from_dict(json.loads(made.to_json_string()))
    assert read.to_dict() == made.to_dict()
    assert (read.temp1, read.temp2, read.temp3) == temps
    assert (read.projection_dim, read.vision_config.image_size) == (projection, side)


@few(25)
@given(
    steps=st.integers(1, 10**6),
    rate=st.floats(1e-9, 1.0),
    seed=st.integers(0, 2**31),
    freeze=st.lists(st.sampled_from(["text_model", "vision_model.backbone"]), unique=True),
    caption=NAME,
    share=st.one_of(st.none(), st.floats(0.01, 0.5)),
)
def test_training_configurations(tmp_path_factory, steps, rate, seed, freeze, caption, share):
    path = tmp_path_factory.mktemp("run") / "run.yaml"
    data = {"train": [{"kind": "csv", "files": ["a.csv"], "caption": caption}], "validation_share": share}
    content = {"output_dir": "out", "model": {"preset": "tiny"}, "data": data, "max_steps": steps, "seed": seed}
    if share is None:
        del data["validation_share"]
    made = TrainConfig.from_dict({**content, "learning_rate": rate, "freeze": freeze})
    path.write_text(yaml.safe_dump(made.model_dump(mode="json")), encoding="utf-8")
    read = TrainConfig.from_yaml(path)
    assert read == made
    assert (read.max_steps, read.learning_rate, read.seed, read.freeze) == (steps, rate, seed, freeze)


@st.composite
def tasks(draw):
    classes = draw(st.lists(NAME, min_size=2, max_size=4, unique=True))
    sentence = TEXT.filter(lambda text: text.strip())
    prompts = {name: draw(st.lists(sentence, min_size=1, max_size=2)) for name in classes}
    multi = draw(st.booleans())
    absences = {name: draw(st.lists(sentence, min_size=1, max_size=2)) for name in classes} if multi else {}

    def per_class(values):
        return {name: draw(values) for name in classes}

    calibration = Calibration(
        draw(st.floats(0.01, 100)),
        per_class(NUMBER),
        per_class(SHARE),
        per_class(NUMBER),
        draw(SHARE),
        draw(st.sampled_from(["marginal", "class-conditional"])),
        per_class(SHARE),
        # Of classes that exclude each other, shares sum to 1.
        draw(st.sampled_from([{}, dict.fromkeys(classes, 1 / len(classes))])),
        {"data": draw(TEXT)},
        {"auroc": draw(st.lists(SHARE, min_size=3, max_size=3))},
    )
    tokens = {one: {"input_ids": [2, 5, 3], "word_ids": [-1, 0, -1]} for one in next(iter(prompts.values()))}
    return Task(
        draw(NAME),
        prompts,
        absences,
        "multi-label" if multi else "multi-class",
        draw(st.sampled_from(["global", "local", "mean"])),
        draw(st.sampled_from([None, "ct"])),
        draw(TEXT),
        tokens,
        draw(st.sampled_from([None, calibration])),
    )


@few(40)
@given(task=tasks())
def test_tasks(tmp_path_factory, task):
    path = tmp_path_factory.mktemp("tasks") / "tasks.json"
    write_tasks(path, {task.name: task})
    read = read_tasks(path)
    assert read == {task.name: task}
    scores = torch.linspace(-1, 1, len(task.classes), dtype=torch.float64)[None]
    assert torch.equal(read[task.name].probabilities(scores), task.probabilities(scores))


@few(4)
@given(
    words=st.lists(st.text(string.ascii_letters, min_size=1, max_size=8), max_size=5),
    length=st.integers(4, 30),
    side=st.sampled_from([32, 40]),
    text=TEXT,
)
def test_processors(tmp_path_factory, words, length, side, text):
    folder = tmp_path_factory.mktemp("processor")
    tokenizer = MedMoETokenizer.from_words(words, max_length=length)
    made = MedMoEProcessor(MedMoEImageProcessor(size={"height": side, "width": side}), tokenizer)
    made.save_pretrained(folder)
    read = MedMoEProcessor.from_pretrained(folder)
    image = np.arange(30 * 20, dtype=np.uint16).reshape(30, 20)
    before, after = (one(images=image, text=[text, "no"], return_tensors="pt") for one in (made, read))
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert after["pixel_values"].shape == (1, 3, side, side)


SAMPLE = st.dictionaries(st.sampled_from(["png", "txt", "cls"]), st.binary(max_size=40), min_size=1)


@few(40)
@given(
    samples=st.lists(SAMPLE, max_size=6),
    kind=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_tars(tmp_path_factory, samples, kind):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with tarfile.open(path, "w", format=kind) as archive:
        for index, sample in enumerate(samples):
            for extension, content in sample.items():
                member = tarfile.TarInfo(f"{index:04d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    shard = TarShard(str(path))
    read = [shard.read(shard.locate(row)) for row in range(len(shard))]
    assert read == [{"__key__": f"{index:04d}", **sample} for index, sample in enumerate(samples)]
    assert not shard.truncated


@few(25)
@given(
    rows=st.lists(st.fixed_dictionaries({"caption": st.one_of(st.none(), TEXT), "image": st.binary(max_size=20)})),
    group=st.integers(1, 4),
)
def test_parquet(tmp_path_factory, rows, group):
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    schema = pyarrow.schema({"caption": pyarrow.string(), "image": pyarrow.binary()})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, row_group_size=group)
    shard = ParquetShard(str(path))
    assert [shard.read(shard.locate(row)) for row in range(len(shard))] == rows
    assert shard.peek(range(len(rows)), ["caption"]) == [{"caption": row["caption"]} for row in rows]


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=10)


@few(60)
@given(
    rows=st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=5),
    delimiter=st.sampled_from(",;\t|"),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_csv(tmp_path_factory, rows, delimiter, encoding):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([("path", "report", "label"), *rows])
    wanted = [dict(zip(("path", "report", "label"), row, strict=True)) for row in rows]
    assert read_table(str(path), delimiter=delimiter, keep_faulty=True) == wanted


VALUES = st.none() | TEXT | st.booleans() | st.integers(-(10**12), 10**12) | NUMBER | st.lists(TEXT, max_size=2)


@few(25)
@given(rows=st.lists(st.dictionaries(TEXT, VALUES, max_size=3), max_size=4), ascii_only=st.booleans())
def test_jsonl(tmp_path_factory, rows, ascii_only):
    path = Path(tmp_path_factory.mktemp("jsonl") / "a.jsonl")
    path.write_text("\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows), "utf-8", newline="")
    assert read_table(str(path)) == rows
