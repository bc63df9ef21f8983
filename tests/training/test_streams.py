"""The streams of a run: sorted tables are mixed in training and in the held-out data, and captions are shortened."""

from collections import Counter
from types import SimpleNamespace

import pytest
from PIL import Image

from medmoe_hf.errors import ConfigError, SourceError
from medmoe_hf.training import TrainConfig
from medmoe_hf.training.preflight import unusable_source
from medmoe_hf.training.streams import held_out_stream, training_stream

COLLATOR = SimpleNamespace(prepare=None, side=None, shorten=lambda caption, rng: f"{caption[:3]}{rng.random():.3f}")


@pytest.fixture
def run(tmp_path):
    """Makes a configuration that reads one table, sorted by class, for training and held-out data."""
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    rows = [
        f"{'missing' if split == 'unused' else 'x'}.png,{split},{label}"
        for split, count in (("unused", 40), ("train", 90), ("val", 30))
        for label, part in (("common", 9), ("rare", 1))
        for _ in range(count * part // 10)
    ]
    (tmp_path / "t.csv").write_text("\n".join(["path,split,label", *rows]))
    table = {"kind": "csv", "files": [str(tmp_path / "t.csv")], "captions": ["a {label} case", "{label}"]}

    def make(seed=0, **data):
        train, evaluation = ({**table, "where": {"split": split}} for split in ("train", "val"))
        data = {"train": train, "evaluation": evaluation, "num_workers": 0} | data
        content = {"output_dir": "x", "model": {"preset": "tiny"}, "max_steps": 1, "seed": seed, "data": data}
        return TrainConfig.from_dict(content)

    return make


def test_held_out_pairs_are_a_random_sample_that_is_the_same_in_every_run(run):
    found = [
        [(sample["row"], sample["caption"]) for sample in held_out_stream(run(seed), COLLATOR)] for seed in (0, 1)
    ]
    assert found[0] == found[1]
    assert sorted(row for row, _ in found[0]) == list(range(130, 160))
    # The last three rows of the table are of the rare class.
    assert any(row >= 157 for row, _ in found[0][:20])
    assert {caption for _, caption in found[0]} == {"a common case", "a rare case"}


def test_training_pairs_are_balanced_and_their_captions_shortened(run):
    stream = training_stream(run(balance=["label"], balance_power=1), COLLATOR, 0, 1)
    samples = list(stream)
    assert Counter(sample["label"] for sample in samples) == {"common": 45, "rare": 45}
    assert len({sample["caption"] for sample in samples}) > 60
    cut = training_stream(run(long_captions="cut"), COLLATOR, 0, 1)
    assert {sample["caption"] for sample in cut} == {"a common case", "a rare case", "common", "rare"}


def test_only_selected_rows_are_tried_before_a_run(run):
    """The images of other rows may be missing."""
    assert unusable_source(training_stream(run(), COLLATOR, 0, 1)) is None
    train = run().data.train.model_dump() | {"where": {"split": "unused"}}
    assert "missing.png: missing image" in unusable_source(training_stream(run(train=train), COLLATOR, 0, 1))
    with pytest.raises(SourceError, match=r"Training data: .*leave none of the rows.*train \(90\)"):
        training_stream(run(train=train | {"where": {"split": "tset"}}), COLLATOR, 0, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"balance": ["label"], "balance_power": 2}, r"`balance_power` must be in 0\.\.1, got 2"),
        ({"balance": ["label"], "shuffle_buffer": 0}, "raise `shuffle_buffer`"),
        ({"balance": ["label"], "mixing": "modality"}, "contradict each other"),
        ({"balance_power": {"label": 1}}, "`balance_power` requires `balance`"),
        ({"balance": []}, "at least 1"),
    ],
)
def test_settings_that_contradict_balance(run, data, message):
    with pytest.raises(ConfigError, match=message):
        run(**data)


def test_a_configuration_can_be_written_and_read_again(run):
    config = run(balance=["label"], balance_power={"label": 1})
    assert TrainConfig.from_dict(config.model_dump(mode="json")) == config
