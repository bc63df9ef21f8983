"""The Triton kernels of the local loss, in Triton's interpreter, against the plain formulation in float64."""

import importlib.util
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from medmoe_hf.model import local_loss_kernel_medmoe as fused
from medmoe_hf.model import losses_medmoe as losses
from medmoe_hf.model.word_regions_medmoe import gloria_logits

TEMPS = 4.0, 5.0, 10.0
# Images, width, sides of the map, number of words of each caption.
SHAPES = [
    pytest.param(3, 24, (3, 7), (5, 1, 0, 3), id="odd sizes, one word, no words"),
    pytest.param(2, 40, (6, 6), (9, 12, 7, 16, 3), id="several tiles of words"),
    pytest.param(1, 7, (1, 1), (1,), id="one region and one word"),
    pytest.param(2, 16, (4, 5), (0, 0), id="no words at all"),
]


@pytest.fixture(autouse=True)
def interpreter():
    pytest.importorskip("triton")


@pytest.fixture
def narrow_tiles(monkeypatch):
    """The smallest tiles, so that few words fill several."""
    monkeypatch.setattr(fused, "_SLOT_COSTS", {16: 1.0})


def inputs_of(images, width, sides, sizes):
    """Words stand anywhere on the word axis; what stands between them is not a number."""
    slots = max(1, *sizes) + 2
    mask = torch.stack([torch.randperm(slots) < size for size in sizes])
    words = torch.randn(len(sizes), slots, width).masked_fill(~mask.unsqueeze(-1), torch.nan)
    return (0.7 * torch.randn(images, width, *sides)).requires_grad_(), words.requires_grad_(), mask


def plain(local, words, mask, temp1=TEMPS[0], temp2=TEMPS[1], temp3=TEMPS[2]):
    """The definition, caption by caption: (B, N), in the dtype of its inputs."""
    regions, columns = local.flatten(2), []
    for caption, present in zip(words, mask, strict=True):
        if not present.any():
            columns.append(0 * regions.sum(dim=(1, 2)))
            continue
        own = caption[present]
        attention = (temp1 * (own @ regions).softmax(dim=1)).softmax(dim=2)
        contexts = attention @ regions.transpose(1, 2)
        cosines = torch.nn.functional.cosine_similarity(contexts, own, dim=-1)
        columns.append(temp3 * (temp2 * cosines).logsumexp(dim=-1))
    return torch.stack(columns, dim=1)


def settings(dtype=torch.float32, temp1=TEMPS[0]):
    return {"temp1": temp1, "temp2": TEMPS[1], "temp3": TEMPS[2], "matmul_dtype": dtype}


def kernel(*inputs, dtype=torch.float32, temp1=TEMPS[0]):
    return with_gradients(fused.fused_gloria_logits, *inputs, **settings(dtype, temp1))


def with_gradients(function, local, words, mask, upstream, **options):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (local, words)]
    logits = function(*leaves, mask, **options)
    assert logits.shape == upstream.shape
    gradients = torch.autograd.grad((logits * upstream).sum(), leaves, allow_unused=True)
    return logits, *gradients


def assert_near(found, expected, tolerance, mask):
    """Values and gradients, relative to the length of each; the gradient of words where there are words."""
    assert found[2][~mask].eq(0).all()
    for near, right in zip(found, expected, strict=True):
        right = torch.zeros_like(near, dtype=torch.float64) if right is None else right.nan_to_num()
        off = (near.double() - right).norm()
        assert off <= tolerance * right.norm() + 1e-12, f"{off / right.norm():.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("images", "width", "sides", "sizes"), SHAPES)
def test_values_and_gradients(images, width, sides, sizes, dtype, narrow_tiles):
    local, words, mask = inputs_of(images, width, sides, sizes)
    upstream = torch.randn(images, len(sizes))
    exact = with_gradients(plain, local.double(), words.double(), mask, upstream.double())
    found = kernel(local, words, mask, upstream, dtype=dtype)
    assert all(tensor.dtype == torch.float32 for tensor in found)
    assert_near(found, exact, 1e-5 if dtype == torch.float32 else 1e-2, mask)


@pytest.mark.parametrize(
    ("elements", "kept"),
    [
        pytest.param(1, 0, id="one tile of one image"),
        pytest.param(2 * 2 * 48 * 24, 0, id="two images, no contexts kept"),
        pytest.param(2 * 2 * 48 * 24, 2 * 48 * 24, id="two images, whose contexts are kept"),
    ],
)
def test_it_is_exact_however_it_is_cut(elements, kept, narrow_tiles, monkeypatch):
    local, words, mask = inputs_of(3, 24, (2, 5), (16, 9, 0, 8, 7))
    assert len(fused.pack(mask.sum(dim=1).tolist()).segments) == 48
    upstream = torch.randn(3, 5)
    whole = kernel(local, words, mask, upstream)
    monkeypatch.setattr(fused, "_WORKSPACE_ELEMENTS", elements)
    monkeypatch.setattr(fused, "_KEPT_ELEMENTS", kept)
    assert_near(kernel(local, words, mask, upstream), [tensor.double() for tensor in whole], 1e-6, mask)
    assert_near(whole, with_gradients(plain, local.double(), words.double(), mask, upstream.double()), 1e-5, mask)


@pytest.mark.parametrize("temp1", [0.5, fused.MAX_TEMP1])
@pytest.mark.parametrize("size", [0.01, 30.0])
def test_flat_and_sharp_attention(size, temp1):
    """Large embeddings saturate the softmax over words, a large temp1 that over regions."""
    local, words, mask = inputs_of(2, 17, (3, 5), (4, 0, 6))
    local, upstream = (size * local).detach(), torch.randn(2, 3)
    exact = with_gradients(plain, local.double(), words.double(), mask, upstream.double(), temp1=temp1)
    assert_near(kernel(local, words, mask, upstream, temp1=temp1), exact, 2e-5, mask)


def test_regions_of_zeros_have_no_direction_and_no_gradient():
    local, words, mask = inputs_of(2, 8, (2, 2), (3, 1))
    found = kernel(torch.zeros_like(local), words, mask, torch.ones(2, 2))
    assert found[1].eq(0).all()
    assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_in_any_format(dtype):
    """Channels-last maps have the values of others; gradients have the dtype of what they belong to."""
    local, words, mask = inputs_of(2, 12, (3, 4), (2, 5))
    local, words, upstream = local.to(dtype), words.to(dtype), torch.randn(2, 2)
    found = [
        kernel(maps, words, mask, upstream) for maps in (local, local.to(memory_format=torch.channels_last), local)
    ]
    assert [tensor.dtype for tensor in found[0]] == [torch.float32, dtype, dtype]
    assert all(torch.equal(one, other) for one, other in zip(found[0], found[1], strict=True))
    expected = kernel(local.float(), words.float(), mask, upstream)
    assert_near(found[0], [tensor.double() for tensor in expected], 1e-6 if dtype == torch.float32 else 4e-3, mask)


@pytest.mark.parametrize("trained", [0, 1])
def test_gradients_only_where_they_are_wanted(trained):
    local, words, mask = inputs_of(2, 8, (2, 3), (3, 2))
    both = kernel(local, words, mask, torch.ones(2, 2))[1:]
    leaves = [tensor.detach().clone() for tensor in (local, words)]
    leaves[trained].requires_grad_()
    fused.fused_gloria_logits(*leaves, mask, **settings()).sum().backward()
    assert leaves[1 - trained].grad is None
    torch.testing.assert_close(leaves[trained].grad, both[trained])
    with torch.no_grad():
        assert not fused.fused_gloria_logits(*leaves, mask, **settings()).requires_grad


@pytest.mark.parametrize("switch", ["0", "1", ""])
def test_the_switch(switch, monkeypatch):
    """The losses use the kernel where the variable says so; on a CPU not by default."""
    monkeypatch.setenv(fused.SWITCH, switch)
    local, words, mask = inputs_of(2, 8, (3, 3), (3, 0, 2))
    words = words.detach().nan_to_num()
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return fused.fused_gloria_logits(*arguments)

    monkeypatch.setattr(losses, "fused_gloria_logits", counted)
    config = SimpleNamespace(
        local_loss="gloria",
        local_loss_matmul_dtype="float32",
        local_loss_regions=2,
        temp1=TEMPS[0],
        temp1_regions=9,
        temp2=TEMPS[1],
        temp3=TEMPS[2],
    )
    logits = losses.local_logits(config, local, words, mask)
    assert len(calls) == (switch == "1")
    temp1 = losses.region_temperature(config, 4)
    expected = gloria_logits(losses.contrasted_regions(config, local), words, mask, temp1, *TEMPS[1:])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_what_the_kernel_does_not_support_is_computed_without_it(monkeypatch):
    monkeypatch.setenv(fused.SWITCH, "1")
    local, _, mask = inputs_of(1, 4, (2, 2), (3,))
    long = torch.ones(1, fused.MAX_WORDS + 1, dtype=torch.bool)
    assert fused.uses_kernel(local, mask, 4.0, torch.float32)
    assert fused.uses_kernel(local, long & (torch.arange(long.shape[1]) > 0), 4.0, torch.float32)
    assert not fused.uses_kernel(local, long, 4.0, torch.float32)
    assert not fused.uses_kernel(local, mask, fused.MAX_TEMP1 + 1, torch.float32)
    assert not fused.uses_kernel(local.to("meta"), mask, 4.0, torch.float32)
    assert not fused.uses_kernel(local[:0], mask, 4.0, torch.float32)
    with pytest.raises(ValueError, match="at most 256 words, got one of 257"):
        fused.fused_gloria_logits(local, torch.zeros(1, 257, 4), long, 4.0, 5.0, 10.0)
    with pytest.raises(ValueError, match="temp1 of at most 60, got 61"):
        fused.fused_gloria_logits(local, torch.zeros(1, 5, 4), mask, 61.0, 5.0, 10.0)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    assert not fused.uses_kernel(local, mask, 4.0, torch.float32)


def test_a_kernel_that_fails_is_reported_and_not_used():
    fused._works.cache_clear()
    with pytest.warns(UserWarning, match="not used; set MEDMOE_LOCAL_LOSS_KERNEL=0"):
        assert not fused._works(torch.device("cuda:99"), torch.float32)
    fused._works.cache_clear()


def test_checkpoints_load_without_triton():
    """transformers demands the packages that a file imports outside of `try`."""
    from transformers.dynamic_module_utils import get_imports

    for name in ("local_loss_kernel_medmoe", "local_loss_triton_medmoe"):
        path = importlib.util.find_spec(f"medmoe_hf.model.{name}").origin
        assert "triton" not in get_imports(path)
    assert "triton" in sys.modules


@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_packing(count):
    """No caption is cut, no slot is used twice, and the numbers of captions ascend from slot to slot."""
    sizes = torch.randint(0, 60, (count,)).tolist()
    packing = fused.pack(sizes)
    segments, bounds = packing.segments.tolist(), packing.bounds.tolist()
    assert len(segments) == packing.width * packing.tiles
    assert len(bounds) == packing.tiles + 1
    taken = []
    for caption, (start, size) in enumerate(zip(packing.starts.tolist(), sizes, strict=True)):
        slots = range(start, start + size)
        taken += slots
        assert {packing.owners[slot].item() for slot in slots} <= {caption}
        assert len({segments[slot] for slot in slots}) <= 1
        assert len({slot // packing.width for slot in slots}) <= 1
        tiles = {slot // packing.width for slot in slots}
        assert all(bounds[tile] <= segments[slot] < bounds[tile + 1] for tile in tiles for slot in slots)
    assert len(taken) == len(set(taken)) == sum(segment >= 0 for segment in segments)
    assert sorted({segment for segment in segments if segment >= 0}) == list(range(sum(size > 0 for size in sizes)))


def test_packing_wastes_few_slots():
    assert (fused.pack([25] * 256).width, len(fused.pack([25] * 256).segments)) == (128, 52 * 128)
    mixed = [3 + 7 * index % 60 for index in range(256)]
    assert len(fused.pack(mixed).segments) < 1.03 * sum(mixed)


@pytest.mark.parametrize("kept", [0, 2**29])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_is_as_stated(dtype, kept, monkeypatch):
    """The peak of both passes by the allocator's own events, and no tensor as large as all scores.

    In float64 for a dtype of another size: products of bfloat16 allocate memory of their own on a CPU.
    """
    for name in ("_tiles", "cosines"):  # the kernels themselves allocate nothing
        monkeypatch.setattr(fused._Launcher, name, lambda *arguments: None)
    monkeypatch.setattr(fused._Launcher, "pulls", lambda self, contexts, words, *rest: torch.zeros_like(words))
    monkeypatch.setattr(fused, "_WORKSPACE_ELEMENTS", 3 * 2 * 128 * 144)
    monkeypatch.setattr(fused, "_KEPT_ELEMENTS", kept)
    sizes = (16, 14, 16, 15, 10, 16, 9)
    local, words, mask = inputs_of(16, 32, (12, 12), sizes)
    words = words.detach().nan_to_num().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        logits = fused.fused_gloria_logits(local, words, mask, **settings(dtype))
        gradients = torch.autograd.grad(logits.sum(), (local, words))
    assert gradients[0].shape == local.shape
    events = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(itertools.accumulate(events))
    assert peak <= fused.kernel_bytes(16, 144, 32, sizes, dtype) <= 1.35 * peak
    assert max(events) < 16 * 144 * sum(sizes) * dtype.itemsize


COMPILE = """
import sys
from importlib.util import module_from_spec, spec_from_file_location

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

spec = spec_from_file_location("kernels", sys.argv[1])
kernels = module_from_spec(spec)
spec.loader.exec_module(kernels)
tile = {"BLOCK_M": 64, "BLOCK_W": 64, "BLOCK_D": 64, "EVEN_D": True, "PRECISION": "ieee", "UPCAST": False}
of_floats = {"unit_words", "cosines", "inverses", "slopes", "towards"}
of_products = {"maps", "contrasts", "pulls", "weights", "gradients", "contexts"}
for name, kernel in kernels.KERNELS.items():
    constants = tile if "BLOCK_W" in kernel.arg_names else {"BLOCK_D": 1024}
    types = {argument: "i32" for argument in kernel.arg_names}
    types |= {argument: "constexpr" for argument in constants} | {"temp1": "fp32", "shift": "fp32"}
    types |= dict.fromkeys(of_floats, "*fp32") | dict.fromkeys(of_products, "*bf16")
    types |= dict.fromkeys(("segments", "bounds"), "*i32")
    signature = {argument: types[argument] for argument in kernel.arg_names}
    places = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    compiled = triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 80, 32))
    print(name, "mma.sync" in compiled.asm["ptx"], len(compiled.asm["cubin"]) > 0)
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    """The interpreter accepts more than the compiler. Products become instructions of matrix units."""
    path = importlib.util.find_spec("medmoe_hf.model.local_loss_triton_medmoe").origin
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    done = subprocess.run([sys.executable, script, path], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "weights True True",
        "slopes True True",
        "cosines False True",
        "pulls False True",
    ]
