"""What must not change results: the order of a batch, padding, the size of batches, and where a stream is resumed."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import Phase, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from medmoe_hf.data.sources import Source  # noqa: E402
from medmoe_hf.data.stream import SampleStream  # noqa: E402
from medmoe_hf.model import MedMoEImageProcessor, MedMoEModel, MedMoEProcessor, MedMoETokenizer  # noqa: E402
from medmoe_hf.training.cached import cached_step  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from two_ranks import batch_of, computing_in, model_of, outcome  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TEXTS = ["No effusion.", "CT of the chest: a small nodule in the left lung.", "", "effusion, effusion - effusion"]


def few(count):
    """A few examples, always the same ones; a failing one is not made smaller, which can take minutes."""
    phases = (Phase.explicit, Phase.generate)
    return settings(derandomize=True, database=None, deadline=None, max_examples=count, phases=phases)


@pytest.fixture(scope="module")
def model(small_config):
    torch.manual_seed(0)
    return MedMoEModel(small_config(text_config={"vocab_size": 200})).eval()


@pytest.fixture(scope="module")
def processor():
    tokenizer = MedMoETokenizer.from_words(["effusion"], max_length=48)
    return MedMoEProcessor(MedMoEImageProcessor(size={"height": 64, "width": 64}), tokenizer)


@pytest.fixture(scope="module")
def pixels(processor):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40 + 5 * index, 50, 3), dtype=np.uint8) for index in range(4)]
    return processor(images=images, return_tensors="pt")["pixel_values"]


def embeddings(model, pixels, batch):
    with torch.no_grad():
        output = model(pixel_values=pixels, **batch)
    return output.logits_per_image, output.image_embeds, output.text_embeds


@few(6)
@given(order=st.permutations(range(4)), other=st.permutations(range(4)))
def test_the_order_of_a_batch(model, processor, pixels, order, other):
    batch = processor(text=TEXTS, return_tensors="pt")
    logits, images, texts = embeddings(model, pixels, batch)
    moved = embeddings(model, pixels[list(order)], {key: value[list(other)] for key, value in batch.items()})
    torch.testing.assert_close(moved[0], logits[list(order)][:, list(other)], **CLOSE)
    torch.testing.assert_close(moved[1], images[list(order)], **CLOSE)
    torch.testing.assert_close(moved[2], texts[list(other)], **CLOSE)


@few(6)
@given(width=st.integers(0, 12), count=st.integers(1, 4))
def test_padding_and_neighbours_of_captions(model, processor, pixels, width, count):
    batch = processor(text=TEXTS, return_tensors="pt")
    logits, _, texts = embeddings(model, pixels, batch)
    alone = processor(text=TEXTS[:count], return_tensors="pt")
    fill = {"word_ids": -1}
    padded = {
        key: torch.nn.functional.pad(value, (0, width), value=fill.get(key, 0))[:, :48] for key, value in alone.items()
    }
    found = embeddings(model, pixels, padded)
    torch.testing.assert_close(found[2], texts[:count], **CLOSE)
    torch.testing.assert_close(found[0], logits[:, :count], **CLOSE)


@few(6)
@given(cuts=st.sets(st.integers(1, 3)))
def test_batches_of_any_size_encode_images_equally(model, processor, pixels, cuts):
    batch = processor(text=TEXTS, return_tensors="pt")
    logits, images, _ = embeddings(model, pixels, batch)
    parts = [embeddings(model, part, batch) for part in torch.tensor_split(pixels, sorted(cuts))]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), logits, **CLOSE)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), images, **CLOSE)


@few(8)
@given(
    sides=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3),
    kind=st.sampled_from([np.uint8, np.uint16, np.float32]),
)
def test_processors_treat_images_of_a_batch_like_single_ones(processor, sides, kind):
    rng = np.random.default_rng(len(sides))
    images = [(rng.random(side) * 200).astype(kind) for side in sides]
    batch = processor(images=images, return_tensors="pt")["pixel_values"]
    singles = [processor(images=image, return_tensors="pt")["pixel_values"] for image in images]
    torch.testing.assert_close(batch, torch.cat(singles))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    Image.new("L", (8, 8), 3).save(folder / "x.png")
    rows = [{"image": "x.png", "caption": f"caption {index}"} for index in range(23)]
    rows[4] = {"image": "missing.png", "caption": "x"}
    (folder / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return TypeAdapter(Source).validate_python({"kind": "jsonl", "files": [str(folder / "t.jsonl")]})


@few(20)
@given(
    stop=st.integers(0, 40),
    again=st.integers(0, 10),
    seed=st.integers(0, 99),
    buffer=st.integers(1, 30),
    ranks=st.integers(1, 3),
)
@example(stop=0, again=10, seed=3, buffer=1, ranks=2)  # then only the faulty row of the epoch is left
def test_a_stream_goes_on_where_it_was_stopped_twice(table, stop, again, seed, buffer, ranks):
    """Over epochs, on each rank, with a faulty row; against a stream that nothing stops."""

    def stream(rank):
        return SampleStream([table], seed=seed, rank=rank, world_size=ranks, buffer=buffer, max_bad_fraction=1.0)

    def captions(one, count):
        found = []
        while len(found) < count:
            for sample in one:
                found.append((sample["position"], sample["caption"]))
                if len(found) == count:
                    break
        return found

    for rank in range(ranks):
        whole = captions(stream(rank), stop + again + 5)
        parts, state = [], None
        for count in (stop, again, 5):
            one = stream(rank)
            if state is not None:
                one.load_state_dict(json.loads(json.dumps(state)))
            parts += captions(one, count)
            state = one.state_dict()
        assert parts == whole


@few(3)
@given(cuts=st.sets(st.integers(1, 7), min_size=1, max_size=4))
def test_micro_batches_give_the_gradients_of_one_batch(cuts):
    """In float64, where rounding hides nothing."""
    (model, collator), (whole, _) = (model_of("plus", torch.float64) for _ in "ab")
    edges = [0, *sorted(cuts), 8]
    batches = [batch_of(collator, slice(first, last), torch.float64) for first, last in pairwise(edges)]
    batch = batch_of(collator, slice(0, 8), torch.float64)
    with computing_in(torch.float64):
        found = outcome(model, cached_step(model, batches))
        output = whole(**batch)
        output.loss.backward()
        wanted = outcome(whole, output)
    assert wanted.keys() <= found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10, msg=name)
