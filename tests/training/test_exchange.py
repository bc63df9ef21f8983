"""The local loss over two and three processes, with unequal batches, against one process with all pairs."""

from itertools import accumulate, pairwise
from pathlib import Path

import exchange_ranks
import pytest
import torch
from exchange_ranks import (
    DEPTH,
    EDGES,
    GROUPS,
    KEPT,
    MEASURED,
    TRAVELS,
    WIDTH,
    blocks_of,
    config_of,
    kept_limit,
    losses_of,
    pairs,
    result,
)
from processes import launch
from safetensors.torch import load_file
from two_ranks import TYPES, batch_of, computing_in, model_of, outcome

from medmoe_hf.model import MedMoEConfig, local_loss_kernel_medmoe, losses_medmoe
from medmoe_hf.model.losses_medmoe import training_losses
from medmoe_hf.training.exchange import Block, plan_exchange
from medmoe_hf.training.memory import exchange_bytes, loss_memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exchange")
    for world in EDGES:
        launch(exchange_ranks.run, world, str(folder), count=world)
    return folder


def plain_logits(config, local, words, mask):
    """GLoRIA's similarity by its definition, caption by caption, with autograd."""
    regions, columns = losses_medmoe.contrasted_regions(config, local).flatten(2), []
    temp1 = losses_medmoe.region_temperature(config, regions.shape[2])
    for caption, present in zip(words, mask, strict=True):
        own = caption[present]
        attention = (temp1 * (own @ regions).softmax(dim=1)).softmax(dim=2)
        cosines = torch.nn.functional.cosine_similarity(attention @ regions.transpose(1, 2), own, dim=-1)
        similarity = config.temp3 * (config.temp2 * cosines).logsumexp(dim=-1)
        columns.append(similarity if len(own) else 0 * regions.sum(dim=(1, 2)))
    return torch.stack(columns, dim=1)


@pytest.fixture(scope="module")
def whole():
    """By what travels: one process with all pairs in float64, by the definition."""
    found = {}
    for travels in TRAVELS:
        values, mask = pairs()
        leaves = {name: value.requires_grad_() for name, value in values.items()}
        with pytest.MonkeyPatch.context() as patch, computing_in(torch.float64):
            patch.setattr(losses_medmoe, "local_logits", plain_logits)
            losses = losses_of(config_of(travels, torch.float64), leaves, mask, torch.tensor(GROUPS), {})
            losses["loss"].backward()
        found[travels] = result(losses, leaves)
    return found


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("travels", TRAVELS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("world", "edges"), [(world, edges) for world in EDGES for edges in EDGES[world]])
def test_losses_and_gradients_equal_those_of_one_process(folder, whole, world, edges, dtype, travels, kept):
    bound = 1e-12 if dtype == "float64" else 1e-6
    for rank, rows in enumerate(pairwise(EDGES[world][edges])):
        found = load_file(folder / f"{world} {edges} {dtype} {travels} {kept} {rank}.safetensors")
        for name, exact in whole[travels].items():
            value, scale = found[name].double(), max(1.0, exact.abs().max().item())
            if name.startswith("gradient"):
                # Every process has the same loss: gradients come as often as there are processes.
                value, exact = value / world, exact[slice(*rows)]
            assert value.shape == exact.shape
            if exact.numel():
                assert (value - exact).abs().max() <= bound * scale, name


@pytest.mark.parametrize("mode", ["ranks", "global"])
@pytest.mark.parametrize("world", EDGES)
def test_a_model_with_unequal_batches_equals_one_with_all(folder, world, mode):
    model, collator = model_of("groups", torch.float64)
    batch = batch_of(collator, slice(0, 8), torch.float64)
    with computing_in(torch.float64):
        output = model(**batch)
        output.loss.backward()
    expected = outcome(model, output)
    for rank in range(world):
        found = load_file(folder / f"{world} {mode} {rank}.safetensors")
        assert expected.keys() <= found.keys()
        off = {name: (found[name] - value).abs().max().item() for name, value in expected.items()}
        assert {name: error for name, error in off.items() if error > 1e-10} == {}


@pytest.mark.parametrize("travels", TRAVELS)
@pytest.mark.parametrize("world", EDGES)
def test_the_cases_are_what_they_are_called(world, travels):
    for edges in EDGES[world].values():
        assert plan_exchange(blocks_of(travels, edges), WIDTH).words_travel == (travels == "words")


@pytest.mark.parametrize(
    ("side", "words", "region_dtype", "word_dtype", "travel"),
    [
        (56, 25, torch.float32, torch.float32, "words"),
        (5, 25, torch.float32, torch.float32, "words"),  # equal
        (4, 25, torch.float32, torch.float32, "regions"),
        # 8 bytes an element of a region, 6 of a word.
        (4, 20, torch.float32, torch.bfloat16, "words"),
        (4, 22, torch.float32, torch.bfloat16, "regions"),
    ],
)
def test_the_smaller_side_travels(side, words, region_dtype, word_dtype, travel):
    blocks = [Block(4, side, side, 4, 4 * words)] * 8
    assert plan_exchange(blocks, 768, region_dtype, word_dtype).words_travel == (travel == "words")


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("travels", MEASURED)
def test_memory_is_as_stated(folder, monkeypatch, travels, kept):
    pytest.importorskip("triton")
    images, side, words = MEASURED[travels]
    block = Block(images, side, side, images, images * words)
    monkeypatch.setattr(local_loss_kernel_medmoe, "_WORKSPACE_ELEMENTS", 4 * 2 * 128 * side * side)
    monkeypatch.setattr(local_loss_kernel_medmoe, "_KEPT_ELEMENTS", 0)  # restored after the test
    limit = {"all": 2**29, "one": kept_limit([block] * 2, 1), "none": 0}[kept]
    local_loss_kernel_medmoe._KEPT_ELEMENTS = limit
    chosen = plan_exchange([block] * 2, DEPTH, kernel=True)
    assert chosen == (travels == "words", {"all": 2, "one": 1, "none": 0}[kept])
    stated = exchange_bytes(block, DEPTH, 2, chosen, *3 * [torch.float32])
    for rank in (0, 1):
        measured = int((folder / f"memory {travels} {kept} {rank}").read_text())
        assert measured <= stated <= 1.35 * measured


def test_matrices_of_pairs_take_what_is_stated():
    pairs = 400
    config = MedMoEConfig.from_preset("tiny", local_loss="gloria")
    image, text = torch.randn(2, pairs, 4, requires_grad=True)
    terms = torch.randn(pairs, pairs, requires_grad=True)
    groups, worded = torch.randint(0, 90, (pairs,)), torch.ones(pairs, dtype=torch.bool)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        losses = training_losses(config, 10.0, image, text, text, terms, worded, [], None, None, groups)
        losses["loss"].backward()
    events = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    measured = max(accumulate(events))
    assert measured <= loss_memory(config, pairs // 8, 8).similarities <= 1.35 * measured


def test_the_page_has_the_computed_table():
    page = (Path(__file__).parents[2] / "docs" / "pages" / "training.md").read_text(encoding="utf-8")
    for name, batch in (("paper", 32), ("plus", 64)):
        for processes in (1, 8, 64):
            config = MedMoEConfig.from_preset(name, local_loss_matmul_dtype="bfloat16")
            memory = loss_memory(config, batch, processes)
            travels = "words" if memory.words_travel else "regions"
            sizes = " | ".join(f"{size / 2**20:.0f} MiB" for size in memory[2:])
            kept = f"{memory.kept} of {processes}"
            row = f"| `{name}`, {batch} | {processes} | {travels if processes > 1 else 'nothing'} | {kept} | {sizes} |"
            assert row in page, row
