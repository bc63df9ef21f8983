"""One expert for all modalities, no expert, and the example that gives them as many parameters."""

import importlib.util
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import conv2d, interpolate

from medmoe_hf.data import phantom_sample, phantom_vocabulary
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.model import (
    MedMoEConfig,
    MedMoEImageProcessor,
    MedMoEModel,
    MedMoEProcessor,
    MedMoETokenizer,
    MedMoEVisionConfig,
)
from medmoe_hf.model.modeling_medmoe import MedMoELinearExpert
from medmoe_hf.training.cached import cached_step

_path = Path(__file__).parents[2] / "examples" / "experiments" / "real" / "variants.py"
_spec = importlib.util.spec_from_file_location("variants", _path)
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)

EXACT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def processor():
    tokenizer = MedMoETokenizer.from_words(phantom_vocabulary(), max_length=32)
    return MedMoEProcessor(MedMoEImageProcessor(size={"height": 64, "width": 64}), tokenizer)


def pair_of(small_config, processor, **changes):
    """A model with a shared expert, and one whose six experts are copies of it."""
    text = {"vocab_size": len(processor.tokenizer), **EXACT}
    made = []
    for shared in (True, False):
        torch.manual_seed(0)
        vision = {"shared_expert": shared, "swin_config": {"drop_path_rate": 0.0}}
        made.append(MedMoEModel(small_config(projection_dim=16, text_config=text, vision_config=vision, **changes)))
    one, six = made
    state = one.state_dict()
    for name in six.state_dict():
        if ".experts." in name:
            state[name] = one.state_dict()[".".join([*name.split(".")[:2], "0", *name.split(".")[3:]])].clone()
    six.load_state_dict(state)
    return one, six


@pytest.mark.parametrize("router", ["report", "both"])
def test_a_shared_expert_is_six_equal_ones(small_config, processor, router):
    one, six = pair_of(small_config, processor, router=router)
    assert len(one.vision_model.experts) == 1
    assert one.vision_model.router.fc2.out_features == 6
    batch = ContrastiveCollator(processor)([phantom_sample(0, index, image_size=64) for index in range(8)])
    batch["modality"] = [0, 1, 2, 3, 4, 5, None, 1]
    plain = {name: value for name, value in batch.items() if name not in ("return_loss", "modality_labels")}
    for model in (one, six):
        model.eval()
    with torch.no_grad():
        first, second = one(**batch), six(**batch)
        assert first.expert_ids.unique().tolist() == list(range(6))  # still modalities
        for name in ("loss", "loss_aux", "local_embeds", "logits_per_image", "expert_ids", "scale_weights"):
            torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-5)
        for inputs in (plain, {**plain, "modality": None}):
            found = [model(**inputs).logits_per_image for model in (one, six)]
            torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
        features = [model.get_image_features(batch["pixel_values"], modality="ct") for model in (one, six)]
        torch.testing.assert_close(features[0].local_embeds, features[1].local_embeds, rtol=1e-5, atol=1e-5)
    one(**batch).loss.backward()
    six(**batch).loss.backward()
    own = dict(six.named_parameters())
    for name, parameter in one.named_parameters():
        inside = ".experts.0." in name
        parts = (
            [own[name.replace(".experts.0.", f".experts.{expert}.")] for expert in range(6)] if inside else [own[name]]
        )
        expected = sum(part.grad for part in parts if part.grad is not None)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_a_cached_step_of_a_shared_expert_equals_one_batch(small_config, processor, kind):
    """In training mode the BatchNorm of the expert sees the images of all modalities."""
    one, _ = pair_of(small_config, processor)
    one.vision_model.config.expert_type = kind
    model = MedMoEModel(one.config).train()
    other = deepcopy(model)
    collator = ContrastiveCollator(processor)
    samples = [phantom_sample(0, index, image_size=64) for index in range(8)]
    output = model(**collator(samples))
    output.loss.backward()
    losses = cached_step(other, [collator(samples[:3]), collator(samples[3:])])
    assert losses["expert_counts"].tolist() == [8]
    assert losses["loss"].item() == pytest.approx(output.loss.item(), rel=1e-5)
    for (name, first), second in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(second.grad, first.grad, rtol=1e-2, atol=1e-4, msg=name)


def test_the_linear_expert_is_the_mean_of_projected_scales():
    torch.manual_seed(0)
    config = MedMoEVisionConfig(expert_type="linear", local_size=5)
    expert = MedMoELinearExpert(config, [3, 4])
    maps = [torch.randn(2, 3, 8, 8), torch.randn(2, 4, 4, 4)]
    local, weights = expert(maps)
    layers = expert.scale_projections
    fine, coarse = (conv2d(one, layer.weight, layer.bias) for one, layer in zip(maps, layers, strict=True))
    large = interpolate(coarse, size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(local, (fine + large) / 2)
    assert torch.equal(weights, torch.full((2, 2, 8, 8), 0.5))
    torch.testing.assert_close(expert(maps, mean_only=True)[0], local.mean(dim=(2, 3)))


def test_no_mixture_of_one_expert():
    with pytest.raises(Exception, match="`shared_expert` is one"):
        MedMoEVisionConfig(shared_expert=True, mixture="soft")


@pytest.mark.parametrize(
    ("preset", "channels", "changes"),
    [
        ("paper", [96, 192, 384, 768], {}),
        ("plus", [24, 40, 112, 320], {"expert_hidden_size": 64, "local_size": 192, "scale_attention_size": 64}),
    ],
)
def test_the_wide_expert_has_the_parameters_of_six_within_one_per_cent(preset, channels, changes):
    config = MedMoEConfig.from_preset(preset, vision_config=changes)
    made = example.variants(config, channels)
    sizes = {name: example.expert_parameters(one, channels) for name, one in made.items()}
    assert sizes["shared"] == pytest.approx(sizes["routed"], rel=0.01)
    assert sizes["none"] < 0.2 * sizes["routed"]
    assert config.vision_config.shared_expert is False  # the given one is not changed


def test_start_checkpoints_differ_in_their_experts_only(small_config, processor, tmp_path):
    text = {"vocab_size": len(processor.tokenizer)}
    vision = {"expert_hidden_size": 24, "global_features": "both"}
    start = MedMoEModel(small_config(projection_dim=16, text_config=text, vision_config=vision))
    start.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    sizes = example.write(str(tmp_path / "start"), tmp_path / "out")
    for name, size in sizes.items():
        model = MedMoEModel.from_pretrained(tmp_path / "out" / name)
        MedMoEProcessor.from_pretrained(tmp_path / "out" / name)
        assert sum(one.numel() for one in model.vision_model.experts.parameters()) == size
        own = model.state_dict()
        other = {
            key
            for key, value in start.state_dict().items()
            if ".experts." not in key and not (key in own and torch.equal(own[key], value))
        }
        assert other == ({"visual_projection.weight"} if name == "none" else set())
    assert sizes["shared"] == pytest.approx(sizes["routed"], rel=0.03)  # steps of a width of few units are coarse
