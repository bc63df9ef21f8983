"""Whole runs on two processes, by DDP and by FSDP2, against one process: weights after the last step."""

import json
import os

import pytest
import torch
from processes import free_port
from processes import launch as launch_processes
from safetensors.torch import load_file
from small_models import EXACT
from test_loop import config
from test_stopping import labelled

pytestmark = pytest.mark.slow


def run_of(folder, kind, preset, world, **changes):
    return config(
        folder / kind,
        model={"preset": preset, "overrides": EXACT},
        batch_size=6 // world // changes.get("gradient_accumulation_steps", 1),
        max_steps=3,
        evaluate_every=2,
        evaluation_samples=11,
        checkpoints={"every_steps": 2},
        **changes,
    )


def sharded_on_a_cpu(make):
    """Accelerate's FSDP2 on CPUs: it works there, but its own settings allow it on accelerators alone."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    def made(**arguments):
        accelerator = make(**arguments)
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["SwinStage", "MedMoEExpert", "BertLayer"],
            cpu_ram_efficient_loading=False,
        )
        return accelerator

    return made


def launched(rank, world, port, folder, kind, preset, changes, stop):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    from medmoe_hf.errors import Interrupted
    from medmoe_hf.training import loop, run_state

    if kind.startswith("fsdp"):
        run_state.Accelerator = sharded_on_a_cpu(run_state.Accelerator)
    run = loop.TrainingRun(run_of(folder, kind, preset, world, **changes), "auto")
    if kind.startswith("fsdp"):
        assert type(run.inner).__name__.startswith("FSDP")
    # Adam makes whole steps of gradients that are all rounding noise, some 1e-9; with this they stay that small.
    for group in run.optimizer.param_groups:
        group["eps"] = 1e-6
    if stop and rank == world - 1:  # a signal that only one of them gets
        run._signal = 15
    try:
        run.train()
    except Interrupted:
        assert stop
    run.accelerator.end_training()


def launch(folder, kind, preset, world, stop=False, **changes):
    launch_processes(launched, world, free_port(), folder, kind, preset, changes, stop, count=world)


def assert_near(folder, first, second, bound):
    one, other = (load_file(folder / kind / "model.safetensors") for kind in (first, second))
    assert one.keys() == other.keys()
    for name, value in one.items():
        # a shift that a softmax does not see has a gradient of rounding noise, and Adam makes steps of it
        if not name.endswith(("scale_attention.fc2.bias", "key.bias", "k_proj.bias")):
            difference = (value.float() - other[name].float()).abs().max()
            assert difference <= bound * max(1, value.abs().max()), name


@pytest.mark.parametrize("preset", ["tiny", "plus"])
def test_ddp_and_fsdp2_equal_one_process(tmp_path, preset):
    bound = {"tiny": 2e-5, "plus": 2e-4}[preset]  # of steps of 1e-3 to 3e-3; see test_negatives for `plus`
    launch(tmp_path, "one", preset, 1)
    for kind in ("ddp", "fsdp"):
        launch(tmp_path, kind, preset, 2)
        assert_near(tmp_path, "one", kind, bound)


def test_a_part_that_is_trained_later_and_zero_shot_are_equal_on_two_processes(tmp_path):
    """DDP is told once which parameters have gradients; here some have none in the first two of three steps."""
    data = {
        "train": {"kind": "phantom", "image_size": 64},
        "evaluation": labelled(tmp_path / "data"),
        "num_workers": 0,
    }
    changes = {"data": data, "unfreeze_at": {"vision_model.backbone": 2}, "zero_shot": {"smallest_class": 1}}
    launch(tmp_path, "one", "tiny", 1, **changes)
    launch(tmp_path, "ddp", "tiny", 2, stop=True, **changes)
    launch(tmp_path, "ddp", "tiny", 2, **changes)
    assert_near(tmp_path, "one", "ddp", 2e-5)
    records = [json.loads((tmp_path / kind / "training.json").read_text()) for kind in ("one", "ddp")]
    for first, second in zip(*(record["evaluations"] for record in records), strict=True):
        assert first["zero_shot_pairs"] == second["zero_shot_pairs"] > 0
        assert first["zero_shot"] == pytest.approx(second["zero_shot"])
    first, second = (
        load_file(tmp_path / kind / "model.safetensors") for kind in ("ddp-run/checkpoints/step-00000002", "ddp")
    )
    changed = {name for name, value in first.items() if not torch.equal(value, second[name])}
    assert any(name.startswith("vision_model.backbone.encoder") for name in changed)


def test_a_sharded_run_is_resumed_to_the_same_weights(tmp_path):
    launch(tmp_path, "fsdp", "tiny", 2)
    launch(tmp_path, "fsdp-stopped", "tiny", 2, stop=True)
    launch(tmp_path, "fsdp-stopped", "tiny", 2)
    assert_near(tmp_path, "fsdp", "fsdp-stopped", 0)


def test_cached_steps_on_two_processes_are_resumed_and_equal_one_process(tmp_path):
    """Six pairs a step: two processes with three micro-batches of one pair, against one batch of six."""
    launch(tmp_path, "one", "tiny", 1)
    changes = {"gradient_accumulation_steps": 3}
    launch(tmp_path, "cached", "tiny", 2, stop=True, **changes)
    launch(tmp_path, "cached", "tiny", 2, **changes)
    assert_near(tmp_path, "one", "cached", 2e-5)
