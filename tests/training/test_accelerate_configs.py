"""The files of examples/accelerate, read by Accelerate itself."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from medmoe_hf import MedMoEModel

FOLDER = Path(__file__).parents[2] / "examples" / "accelerate"


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero2", "DEEPSPEED")])
def test_accelerate_reads_it(name, kind):
    assert load_config_from_file(str(FOLDER / f"{name}.yaml")).distributed_type == kind


def test_fsdp_wraps_what_the_model_says():
    config = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config
    wrapped = config["fsdp_transformer_layer_cls_to_wrap"].split(",")
    assert set(MedMoEModel._no_split_modules) < set(wrapped)
