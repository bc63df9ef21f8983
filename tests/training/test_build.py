"""What is decayed, how fast layers learn, what is frozen."""

import pytest
import torch
from small_models import SMALL

from medmoe_hf.training import build_model
from medmoe_hf.training.config import ModelSection
from medmoe_hf.training.optimizer import freeze, frozen_norms, parameter_groups, train_mode


@pytest.fixture
def model():
    return build_model(ModelSection(preset="tiny", overrides=SMALL))[0]


def test_every_parameter_is_in_one_group_and_only_matrices_decay(model):
    groups = parameter_groups(model, 0.1, 1e-3, layer_decay=0.5)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            table = "position" in name or "token_type" in name
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 and not table else 0.0), name


def test_rates_fall_from_layer_to_layer(model):
    rates = {}
    for group in parameter_groups(model, 0.1, 1.0, layer_decay=0.5):
        rates |= {id(parameter): group["lr"] for parameter in group["params"]}
    of = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    assert of["vision_model.experts.0.scale_attention.fc1.weight"] == of["report_router.fc1.weight"] == 1.0
    blocks = [
        of[f"vision_model.backbone.encoder.layers.{stage}.blocks.0.layernorm_before.weight"] for stage in range(4)
    ]
    assert blocks == [0.0625, 0.125, 0.25, 0.5]
    assert of["vision_model.backbone.embeddings.patch_embeddings.projection.weight"] == 0.03125
    assert of["text_model.encoder.encoder.layer.0.output.dense.weight"] == 0.5
    assert of["text_model.encoder.embeddings.word_embeddings.weight"] == 0.25


def rates_of(model, *arguments, **options):
    rates = {}
    for group in parameter_groups(model, *arguments, **options):
        rates |= {id(parameter): group["lr"] for parameter in group["params"]}
    return {name: rates[id(parameter)] for name, parameter in model.named_parameters()}


def test_parts_have_learning_rates_of_their_own_and_the_last_pattern_counts(model):
    rates = {"*.experts.*": 3.0, "vision_model.backbone": 2.0, "*.experts.1": 4.0, "*.encoder.layers.[0-2]": 8.0}
    found = rates_of(model, 0.1, 1.0, learning_rates=rates)
    for name, rate in found.items():
        inside = name.startswith("vision_model.backbone.")
        lower = name.startswith(tuple(f"vision_model.backbone.encoder.layers.{stage}." for stage in range(3)))
        expected = 8.0 if lower else 2.0 if inside else 1.0
        if ".experts." in name:
            expected = 4.0 if ".experts.1." in name else 3.0
        assert rate == expected, name
    decayed = rates_of(model, 0.1, 1.0, layer_decay=0.5, learning_rates=rates)
    plain = rates_of(model, 0.1, 1.0, layer_decay=0.5)
    assert decayed == {name: plain[name] * found[name] for name in found}
    titles = [group["name"] for group in parameter_groups(model, 0.1, 1.0, 0.5, rates)]
    assert "*.experts.*, decayed" in titles
    assert "vision_model layer 3.0 (vision_model.backbone), decayed" in titles
    assert "other parts, not decayed" in titles
    with pytest.raises(
        ValueError, match=r"`learning_rates`: no parameter .*\"vision_model.bakbone\".*Nearest: .*backbone"
    ):
        parameter_groups(model, 0.1, 1.0, learning_rates={"vision_model.bakbone": 1.0})


def test_statistics_of_a_part_can_be_frozen_alone(model):
    expert = model.vision_model.experts[1]
    norms = frozen_norms(model, ["*.experts.1.scale_projections.0"])
    assert norms == [layer.batch_norm for layer in expert.scale_projections[0]]
    with pytest.raises(ValueError, match=r"`freeze_statistics`: no BatchNorm is in `text_model`"):
        frozen_norms(model, ["text_model"])


def test_frozen_parts_stay_in_evaluation_mode(model):
    freeze(model, ["text_model", "*.experts.2.*"])
    train_mode(model)
    assert not any(module.training for module in model.text_model.encoder.encoder.layer.modules())
    assert not any(module.training for module in model.vision_model.experts[2].modules() if list(module.parameters()))
    assert all(module.training for module in model.vision_model.experts[1].modules())
    running = model.vision_model.experts[2].scale_projections[0][0].batch_norm
    running(torch.randn(2, 8, 4, 4) + 5)
    assert not running.running_mean.any()
    freeze(model, ["*"])
    with pytest.raises(ValueError, match="No parameter is trainable"):
        parameter_groups(model, 0.1)
