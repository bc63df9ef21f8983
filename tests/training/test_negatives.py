"""Full-batch negatives: two processes, and micro-batches, against one process with the whole batch."""

from itertools import pairwise

import pytest
import torch
import two_ranks
from safetensors.torch import load_file
from torch import multiprocessing
from two_ranks import CASES, batch_of, model_of, outcome

from medmoe_hf.training.cached import cached_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    multiprocessing.spawn(two_ranks.run, args=(2, str(folder)), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def whole():
    found = {}
    for case in CASES:
        model, collator = model_of(case)
        output = model(**batch_of(collator, slice(0, 8)))
        output.loss.backward()
        found[case] = outcome(model, output)
    return found


# `plus` norms levels of eight channels and has a scale of 1/0.07: in float32 a step of one batch is itself 1.5e-5 away
# from the step in float64.
GRADIENT_BOUND = {"plus": 3e-5}


def same(found, expected, case):
    idle = ".experts.4."
    for name, value in expected.items():
        scale = 1.0 if name.startswith("loss") else max(1.0, value.abs().max().item())
        bound = (
            1e-6 * max(1.0, value.abs().item()) if name.startswith("loss") else GRADIENT_BOUND.get(case, 1e-5) * scale
        )
        assert (found[name] - value).abs().max() <= bound, f"{case}: {name}"
    for name in found.keys() - expected.keys():
        assert idle in name, f"{case}: {name}"
        assert not found[name].any()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["ranks", "global"])
def test_two_processes_equal_one(folder, whole, case, mode):
    for rank in (0, 1):
        same(load_file(folder / f"{mode} {case} {rank}.safetensors"), whole[case], case)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cuts", [(2, 4, 6), (1, 7)])
def test_micro_batches_equal_one_batch(whole, case, cuts):
    model, collator = model_of(case)
    edges = [0, *cuts, 8]
    batches = [batch_of(collator, slice(first, last)) for first, last in pairwise(edges)]
    losses = cached_step(model, batches)
    same(outcome(model, losses), whole[case], case)
    assert losses["expert_counts"].tolist() == [2, 2, 1, 2, 0, 1]
    for name, value in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert value == (0 if ".experts.4." in name else 1)


def test_positives_change_the_step(whole):
    """Else the cases above would compare what both sides ignore."""
    name = "gradient vision_model.backbone.embeddings.patch_embeddings.projection.weight"
    single = whole["gloria"][name]
    for case in ("groups", "text similarity"):
        assert (whole[case][name] - single).norm() > 0.2 * single.norm(), case


def test_rows_of_unequal_size_are_padded_and_get_their_own_gradients(folder):
    for rank in (0, 1):
        found = load_file(folder / f"uneven {rank}.safetensors")
        assert found["rows"].tolist() == [[1, 0], [1, 0], [1, 1], [1, 1], [1, 1]]
        # both processes ask for the same sum, so that every gradient comes twice
        expected = [[[0], [4]], [[8, 10], [12, 14], [16, 18]]][rank]
        assert found["gradient"].tolist() == expected


def model_with_dropout():
    model, collator = model_of("gloria")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    return model, collator


def test_dropout_is_replayed():
    """With dropout the two passes of a tower must draw the same numbers, else gradients belong to another loss."""
    gradients = []
    for _ in range(2):
        model, collator = model_with_dropout()
        batches = [batch_of(collator, rows) for rows in (slice(0, 4), slice(4, 8))]
        torch.manual_seed(7)
        before = cached_step(model, batches)["loss"]
        gradients.append(
            {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        )
    # along the negative gradient the loss with the same draws goes down by what the gradient says
    name = "text_model.encoder.encoder.layer.1.output.dense.weight"
    gradient = gradients[0][name]
    assert torch.equal(gradient, gradients[1][name])
    losses = []
    for sign in (1, -1):
        model, collator = model_with_dropout()
        with torch.no_grad():
            dict(model.named_parameters())[name].add_(gradient, alpha=sign * 1e-2 / gradient.norm())
        torch.manual_seed(7)
        losses.append(cached_step(model, batches)["loss"].item())
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(gradient.norm().item(), rel=0.05)
    assert min(losses) < before < max(losses)
