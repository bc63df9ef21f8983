"""Full-batch negatives: two processes, and micro-batches, against one process with the whole batch."""

import json
from itertools import pairwise

import pytest
import torch
import two_ranks
from processes import free_port, launch
from safetensors.torch import load_file
from two_ranks import CASES, TYPES, batch_of, computing_in, model_of, outcome

from medmoe_hf.training.cached import cached_step

# In float64 the same arithmetic in another order agrees to 1e-12, on any processor.
EXACT = 1e-10
# How far float32 is from float64 is a matter of the processor: of its kernels, and of the order they sum in. So what
# is to be expected is measured as well: with one batch in float32, and with float32's rounding of the weights alone,
# which moves the gradients in float64. This many times that is allowed; what cancels at a wrong place loses more.
TIMES = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "port").write_text(str(free_port()))
    launch(two_ranks.run, 2, str(folder), count=2)
    return folder


def one_batch(case, dtype, rounding=0.0):
    model, collator = model_of(case, dtype)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + rounding * (2 * torch.rand(parameter.shape, generator=noise, dtype=dtype) - 1))
    batch = batch_of(collator, slice(0, 8), dtype)
    with computing_in(dtype):
        output = model(**batch)
        output.loss.backward()
    return outcome(model, output)


@pytest.fixture(scope="module")
def whole():
    """For each case one batch in float64, and the error that one batch in float32 may have."""
    found = {}
    for case in CASES:
        exact = one_batch(case, torch.float64)
        assert exact["loss"].dtype == torch.float64
        rounded = one_batch(case, torch.float64, rounding=torch.finfo(torch.float32).eps)
        noise = max(*errors(one_batch(case, torch.float32), exact).values(), *errors(rounded, exact).values())
        assert 1e-8 < noise < 1e-4  # float32, and no worse than it should be
        found[case] = exact, noise
    return found


def errors(found, exact):
    """By name the largest difference, relative to the largest value where that is above 1."""
    idle = ".experts.4."
    for name in found.keys() - exact.keys():
        assert idle in name, name
        assert not found[name].any()
    return {
        name: (found[name].double() - value).abs().max().item() / max(1.0, value.abs().max().item())
        for name, value in exact.items()
    }


def assert_same(found, expected, dtype):
    exact, noise = expected
    bound = EXACT if dtype == "float64" else TIMES * noise
    assert {name: error for name, error in errors(found, exact).items() if not error <= bound} == {}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["ranks", "global"])
@pytest.mark.parametrize("dtype", TYPES)
def test_two_processes_equal_one(folder, whole, case, mode, dtype):
    for rank in (0, 1):
        assert_same(load_file(folder / f"{mode} {case} {dtype} {rank}.safetensors"), whole[case], dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cuts", [(2, 4, 6), (1, 7)])
@pytest.mark.parametrize("dtype", TYPES)
def test_micro_batches_equal_one_batch(whole, case, cuts, dtype):
    model, collator = model_of(case, TYPES[dtype])
    edges = [0, *cuts, 8]
    batches = [batch_of(collator, slice(first, last), TYPES[dtype]) for first, last in pairwise(edges)]
    with computing_in(TYPES[dtype]):
        losses = cached_step(model, batches)
    assert_same(outcome(model, losses), whole[case], dtype)
    assert losses["expert_counts"].tolist() == [2, 2, 1, 2, 0, 1]
    for name, value in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert value == (0 if ".experts.4." in name else 1)


def test_pairs_are_counted_over_all_processes(folder):
    """Two steps of three pairs on each of two processes."""
    record = json.loads((folder / "run" / "training.json").read_text())
    assert (record["steps"], record["samples"]) == (2, 12)


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
