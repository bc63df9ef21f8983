"""Balanced sampling: shares against a plain calculation, draws against shares, and one order for all readers."""

import csv
import io
import json
import tarfile
from collections import Counter
from fractions import Fraction

import datasets
import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from medmoe_hf.data.balancing import BalancedRows, group_shares
from medmoe_hf.data.sources import Source
from medmoe_hf.data.split import Split
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import ArgumentError, SourceError, StreamError

SIZES = {
    ("ct", "a", "nodule"): 70,
    ("ct", "a", "normal"): 5,
    ("ct", "b", "nodule"): 12,
    ("ultrasound", "c", "cyst"): 30,
    ("ultrasound", "c", ""): 2,
    ("ultrasound", "d", "cyst"): 1,
}
KEYS = ["modality", "source", "label"]


def plain_shares(sizes, power):
    """The share of each group, multiplied along its path, from the definition."""
    shares = {}
    for group in sizes:
        share = 1.0
        for level in range(3):
            siblings = {other[: level + 1] for other in sizes if other[:level] == group[:level]}
            size = {
                one: sum(n for other, n in sizes.items() if other[: level + 1] == one) ** (1 - power)
                for one in siblings
            }
            share *= size[group[: level + 1]] / sum(size.values())
        shares[group] = share
    return shares


@pytest.mark.parametrize("power", [0.0, 0.3, 0.5, 1.0])
def test_shares_are_those_of_a_plain_calculation(power):
    found = group_shares(SIZES, [power] * 3)
    assert found == pytest.approx(plain_shares(SIZES, power))
    assert sum(found.values()) == pytest.approx(1)
    if power == 0:
        assert found == pytest.approx({group: n / 120 for group, n in SIZES.items()})
    if power == 1:
        assert found["ultrasound", "d", "cyst"] == pytest.approx(1 / 4)


def test_powers_may_differ_and_weights_count_on_their_levels_only():
    sizes = {("ct", "0"): 90, ("ct", "1"): 10, ("us", "2"): 300}
    found = group_shares(sizes, [1.0, 0.0], {("ct", "0"): 1.0, ("ct", "1"): 9.0, ("us", "2"): 5.0}, weighted=[1])
    assert found == pytest.approx({("ct", "0"): 0.25, ("ct", "1"): 0.25, ("us", "2"): 0.5})


def test_draws_have_the_shares_and_use_all_rows_of_a_group_equally_often():
    starts = np.cumsum([0, *SIZES.values()])
    rows = {group: np.arange(starts[i], starts[i + 1]) for i, group in enumerate(SIZES)}
    shares = group_shares(SIZES, [0.5, 0.5, 0.5])
    balanced = BalancedRows(tuple(KEYS), rows, shares)
    orders = [balanced.order(3, epoch) for epoch in range(40)]
    drawn = np.concatenate(orders)
    assert len(drawn) == pytest.approx(40 * 120, abs=len(SIZES))
    for group, own in rows.items():
        # Not only on average: at most one draw more or less, in each epoch and over all.
        assert abs(np.isin(drawn, own).sum() - 40 * 120 * shares[group]) <= 1
        assert all(abs(np.isin(order, own).sum() - 120 * shares[group]) <= 1 for order in orders)
        for stop in (50, 500, len(drawn)):
            counts = np.bincount(drawn[:stop], minlength=120)[own]
            assert counts.max() - counts.min() <= 1
    # Draws are spread over the epoch, as in no sorted or repeated list.
    assert not np.array_equal(orders[0], orders[1])
    of_ct = np.isin(drawn, np.arange(87))
    share = sum(value for group, value in shares.items() if group[0] == "ct")
    windows = [of_ct[start : start + 60].mean() for start in range(0, len(drawn) - 60, 60)]
    assert max(abs(window - share) for window in windows) < 0.12
    # The groups are small or large in every part of an epoch, also in the first draws.
    first = np.concatenate([order[:20] for order in orders])
    assert all(abs(np.isin(first, own).mean() - shares[group]) < 0.03 for group, own in rows.items())
    assert np.array_equal(balanced.order(3, 7), orders[7])
    assert not np.array_equal(balanced.order(4, 0), orders[0])


# In a stream


def picture():
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def table():
    """Rows in the order of their groups."""
    rows = []
    for (modality, origin, label), count in SIZES.items():
        for _ in range(count):
            number = len(rows)
            rows.append(
                {
                    "path": "x.png",
                    "kind": modality,
                    "source": origin,
                    "label": label,
                    "caption": f"{number}",
                    "patient": f"p{number // 2}",
                }
            )
    return rows


def write(folder, rows, kind="csv", name="t", **fields):
    (folder / "x.png").write_bytes(picture())
    path = folder / f"{name}.{kind}"
    if kind == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        datasets.Dataset.from_list([row | {"path": str(folder / "x.png")} for row in rows]).to_parquet(path)
    else:
        with tarfile.open(path, "w") as archive:
            for number, row in enumerate(rows):
                for extension, content in {**row, "png": picture()}.items():
                    if extension != "path":
                        member = tarfile.TarInfo(f"{number:05d}.{extension}")
                        content = content if isinstance(content, bytes) else content.encode()
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
    image = {} if kind == "tar" else {"image": "path"}
    return TypeAdapter(Source).validate_python(
        {"kind": "webdataset" if kind == "tar" else kind, "files": [str(path)], "modality": "field:kind"}
        | image
        | fields
    )


def group_of(number):
    return next(group for group, end in zip(SIZES, np.cumsum(list(SIZES.values())), strict=True) if number < end)


@pytest.mark.parametrize("kind", ["csv", "parquet", "tar"])
def test_a_sorted_source_is_drawn_in_a_balanced_way(tmp_path, kind):
    stream = SampleStream([write(tmp_path, table(), kind)], balance=KEYS, balance_power=0.7)
    expected = plain_shares({tuple(group): n for group, n in SIZES.items()}, 0.7)
    drawn = Counter(group_of(int(sample["caption"])) for _ in range(10) for sample in stream)
    assert stream.epoch == 10
    for group, share in expected.items():
        assert abs(drawn[group] - 1200 * share) <= 1
    assert stream.faults.bad == 0
    found = {group[:-1]: share for group, share in stream.balanced_rows.shares.items()}
    assert found == pytest.approx(expected)


def test_two_sources_share_groups_and_are_weighted_within_them(tmp_path):
    rows = table()
    sources = [
        write(tmp_path, rows[:75], name="one", weight=1),
        write(tmp_path, rows[:25], name="two", weight=3),
        write(tmp_path, rows[87:], name="us", weight=50),
    ]
    stream = SampleStream(sources, balance=["modality"], balance_power=1)
    counts = Counter(sample["source"] for _ in range(10) for sample in stream)
    # Half is CT, in which 75 rows of weight 1 equal 25 rows of weight 3.
    assert [counts[index] / counts.total() for index in range(3)] == pytest.approx([0.25, 0.25, 0.5], abs=0.002)
    unnamed = [{key: value for key, value in row.items() if key != "source"} for row in rows]
    sources = [
        write(tmp_path, unnamed[:75], name="one", weight=3),
        write(tmp_path, unnamed[87:], name="us"),
    ]
    # Without a field `source`, the source is the entry of the YAML file; there its weight counts.
    stream = SampleStream(sources, balance=["source"], balance_power=1)
    counts = Counter(sample["source"] for _ in range(10) for sample in stream)
    assert counts[0] / counts.total() == pytest.approx(0.75, abs=0.002)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_and_workers_read_parts_of_one_order(tmp_path, ranks, workers):
    made = write(tmp_path, table())

    def read(**options):
        stream = SampleStream([made], seed=5, balance=KEYS, **options)
        return [[sample["row"] for sample in stream] for _ in range(2)]

    alone = read()
    parts = [read(rank=rank, world_size=ranks, num_workers=workers) for rank in range(ranks)]
    for epoch in range(2):
        assert all(part[epoch] == alone[epoch][rank::ranks] for rank, part in enumerate(parts))


def test_an_interrupted_stream_continues_with_the_same_rows_and_captions(tmp_path):
    made = write(tmp_path, table(), caption=None, captions=["{kind} {caption}", "{label} {caption}", "{caption}"])
    made = made.model_copy(update={"synonyms": {"kind": {"ct": ["CT", "computed tomography"]}}})

    def stream():
        return SampleStream([made], seed=2, balance=KEYS)

    whole = stream()
    expected = [(sample["row"], sample["caption"]) for _ in range(3) for sample in whole]
    for stop in (1, 77, 119, 120, 121, 300):
        first, seen = stream(), []
        while len(seen) < stop:
            for sample in first:
                seen.append((sample["row"], sample["caption"]))
                if len(seen) == stop:
                    break
        state = json.loads(json.dumps(first.state_dict()))
        second = stream()
        second.load_state_dict(state)
        while len(seen) < len(expected):
            seen += [(sample["row"], sample["caption"]) for sample in second]
        assert seen[: len(expected)] == expected


def test_rows_of_the_other_part_of_the_split_have_no_share(tmp_path):
    made = write(tmp_path, table(), subject="patient")
    split = Split("train", 0.4)
    kept = [row for row in table() if split.contains(row, "patient", None)]
    stream = SampleStream([made], balance=KEYS, split=split)
    sizes = Counter((row["kind"], row["source"], row["label"]) for row in kept)
    expected = plain_shares(sizes, 0.5)
    assert {group[:-1]: share for group, share in stream.balanced_rows.shares.items()} == pytest.approx(expected)
    rows = [sample["row"] for sample in stream]
    assert len(rows) == pytest.approx(len(kept), abs=len(SIZES))
    assert {str(row) for row in rows} <= {row["caption"] for row in kept}


def test_faulty_rows_are_counted_but_not_drawn(tmp_path):
    made = write(tmp_path, table())
    path = tmp_path / "t.csv"
    path.write_text(path.read_text() + "x.png,ct,a,nodule,c,p,too,many\n")
    stream = SampleStream([made], balance=KEYS)
    for _ in range(2):
        assert all(sample["row"] < 120 for sample in stream)
    assert (stream.faults.bad, stream.faults.skipped) == (1, 1)


def test_any_field_and_other_labels(tmp_path):
    rows = [row | {"finding": row["label"], "label": "1"} for row in table()]
    made = write(tmp_path, rows, label="finding")
    stream = SampleStream([made], balance=["label", "patient"], balance_power={"label": 1, "patient": 0})
    shares = Counter()
    for (label, _, _), share in stream.balanced_rows.shares.items():
        shares[label] += share
    assert shares == pytest.approx({"nodule": 0.25, "normal": 0.25, "cyst": 0.25, "": 0.25})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": ["modality", "modality"]}, "`balance` has the key `modality` twice"),
        ({"balance": ["label"], "balance_power": 1.5}, r"must be in 0\.\.1, got 1\.5"),
        ({"balance": ["label"], "balance_power": {"source": 1}}, "key `source`, which is not in `balance`"),
        ({"balance": ["label"], "mixing": "modality"}, "contradict each other"),
        ({"balance": ["label"], "shuffle": False}, "raise `shuffle_buffer`"),
        ({"balance": ["patent"]}, "no source has a field `patent`; did you mean `patient`?"),
    ],
)
def test_balances_that_cannot_be_used(tmp_path, options, message):
    with pytest.raises((ArgumentError, SourceError), match=message):
        SampleStream([write(tmp_path, table())], **options)


def test_balancing_requires_labels_and_rows_that_are_known(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "label"} for row in table()]
    with pytest.raises(SourceError, match=r"no source has a field `label`.*by `label` in a source"):
        SampleStream([write(tmp_path, rows)], balance=["label"])
    phantoms = TypeAdapter(Source).validate_python({"kind": "phantom", "image_size": 48, "length": 9})
    with pytest.raises(StreamError, match="phantoms 0 draws samples while they are read"):
        SampleStream([phantoms], balance=["modality"])


def test_shares_are_reported_by_group(tmp_path):
    lines = list(SampleStream([write(tmp_path, table())], balance=KEYS, balance_power=1).balanced_rows.lines())
    cells = [line.split() for line in lines]
    assert ["ct", "87", "72.5%", "50.0%", "0.69"] in cells
    assert ["no", "label", "2", "1.7%", "12.5%", "7.5"] in cells
    assert lines[-1] == "most often drawn: ultrasound / d / cyst, each row 30 times per epoch"
    assert Fraction(lines[1].split()[-2].rstrip("%")) + Fraction(50) == 100
