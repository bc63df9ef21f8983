"""Inference in bfloat16, in another memory format and in int8, beside float32."""

import copy

import pytest
import torch
from torch.nn.functional import cosine_similarity

from medmoe_hf.model import MedMoEModel
from medmoe_hf.model.presets_medmoe import PRESETS

# What tells the presets apart, at the small size of `small_config`.
TELLING = ("word_rule", "report_length", "word_pooling", "router", "learned_scale")
TELLING_VISION = (
    "expert_type",
    "global_features",
    "pyramid_norm",
    "scale_attention_native",
    "router_norm",
)
IMAGES = 12


@pytest.fixture(scope="module", params=["paper", "plus", "official"])
def model(request, small_config):
    torch.manual_seed(0)
    preset = PRESETS[request.param]
    vision = preset.get("vision_config", {})
    config = small_config(
        **{name: preset[name] for name in TELLING if name in preset},
        projection_dim=48,
        vision_config={name: vision[name] for name in TELLING_VISION if name in vision}
        | {"swin_config": vision.get("swin_config", {})},
    )
    model = MedMoEModel(config).eval()
    with torch.no_grad():
        for name, tensor in model.vision_model.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 2.0)
            elif tensor.is_floating_point() and tensor.dim() == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


@pytest.fixture(scope="module")
def pixel_values(model):
    """Images whose routing differs, and is no matter of rounding."""
    candidates = 2 * torch.randn(40 * IMAGES, 3, 64, 64) + torch.randn(40 * IMAGES, 3, 1, 1)
    router = model.vision_model.router
    with torch.no_grad():
        pooled = model.vision_model.encode(candidates).pooler_output
        # As training would: experts are told apart by what differs between images.
        model.vision_model.router.fc2.bias.sub_(router(pooled).mean(dim=0))
        logits = router(pooled)
    best = logits.topk(2).values
    margins = (best[:, 0] - best[:, 1]) / logits.abs().max()
    chosen = []
    for expert in logits.argmax(dim=1).unique():
        rows = (logits.argmax(dim=1) == expert).nonzero().squeeze(1)
        chosen.append(rows[margins[rows].argsort(descending=True)[: IMAGES // 4]])
    return candidates[torch.cat(chosen)]


@torch.no_grad()
def embeddings(model, pixel_values):
    """Global (B, D), regions (B, D, M), words (N, D, L) and reports (N, D), float32; and the experts."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(5, 90, (4, 12), generator=generator)
    images = model.get_image_features(pixel_values.to(model.dtype))
    texts = model.get_text_features(input_ids, word_ids=torch.arange(12).expand(4, -1) // 2)
    words = texts.word_embeds.transpose(1, 2)[..., :6]
    found = images.pooler_output, images.local_embeds.flatten(2), texts.pooler_output, words
    return [part.float() for part in found], images.expert_ids


def smallest_cosines(found, right):
    return [cosine_similarity(one, other, dim=1).min().item() for one, other in zip(found, right, strict=True)]


@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_bfloat16_stays_near_float32(model, pixel_values, way):
    """Every global, region, report and word embedding; images go where they went."""
    right, experts = embeddings(model, pixel_values)
    assert len(experts.unique()) > 1
    if way == "weights":
        found, routed = embeddings(copy.deepcopy(model).bfloat16(), pixel_values)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found, routed = embeddings(model, pixel_values)
    assert torch.equal(routed, experts)
    assert min(smallest_cosines(found, right)) >= 0.999
    assert not torch.equal(found[0], right[0])


def test_channels_last_gives_the_same(model, pixel_values):
    right, experts = embeddings(model, pixel_values)
    wide = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert wide.vision_model.backbone.get_input_embeddings().weight.is_contiguous(memory_format=torch.channels_last)
    found, routed = embeddings(wide, pixel_values.to(memory_format=torch.channels_last))
    assert torch.equal(routed, experts)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Int8DynamicActivationInt8WeightConfig", "Int8WeightOnlyConfig"])
def test_int8_linear_layers_stay_near_float32(model, pixel_values, kind):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is missing")
    right, _ = embeddings(model, pixel_values)
    small = copy.deepcopy(model)
    quantization.quantize_(small, getattr(quantization, kind)())
    weight = small.vision_model.backbone.encoder.layers[0].blocks[0].mlp.fc1.weight
    assert type(weight).__module__.startswith("torchao")
    found, _ = embeddings(small, pixel_values)
    # Regions only of images that still go to the same expert would be a weaker statement: none may move.
    assert min(smallest_cosines(found, right)) >= 0.99
