"""What a process of two does in test_negatives.py; a module of its own, since these processes import it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_models import EXACT
from torch import distributed

from medmoe_hf.data import phantom_sample
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.evaluation.validation import LOSS_PARTS
from medmoe_hf.training import build_model, train
from medmoe_hf.training.cached import cached_step
from medmoe_hf.training.config import ModelSection
from medmoe_hf.training.exchange import exchanged_logits
from medmoe_hf.training.negatives import gather_rows

# What differs between the losses and towers that must come out the same.
CASES = {
    "gloria": ("tiny", {"local_loss": "gloria"}),
    "token": ("tiny", {"local_loss": "token"}),
    "plus": ("plus", {"learned_scale": True}),
    "linear experts": ("official", {}),
    "paper": ("paper", {}),
    "groups": ("tiny", {"positives": "label"}),
    "text similarity": ("tiny", {"positives": "text_similarity", "positives_temperature": 0.02}),
}
# Rank 0 has the first half. Expert 0 and 2 are strange to rank 1, expert 4 to everybody.
MODALITY = [0, 0, 1, 2, 1, 3, 3, 5]
LABELS = [0, 0, 1, 2, -100, 3, 3, 5]
# For the case "groups": a group of three and one of two over both ranks, one within a micro-batch, two unknown.
GROUPS = ["a", None, "b", "a", "b", "a", None, "c"]


TYPES = {"float32": torch.float32, "float64": torch.float64}


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """With float64, what the model brings to float32 by itself (losses, norms, sums) becomes float64 too.

    For the computation alone: models and batches that are made in the block would be other ones.
    """
    to_float, default = torch.Tensor.float, torch.get_default_dtype()
    if dtype == torch.float64:
        torch.Tensor.float = torch.Tensor.double
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.Tensor.float = to_float
        torch.set_default_dtype(default)


def multiplying_in(dtype, config):
    """The configuration for products of this dtype, which it refuses for float64.

    Otherwise products are rounded, and to which sums they belong depends on who computes them.
    """
    object.__setattr__(config, "local_loss_matmul_dtype", str(dtype).removeprefix("torch."))
    return config


def model_of(case, dtype=torch.float32):
    preset, overrides = CASES[case]
    torch.manual_seed(0)
    small = {**EXACT, **overrides}
    if preset == "official":
        small["vision_config"] = {**small["vision_config"], "mixture": "hard"}
    model, processor = build_model(ModelSection(preset=preset, overrides=small))
    multiplying_in(dtype, model.config)
    return model.train().to(dtype), ContrastiveCollator(processor, model.config.positives)


def batch_of(collator, rows, dtype=torch.float32):
    batch = collator([{**phantom_sample(0, index, image_size=64), "group": GROUPS[index]} for index in range(8)])
    batch = {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    batch["modality_labels"] = torch.tensor(LABELS)[rows]
    return batch | {"modality": MODALITY[rows]}


def outcome(model, losses):
    """Gradients, running statistics and losses by name."""
    found = {f"gradient {name}": value.grad for name, value in model.named_parameters() if value.grad is not None}
    found |= {f"buffer {name}": value for name, value in model.named_buffers() if "running_" in name}
    found |= {name: losses[name].detach() for name in LOSS_PARTS}
    return {name: value.clone().contiguous() for name, value in found.items()}


def run(rank, world, folder):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    for case in CASES:
        for name in TYPES:
            both(rank, folder, case, name)
    uneven = torch.ones(2 + rank, 1 + rank, requires_grad=True)
    together = gather_rows(uneven)
    (together * torch.arange(10.0).view(5, 2)).sum().backward()
    save_file({"rows": together.detach(), "gradient": uneven.grad}, Path(folder) / f"uneven {rank}.safetensors")
    distributed.destroy_process_group()
    trained(rank, world, folder)


def both(rank, folder, case, name):
    dtype = TYPES[name]
    rows = slice(4 * rank, 4 * rank + 4)
    model, collator = model_of(case, dtype)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    batch = batch_of(collator, rows, dtype)
    with computing_in(dtype):
        output = wrapped(**batch, gather=gather_rows, exchange=exchanged_logits)
        output.loss.backward()
    save_file(outcome(model, output), Path(folder) / f"ranks {case} {name} {rank}.safetensors")
    model, collator = model_of(case, dtype)
    halves = [slice(4 * rank, 4 * rank + 1), slice(4 * rank + 1, 4 * rank + 4)]
    batches = [batch_of(collator, half, dtype) for half in halves]
    with computing_in(dtype):
        losses = cached_step(model, batches)
    save_file(outcome(model, losses), Path(folder) / f"global {case} {name} {rank}.safetensors")


def trained(rank, world, folder):
    """Two steps of a run, as a launcher starts it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (Path(folder) / "port").read_text()}
    from test_loop import config

    data = {"train": {"kind": "phantom", "image_size": 64}, "num_workers": 0}
    train(config(Path(folder) / "run", data=data, max_steps=2, batch_size=3))
