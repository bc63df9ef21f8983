"""Processes that tests start: forked from one that has imported the libraries, which takes a second and not ten.

That one does nothing but import, so a process starts as clean as a spawned one. (A fork of the tests' own process,
which has computed in parallel, may hang.)
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([
    "pytest",
    "sklearn.metrics",
    # the first step of an optimizer imports it
    "torch._dynamo",
    "torch.distributed.fsdp",
    "medmoe_hf.cli",
    "medmoe_hf.model.modeling_medmoe",
    "medmoe_hf.search.encode",
    "medmoe_hf.training.loop",
])  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def launch(target: Callable[..., None], *arguments: Any, count: int) -> None:
    """Calls `target(rank, *arguments)` in as many processes, and fails if one of them does."""
    torch.multiprocessing.start_processes(target, arguments, nprocs=count, start_method="forkserver")


def command(stderr: Path, *arguments: str) -> None:
    """What a process does that runs `medmoe` with these arguments, and writes its standard error to a file."""
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    from medmoe_hf.cli import app

    app([*arguments], prog_name="medmoe")
