"""Start checkpoints for the question of the paper: does one expert per modality help?

    python examples/experiments/real/variants.py START OUTPUT [--seed 0]

START is a checkpoint (of `medmoe init`, or of training). OUTPUT gets three that differ in their experts only:

- `routed`: one expert per modality, as START;
- `shared`: one expert for all images, wider, with as many parameters as all experts of `routed` (within 1 %);
- `none`: no expert; each scale of the pyramid is projected by one linear layer, and the global embedding is that of
  the backbone.

All experts are new, with weights drawn from the seed; everything else has START's weights as far as the shapes agree.
The routers stay in all three, and are trained by the same auxiliary loss: in `shared` and `none` they classify
modalities but select nothing, so that the backbone learns from the same losses.
"""

import argparse
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from medmoe_hf.model import MedMoEConfig, MedMoEModel, MedMoEProcessor
from medmoe_hf.model.modeling_medmoe import expert_class


def expert_parameters(config: MedMoEConfig, channels: list[int]) -> int:
    """The number of parameters of all experts.

    Args:
        config: A configuration.
        channels: Widths of the levels of its pyramid.
    """
    vision = config.vision_config
    with torch.device("meta"):
        expert = expert_class(vision.expert_type)(vision, channels)
    one = sum(parameter.numel() for parameter in expert.parameters())
    return one if vision.shared_expert else one * vision.num_experts


def changed(config: MedMoEConfig, **changes: Any) -> MedMoEConfig:
    """A copy of a configuration with other fields of `vision_config`."""
    copy = deepcopy(config)
    for name, value in changes.items():
        setattr(copy.vision_config, name, value)
    copy.vision_config.validate()
    return copy


def matching_width(config: MedMoEConfig, channels: list[int]) -> int:
    """The `expert_hidden_size` with which one expert has as many parameters as all experts of a configuration.

    Args:
        config: A configuration with one convolutional expert per modality.
        channels: Widths of the levels of its pyramid.

    Returns:
        The width with the closest number.
    """
    wanted = expert_parameters(config, channels)

    def of(width: int) -> int:
        return expert_parameters(changed(config, shared_expert=True, expert_hidden_size=width), channels)

    low, high = 1, config.vision_config.expert_hidden_size
    while of(high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:  # the number grows with the width
        middle = (low + high) // 2
        low, high = (middle, high) if of(middle) < wanted else (low, middle)
    return min((low, high), key=lambda width: abs(of(width) - wanted))


def variants(config: MedMoEConfig, channels: list[int]) -> dict[str, MedMoEConfig]:
    """The configuration of each variant; see the top of this file.

    Args:
        config: The configuration with one expert per modality.
        channels: Widths of the levels of its pyramid.
    """
    wide = matching_width(config, channels)
    return {
        "routed": changed(config),
        "shared": changed(config, shared_expert=True, expert_hidden_size=wide),
        "none": changed(config, shared_expert=True, expert_type="linear", global_features="backbone"),
    }


def write(start: str, output: Path, seed: int = 0) -> dict[str, int]:
    """Writes the three checkpoints.

    Returns:
        The number of parameters of each variant's experts.
    """
    source, processor = MedMoEModel.from_pretrained(start), MedMoEProcessor.from_pretrained(start)
    weights, channels = source.state_dict(), source.vision_model.backbone.channels
    sizes = {}
    for name, config in variants(source.config, channels).items():
        torch.manual_seed(seed)
        model = MedMoEModel(config)
        own = model.state_dict()
        kept = {
            key: value
            for key, value in weights.items()
            if key in own and own[key].shape == value.shape and not key.startswith("vision_model.experts.")
        }
        model.load_state_dict(own | kept)
        model.save_pretrained(output / name)
        processor.save_pretrained(output / name)
        sizes[name] = expert_parameters(config, channels)
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("start", help="checkpoint with one expert per modality")
    parser.add_argument("output", type=Path, help="folder for the three checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="seed of the new experts")
    arguments = parser.parse_args()
    for name, size in write(arguments.start, arguments.output, arguments.seed).items():
        print(f"{arguments.output / name}: {size:,} parameters in experts")


if __name__ == "__main__":
    main()
