"""Benchmark of the parts of a training step: time and memory compared with direct implementations.

    python examples/experiments/benchmarks/training.py [--rounds 5] [--batches 16 32 48] [--small-batch 48]

Compares the local loss (GLoRIA's, forward and backward; maps of 56x56x768, 25 words per caption) with a loop over
captions, in float32 and with bfloat16 matrix products, and with the five matrix products that it needs at least; the
same loss on maps pooled by `local_loss_regions`, with the widths and sides of `plus` and `small`; the pooling of
subwords with a loop over tokens; a step of the `paper` preset that computes one expert per image with all six; a step
of `official` with a direct implementation (all six experts on up-sampled tokens, a loop over captions); and a step of
`small` (frozen as the checkpoint of the package was) and of `plus` with whole and pooled maps, first with freed memory
that is returned to the system, then with memory that is kept, as in `medmoe train`.
Variants take turns, so that other load affects all alike. Times are CPU seconds of all threads, median and range over
rounds; memory is the peak increase of the process; ratios are medians of the ratios per round.
"""

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from medmoe_hf import MedMoEConfig, MedMoEModel
from medmoe_hf.common.memory import keep_freed_memory
from medmoe_hf.model import losses_medmoe as losses
from medmoe_hf.model import modeling_medmoe
from medmoe_hf.model.modeling_medmoe import pool_words
from medmoe_hf.training.optimizer import freeze, train_mode

WORDS, WIDTH, SIDE = 25, 768, 56
TEMP1, TEMP2, TEMP3 = 4.0, 5.0, 10.0


def reference_similarity(maps: Tensor, words: Tensor) -> Tensor:
    """Compute GLoRIA's similarities (B, N) as in its paper, one caption at a time; no caption is padded."""
    images = len(maps)
    regions = maps.flatten(2)
    columns = []
    for caption in words:
        query = caption.expand(images, -1, -1)
        over_words = (query @ regions).softmax(dim=1)
        over_regions = (TEMP1 * over_words).softmax(dim=2)
        context = over_regions @ regions.transpose(1, 2)
        cosine = torch.nn.functional.cosine_similarity(query, context, dim=-1)
        columns.append((TEMP2 * cosine).exp().sum(dim=1).log())
    return TEMP3 * torch.stack(columns, dim=1)


def reference_gloria(maps: Tensor, words: Tensor) -> Tensor:
    logits = reference_similarity(maps, words)
    target = torch.arange(len(maps))
    cross_entropy = torch.nn.functional.cross_entropy
    return cross_entropy(logits, target) + cross_entropy(logits.T, target)


def our_gloria(products: str, regions: int | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    config = SimpleNamespace(
        local_loss="gloria",
        local_loss_matmul_dtype=products,
        temp1=TEMP1,
        temp1_regions=None,
        local_loss_regions=regions,
        temp2=TEMP2,
        temp3=TEMP3,
        contrast="sum",
    )
    mask = torch.ones(1, WORDS, dtype=torch.bool)
    return lambda maps, words: losses.local_loss(config, maps, words, mask.expand(len(words), -1))


def products_alone(maps: Tensor, words: Tensor) -> None:
    """Compute the matrix products of both passes per image: scores, contexts, and three of the backward pass."""
    packed = words.detach().flatten(0, 1)
    scores = torch.empty(len(packed), SIDE * SIDE)
    contexts = torch.empty(len(packed), WIDTH)
    both = torch.randn(2 * len(packed), WIDTH), torch.randn(2 * len(packed), SIDE * SIDE)
    gradient = torch.empty(WIDTH, SIDE * SIDE)
    for image in maps.detach().flatten(2):
        torch.mm(packed, image, out=scores)  # (words, regions)
        torch.mm(scores, image.T, out=contexts)
        torch.mm(contexts, image, out=scores)
        # Twice as many rows: the gradient of the regions through scores and contexts.
        torch.mm(both[0].T, both[1], out=gradient)
        torch.mm(scores, image.T, out=contexts)


def peak(work: Callable[[], object]) -> float:
    """Return the peak increase of resident memory in MiB during a call; NaN except on Linux."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        work()
        return float("nan")

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    gc.collect()
    # glibc would reuse memory that was freed before, which would not count as an increase.
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS:")
    clear.write_text("5")
    work()
    return (status("VmHWM:") - before) / 1024


def compare(title: str, variants: dict[str, Callable[[], object]], rounds: int, memory: bool = True) -> None:
    """Print a line per variant, with ratios to the first one."""
    first = next(iter(variants))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for work in variants.values():
        work()
    grown = {name: peak(work) if memory else float("nan") for name, work in variants.items()}
    for _ in range(rounds):
        for name, work in variants.items():
            start = time.process_time()
            work()
            seconds[name].append(time.process_time() - start)
    print(f"\n{title}\n{'':34}{'CPU s, median (range)':>28}{'speed':>18}{'peak MiB':>10}{'memory':>8}")
    for name, times in seconds.items():
        ratios = [plain / own for plain, own in zip(seconds[first], times, strict=True)]
        spread = f"{statistics.median(times):.3f} ({min(times):.3f}-{max(times):.3f})"
        speed = f"{statistics.median(ratios):.2f}x ({min(ratios):.1f}-{max(ratios):.1f})"
        kept = f"{grown[name]:10.0f}{grown[name] / grown[first]:8.2f}" if memory else ""
        print(f"{name:34}{spread:>28}{speed:>18}{kept}", flush=True)


def local_loss(batch: int, rounds: int) -> None:
    torch.manual_seed(0)
    maps = torch.randn(batch, WIDTH, SIDE, SIDE)
    # Scaled so that the scores are a few units, as in a trained model.
    words = torch.randn(batch, WORDS, WIDTH) * 3 / WIDTH**0.5
    gradients: dict[str, tuple[Tensor, Tensor]] = {}

    def both_passes(name: str, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def work() -> None:
            gradients.pop(name, None)
            inputs = maps.requires_grad_(), words.requires_grad_()
            gradients[name] = torch.autograd.grad(loss(*inputs), inputs)

        return work

    variants = {
        "loop over captions": reference_gloria,
        "ours": our_gloria("float32"),
        "ours, bfloat16 products": our_gloria("bfloat16"),
    }
    calls: dict[str, Callable[[], object]] = {name: both_passes(name, loss) for name, loss in variants.items()}
    calls["five matrix products alone"] = lambda: products_alone(maps, words)
    compare(f"Local loss, forward and backward, batch {batch}", calls, rounds)
    reference = gradients["loop over captions"]
    for name in list(variants)[1:]:
        off = max(((a - b).norm() / b.norm()).item() for a, b in zip(gradients[name], reference, strict=True))
        print(f"    gradients of {name}: relative difference to the loop {off:.1e}")


def pooled_regions(batch: int, rounds: int) -> None:
    """Compare the local loss on whole maps with that on pooled ones; the pooling and its gradient are included."""
    for preset, width, side in (("plus", 512, 56), ("small", 192, 48)):
        torch.manual_seed(0)
        maps = torch.randn(batch, width, side, side)
        words = torch.randn(batch, WORDS, width) * 3 / width**0.5

        def both_passes(most: int | None, inputs: tuple[Tensor, ...] = (maps, words)) -> Callable[[], object]:
            leaves = [tensor.requires_grad_() for tensor in inputs]
            loss = our_gloria("float32", most)
            return lambda: torch.autograd.grad(loss(*leaves), leaves)

        sides = {f"whole map, {side}x{side}": None} | {f"pooled to {most}x{most}": most for most in (28, 19, 14)}
        compare(
            f"Local loss of `{preset}`, forward and backward, batch {batch}, width {width}",
            {name: both_passes(most) for name, most in sides.items()},
            rounds,
        )


def loop_over_tokens(layers: Tensor, word_ids: list[list[int]]) -> Tensor:
    """Pool subwords as GLoRIA's code does: per report, layer and word."""
    result = torch.zeros(layers.shape[1:])
    for row, ids in enumerate(word_ids):
        by_layer = []
        for layer in layers:
            words, bank = [], []
            for token, word, following in zip(layer[row], ids, [*ids[1:], -1], strict=True):
                if word == -1:
                    continue
                bank.append(token)
                if following != word:
                    words.append(torch.stack(bank).sum(dim=0))
                    bank = []
            by_layer.append(torch.stack(words))
        summed = torch.stack(by_layer).sum(dim=0)
        result[row, : len(summed)] = summed
    return result


def word_pooling(rounds: int) -> None:
    torch.manual_seed(0)
    batch, length = 32, 97
    layers = torch.randn(4, batch, length, WIDTH)
    ids = (torch.rand(batch, length) < 0.7).cumsum(dim=1) - 1
    ids[:, 0], ids[:, -1] = -1, -1
    as_lists = ids.tolist()

    def ours() -> Tensor:
        return pool_words(sum(layers[1:], layers[0]), ids, "sum")[0]

    assert torch.allclose(ours(), loop_over_tokens(layers, as_lists), atol=1e-4)
    work = {"loop over tokens": lambda: loop_over_tokens(layers, as_lists), "ours": ours}
    compare(f"Word pooling: 4 layers, {batch} reports of {length} tokens", work, rounds, memory=False)


class AllExperts:
    """Computes every expert on every image and keeps one per image, to measure what hard routing saves."""

    def __init__(self, vision_model: torch.nn.Module) -> None:
        self.vision_model = vision_model

    def __call__(self, feature_maps: list[Tensor], expert_ids: Tensor, *_: object) -> tuple[Tensor, ...]:
        size = self.vision_model.map_size(feature_maps)
        parts = [expert(feature_maps, size) for expert in self.vision_model.experts]
        rows = torch.arange(len(expert_ids))
        return tuple(torch.stack(values)[expert_ids, rows] for values in zip(*parts, strict=True))


class AuthorsExperts:
    """What the authors' code does after the backbone: all experts, with scores from up-sampled tokens."""

    def __init__(self, vision_model: torch.nn.Module) -> None:
        self.experts = vision_model.experts

    def __call__(self, feature_maps: list[Tensor], expert_ids: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        """Return local maps (B, D, H/4, W/4) and scale weights (B, S, H/4, W/4)."""
        height, width = feature_maps[0].shape[2:]
        locals_, weights = [], []
        for expert in self.experts:
            aligned = []
            for feature_map, (linear, _) in zip(feature_maps, expert.scale_projections, strict=True):
                tokens = torch.conv1d(feature_map.flatten(2), linear.weight.flatten(2), linear.bias).relu()
                tokens = torch.nn.functional.interpolate(
                    tokens, size=height * width, mode="linear", align_corners=False
                )
                aligned.append(tokens.transpose(1, 2))
            stacked = torch.stack(aligned, dim=1)  # (B, S, M, D)
            scorer = expert.scale_attention
            linear = torch.nn.functional.linear
            hidden = linear(stacked, scorer.fc1.weight.flatten(1), scorer.fc1.bias).relu()
            weights.append(linear(hidden, scorer.fc2.weight.flatten(1), scorer.fc2.bias).softmax(dim=1))
            locals_.append((weights[-1] * stacked).sum(dim=1))
        rows = torch.arange(len(expert_ids)), expert_ids
        local = torch.stack(locals_, dim=1)[rows].transpose(1, 2).unflatten(2, (height, width))
        return local, torch.stack(weights, dim=1)[rows].squeeze(-1).unflatten(2, (height, width))


def step_of(model: MedMoEModel, batch: int, words: int) -> Callable[[], None]:
    """Return a training step, forward and backward, on random images and reports of `words` words."""
    side = model.config.vision_config.image_size or 224
    pixels = torch.randn(batch, 3, side, side)
    tokens = torch.randint(1000, 20000, (batch, words + 2))
    word_ids = torch.arange(words + 2).sub(1).expand(batch, -1).clone()
    word_ids[:, -1] = -1
    texts = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "word_ids": word_ids}
    labels = torch.arange(batch) % 6

    def work() -> None:
        model.zero_grad(set_to_none=True)
        model(pixel_values=pixels, **texts, modality_labels=labels, return_loss=True).loss.backward()

    return work


def with_attributes(work: Callable[[], None], *changes: tuple[object, str, object]) -> Callable[[], None]:
    """Return a call for which attributes of objects have other values."""

    def changed() -> None:
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
        for owner, name, value in changes:
            setattr(owner, name, value)
        try:
            work()
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)

    return changed


def training_step(batch: int, rounds: int) -> None:
    torch.manual_seed(0)
    for preset in ("paper", "official"):
        model = MedMoEModel(MedMoEConfig.from_preset(preset))
        if preset == "official":
            freeze(model, ["text_model"])
        train_mode(model)
        step, vision = step_of(model, batch, WORDS - 2), model.vision_model
        if preset == "paper":
            direct = "all six experts on every image"
            work = {direct: with_attributes(step, (vision, "fuse", AllExperts(vision)))}
        else:
            direct = "direct implementation"
            terms = lambda config, maps, words, mask, gather: reference_similarity(maps, words[:, :WORDS])  # noqa: E731
            changes = (vision, "fuse", AuthorsExperts(vision)), (modeling_medmoe, "local_terms", terms)
            work = {direct: with_attributes(step, *changes)}
        work["ours"] = step
        compare(f"A step of `{preset}` (forward and backward), batch {batch}, 224 pixels", work, rounds)


def pooled_step(batch: int, rounds: int) -> None:
    """Compare a step on whole maps with one on pooled maps."""
    lowest = [f"vision_model.backbone.features.{name}" for name in ("conv_stem", "bn1", "blocks.[0-2]")]
    cases = [
        ("small", {}, batch, 10, lowest),
        ("small", {"image_size": 192, "map_size": 48}, batch, 19, lowest),
        ("plus", {}, max(1, batch // 6), 19, []),
    ]
    for memory in ("returned", "kept"):
        if memory == "kept":
            keep_freed_memory()  # for the rest of the process
        for preset, vision, size, most, frozen in cases:
            torch.manual_seed(0)
            model = MedMoEModel(MedMoEConfig.from_preset(preset, local_loss_regions=None, vision_config=vision))
            freeze(model, ["text_model", *frozen])
            train_mode(model)
            step = step_of(model, size, 8)  # captions from labels
            side = model.config.vision_config.map_size or 56
            pooled = with_attributes(step, (model.config, "local_loss_regions", most))
            title = f"A step of `{preset}` (forward and backward), batch {size}, text tower frozen, memory {memory}"
            compare(title, {f"map of {side}x{side}": step, f"pooled to {most}x{most}": pooled}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    parser.add_argument("--batches", type=int, nargs="*", default=[16, 32, 48], help="batch sizes of the local loss")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of threads")
    parser.add_argument("--step-batch", type=int, default=8, help="batch size of the steps of `paper` and `official`")
    parser.add_argument("--small-batch", type=int, default=48, help="batch size of the step of `small`")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.set_num_threads(arguments.threads)
    for batch in arguments.batches:
        local_loss(batch, arguments.rounds)
        pooled_regions(batch, arguments.rounds)
    word_pooling(max(10, arguments.rounds))
    training_step(arguments.step_batch, arguments.rounds)
    pooled_step(arguments.small_batch, arguments.rounds)


if __name__ == "__main__":
    main()
