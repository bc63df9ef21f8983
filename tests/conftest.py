"""What the tests share: no network, no caches outside a temporary folder, and a model small enough for all of them."""

import logging
import os
import tempfile
from collections.abc import Callable
from typing import Any

# Read by the libraries when they are imported, so this comes first.
_HF_HOME = tempfile.TemporaryDirectory(prefix="medmoe_hf_home_")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=_HF_HOME.name)
# A stream counts whatever its readers raise; here an exception that none of them expects is raised.
os.environ["MEDMOE_STRICT_READERS"] = "1"
# Triton reads it once: kernels run on the CPU.
os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from medmoe_hf.common import console  # noqa: E402
from medmoe_hf.model import MedMoEConfig  # noqa: E402

torch.set_num_threads(1)

SMALL: dict[str, Any] = {
    "text_config": {
        "vocab_size": 90,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 48,
    },
    # as in the paper, where `tiny` differs
    "projection_dim": None,
    "temp1": 4.0,
    "temp2": 5.0,
    "temp3": 10.0,
    "num_summed_layers": 2,
    "vision_config": {
        "image_size": 64,
        "global_features": "backbone",
        "initializer_range": 0.02,
        "swin_config": {
            "embed_dim": 8,
            "depths": (2, 2, 2, 2),
            "num_heads": (1, 1, 2, 2),
            "window_size": 4,
            "drop_path_rate": 0.0,
        },
        "expert_hidden_size": 8,
        "local_size": 64,
        "scale_attention_size": 8,
        "router_hidden_size": 16,
    },
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    nested = [key for key in base.keys() & changes.keys() if isinstance(base[key], dict)]
    return base | changes | {key: merged(base[key], changes[key]) for key in nested}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2`, a file's tests run in one process: what its fixtures make is made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_config() -> Callable[..., MedMoEConfig]:
    """Makes the configuration of the paper's model in miniature (64x64 images, widths of 64), with changes on top."""
    return lambda **changes: MedMoEConfig.from_preset("tiny", **merged(SMALL, changes))


def _lived_in(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 2.0)
            elif tensor.is_floating_point() and tensor.dim() == 1:
                tensor.add_(0.3 * torch.randn_like(tensor))
    return model.eval()


@pytest.fixture(scope="session")
def lived_in() -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Moves a new model's running statistics, scales and biases: at their first values many mistakes do not show."""
    return _lived_in


@pytest.fixture
def logging_as_before():
    """Commands set up logging and variables for their whole process."""
    root, own = logging.getLogger(), logging.getLogger("medmoe_hf")
    before = root.level, own.level, list(root.handlers), console._quiet, dict(os.environ)
    yield
    root.setLevel(before[0])
    own.setLevel(before[1])
    root.handlers[:] = before[2]
    console._quiet = before[3]
    for name in os.environ.keys() - before[4].keys():
        del os.environ[name]
