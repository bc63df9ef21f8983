"""What a process of several does in test_exchange.py; a module of its own, since these processes import it."""

import os
from bisect import bisect_left
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed
from two_ranks import TYPES, batch_of, computing_in, model_of, multiplying_in, outcome

from medmoe_hf.model import MedMoEConfig, local_loss_kernel_medmoe, word_regions_medmoe
from medmoe_hf.model.losses_medmoe import local_terms, training_losses
from medmoe_hf.training import exchange
from medmoe_hf.training.cached import cached_step
from medmoe_hf.training.negatives import gather_rows

WIDTH, SLOTS, PAIRS = 6, 14, 8
# Which pairs each process has.
EDGES = {2: {"equal": (0, 4, 8), "unequal": (0, 3, 8)}, 3: {"unequal": (0, 1, 5, 8), "one without": (0, 5, 5, 8)}}
# Sides of the map, and to what it is pooled: words are smaller than maps, and larger than pooled maps.
TRAVELS = {"words": None, "regions": 2}
# Whether the backward pass finds the intermediate results of all blocks, of the first one, or of none.
KEPT = "all", "one", "none"
# Images, side of the maps and words of a caption, whose memory is measured; what travels is the key.
MEASURED = {"words": (8, 16, 6), "regions": (8, 3, 14)}
DEPTH = 48
GROUPS = [0, -1, 1, 0, 1, 0, -1, 2]


def config_of(travels, dtype):
    config = MedMoEConfig.from_preset("tiny", local_loss="gloria", local_loss_regions=TRAVELS[travels])
    return multiplying_in(dtype, config)


def blocks_of(travels, edges):
    _, mask = pairs()
    side = TRAVELS[travels]
    sides = (4, 5) if side is None else (side, side)
    return [
        exchange.Block(last - first, *sides, last - first, int(mask[first:last].sum()))
        for first, last in pairwise(edges)
    ]


def keep(kept, blocks):
    """Sets the limit of memory so that the plan keeps this."""
    wanted = {"all": len(blocks), "one": 1, "none": 0}[kept]

    def kept_with(limit):
        word_regions_medmoe._KEPT_ELEMENTS = limit
        return exchange.plan_exchange(blocks, WIDTH).kept

    kept_with(bisect_left(range(2**16), wanted, key=kept_with))
    assert exchange.plan_exchange(blocks, WIDTH).kept == wanted


def pairs():
    """All pairs: regions, words, mask, and global embeddings; one report has no words, and words stand anywhere."""
    draw = torch.Generator().manual_seed(3)
    regions = 0.4 * torch.randn(PAIRS, WIDTH, 4, 5, generator=draw, dtype=torch.float64)
    words = 0.4 * torch.randn(PAIRS, SLOTS, WIDTH, generator=draw, dtype=torch.float64)
    mask = torch.rand(PAIRS, SLOTS, generator=draw) < 0.5
    mask[:2, 3], mask[5] = True, False
    image, text = torch.randn(2, PAIRS, WIDTH, generator=draw, dtype=torch.float64)
    return {"regions": regions, "words": words, "image": image, "text": text}, mask


def losses_of(config, leaves, mask, groups, together):
    terms = local_terms(config, leaves["regions"], leaves["words"], mask, together.get("exchange"))
    ones = [leaves["image"], leaves["text"], leaves["text"], terms, mask.any(dim=1), [], None]
    return training_losses(config, 10.0, *ones, together.get("gather"), groups)


def result(losses, leaves):
    found = {f"gradient {name}": leaf.grad for name, leaf in leaves.items()}
    found |= {name: losses[name].detach() for name in ("loss", "loss_global", "loss_local")}
    return {name: value.clone().contiguous() for name, value in found.items()}


def run(rank, world, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    for edges_name, edges in EDGES[world].items():
        rows = slice(*edges[rank : rank + 2])
        for dtype in TYPES:
            for travels in TRAVELS:
                for kept in KEPT:
                    keep(kept, blocks_of(travels, edges))
                    name = f"{world} {edges_name} {dtype} {travels} {kept} {rank}"
                    save_file(compared(rows, TYPES[dtype], travels), Path(folder) / f"{name}.safetensors")
    word_regions_medmoe._KEPT_ELEMENTS = 2**27
    edges = EDGES[world]["unequal"]
    for mode in ("ranks", "global"):
        modelled(rank, slice(*edges[rank : rank + 2]), Path(folder) / f"{world} {mode} {rank}.safetensors", mode)
    if world == 2:
        for name, (images, side, words) in MEASURED.items():
            for kept in KEPT:
                (Path(folder) / f"memory {name} {kept} {rank}").write_text(str(peak(images, side, words, kept)))
    distributed.destroy_process_group()


def compared(rows, dtype, travels):
    whole, mask = pairs()
    leaves = {name: value[rows].to(dtype).requires_grad_() for name, value in whole.items()}
    together = {"gather": gather_rows, "exchange": exchange.exchanged_logits}
    with computing_in(dtype):
        losses = losses_of(config_of(travels, dtype), leaves, mask[rows], torch.tensor(GROUPS)[rows], together)
        losses["loss"].backward()
    return result(losses, leaves)


def modelled(rank, rows, path, mode):
    """A model with multi-positive targets; the gradients of processes are averaged, by DDP or by the step."""
    model, collator = model_of("groups", torch.float64)
    batch = batch_of(collator, rows, torch.float64)
    with computing_in(torch.float64):
        if mode == "global":
            losses = cached_step(model, [batch])
        else:
            wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
            losses = wrapped(**batch, gather=gather_rows, exchange=exchange.exchanged_logits)
            losses.loss.backward()
    save_file(outcome(model, losses), path)


def peak(images, side, words, kept):
    """The peak of memory of the exchange and its gradients, by the allocator's own events, in bytes.

    As on a GPU, where the kernels themselves allocate nothing; here they do nothing at all.
    """
    blocks = [exchange.Block(images, side, side, images, images * words)] * 2
    local_loss_kernel_medmoe._KEPT_ELEMENTS = {"all": 2**29, "one": kept_limit(blocks, 1), "none": 0}[kept]
    local_loss_kernel_medmoe._WORKSPACE_ELEMENTS = 4 * 2 * 128 * side * side
    launcher = local_loss_kernel_medmoe._Launcher
    launcher._tiles = launcher.cosines = lambda *arguments: None
    launcher.pulls = lambda self, contexts, unit_words, *rest: torch.zeros_like(unit_words)
    os.environ[local_loss_kernel_medmoe.SWITCH] = "1"
    leaves = torch.randn(images, DEPTH, side, side), torch.randn(images, words, DEPTH)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    mask = torch.ones(images, words, dtype=torch.bool)
    config = MedMoEConfig.from_preset("tiny", local_loss="gloria")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.autograd.grad(local_terms(config, *leaves, mask, exchange.exchanged_logits).sum(), leaves)
    del os.environ[local_loss_kernel_medmoe.SWITCH]
    events = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(events))


def kept_limit(blocks, wanted):
    """The smallest limit with which the plan keeps so many blocks."""

    def kept_with(limit):
        local_loss_kernel_medmoe._KEPT_ELEMENTS = limit
        return exchange.plan_exchange(blocks, DEPTH, kernel=True).kept

    return bisect_left(range(2**22), wanted, key=kept_with)
