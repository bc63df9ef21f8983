"""The models: which expert reads which image, what comes out, and that transformers can do with them what it does."""

import copy
import warnings
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertModel, BertTokenizer, Trainer, TrainingArguments
from transformers import SwinConfig as NativeSwinConfig
from transformers import SwinModel as NativeSwinModel
from transformers.modeling_layers import GradientCheckpointingLayer

from medmoe_hf.model import (
    MedMoEConfig,
    MedMoEExpert,
    MedMoEForImageClassification,
    MedMoEModel,
    MedMoESwinConfig,
    MedMoETextConfig,
    MedMoETextModel,
    MedMoEVisionConfig,
    MedMoEVisionModel,
    modeling_medmoe,
    register_expert,
)
from medmoe_hf.model.losses_medmoe import contrastive_loss, cosine_logits, local_logits, local_loss, modality_loss
from medmoe_hf.model.modeling_medmoe import MedMoEConvLayer, MedMoERouter, MedMoESwinModel, align_map, pool_words

BATCH_NORMS = nn.modules.batchnorm._BatchNorm


# Small helpers


class Decided(nn.Module):
    """A router that sends item i to the expert it was told."""

    def __init__(self, expert_ids, num_experts=6):
        super().__init__()
        self.register_buffer("logits", nn.functional.one_hot(torch.tensor(expert_ids), num_experts).float())

    def forward(self, embeds):
        return self.logits.to(embeds.dtype)


def decide(model, images=None, reports=None):
    """Sends the images and the reports of the next calls to these experts."""
    if images is not None:
        model.vision_model.router = Decided(images)
    if reports is not None:
        model.report_router = Decided(reports)


def lived_in(model):
    """Statistics, scales and biases as after training; at their initial values many mistakes would not show."""
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "batch_norm.weight", "norm.weight", "LayerNorm.weight")):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            tensor.normal_(std=0.2)
    return model.eval()


@pytest.fixture
def small(small_config):
    return lambda kind=MedMoEModel, **changes: lived_in(kind(small_config(**changes)))


def images(count=3, height=64, width=64):
    return torch.randn(count, 3, height, width)


def texts(count=3, length=9, vocab_size=90):
    """Reports of `length`, `length` - 1, ... tokens, whose words have two pieces, between [CLS] and [SEP]."""
    lengths = length - torch.arange(count).unsqueeze(1)
    position = torch.arange(length).expand(count, -1)
    return {
        "input_ids": torch.randint(5, vocab_size, (count, length)),
        "attention_mask": (position < lengths).long(),
        "word_ids": torch.where((position > 0) & (position < lengths - 1), (position - 1) // 2, -1),
    }


def row(batch, index):
    return {key: value[index : index + 1] for key, value in batch.items()}


def assert_same(first, second, tolerance=1e-6):
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


@contextmanager
def calls_of(**modules):
    """Counts the forward calls of modules: `with calls_of(a=module) as calls: ...; calls["a"]`."""
    calls = dict.fromkeys(modules, 0)

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    hooks = [module.register_forward_hook(count(name)) for name, module in modules.items()]
    yield calls
    for hook in hooks:
        hook.remove()


def calls_of_experts(model):
    return calls_of(**{str(index): expert for index, expert in enumerate(model.vision_model.experts)})


def batch_norms(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)}


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# Hard routing: the selected expert only


def every_expert_then_choose(model, feature_maps, expert_ids):
    everything = [expert(feature_maps)[0] for expert in model.vision_model.experts]
    return torch.stack([everything[expert][image] for image, expert in enumerate(expert_ids)])


@pytest.mark.parametrize("expert_ids", [[2, 0, 5, 2, 1], [3, 3, 3, 3, 3], [5, 4, 2, 1, 0]])
def test_selected_only_equals_computing_every_expert(small, expert_ids):
    model, pixels = small(), images(5)
    outputs = model.vision_model(pixels, modality=expert_ids)
    feature_maps = model.vision_model.encode(pixels).feature_maps
    assert_same(outputs.local_embeds, every_expert_then_choose(model, feature_maps, expert_ids))
    assert outputs.expert_ids.tolist() == expert_ids


def test_the_order_of_the_batch_does_not_matter(small):
    model, pixels, expert_ids = small(), images(5), torch.tensor([2, 0, 5, 2, 1])
    straight = model.vision_model(pixels, modality=expert_ids)
    for order in ([4, 3, 2, 1, 0], [1, 3, 0, 4, 2]):
        permuted = model.vision_model(pixels[order], modality=expert_ids[order])
        assert_same(permuted.local_embeds, straight.local_embeds[order])
        assert_same(permuted.scale_weights, straight.scale_weights[order])


def test_in_training_batch_norm_sees_the_images_of_its_expert(small):
    model, pixels, expert_ids = small().train(), images(5), [2, 0, 5, 2, 0]
    reference = copy.deepcopy(model)
    local = model.vision_model(pixels, modality=expert_ids).local_embeds
    feature_maps = reference.vision_model.encode(pixels).feature_maps
    for expert in set(expert_ids):
        rows = [index for index, selected in enumerate(expert_ids) if selected == expert]
        assert_same(local[rows], reference.vision_model.experts[expert]([maps[rows] for maps in feature_maps])[0])
    for norm, expected in zip(batch_norms(model).values(), batch_norms(reference).values(), strict=True):
        assert_same(norm.running_mean, expected.running_mean)
        assert norm.num_batches_tracked == expected.num_batches_tracked


def test_only_selected_experts_run_and_each_once(small):
    model = small()
    with calls_of_experts(model) as calls:
        model.vision_model(images(4), modality=[1, 3, 1, 1])
    assert calls == {"0": 0, "1": 1, "2": 0, "3": 1, "4": 0, "5": 0}


def test_an_expert_without_images_gets_no_gradient_and_stays_as_it_is(small):
    model = small().train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    decide(model, reports=[0, 0, 4])
    model(pixel_values=images(), **texts(), return_loss=True).loss.backward()
    for index, expert in enumerate(model.vision_model.experts):
        assert {parameter.grad is not None for parameter in expert.parameters()} == {index in (0, 4)}
    optimizer.step()
    changed = {
        index
        for index in range(6)
        for name, tensor in model.vision_model.experts[index].state_dict().items()
        if not torch.equal(tensor, before[f"vision_model.experts.{index}.{name}"])
    }
    assert changed == {0, 4}


NO_EFFECT = ("key.bias", "k_proj.bias", "scale_attention.fc2.bias")  # a softmax does not see a common shift


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"projection_dim": 16},
        {"router": "image", "local_loss": "token"},
        {"vision_config": {"global_features": "expert"}},
        {"projection_dim": 16, "text_config": {"model_type": "distilbert"}},
        {"router": "both", "learned_scale": True},
        {
            "projection_dim": 16,
            "vision_config": {"pyramid_norm": True, "router_norm": True, "global_features": "both"},
        },
        {"router": "image", "vision_config": {"expert_type": "token", "swin_config": {"pyramid": "merged"}}},
    ],
)
def test_every_parameter_is_trained(small, changes):
    model = small(**changes).train()
    loss = model(
        pixel_values=images(6),
        **texts(6, length=14),
        modality=list(range(6)),
        modality_labels=torch.arange(6),
        return_loss=True,
    ).loss
    loss.backward()
    untouched = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not (name.endswith(NO_EFFECT) or parameter.grad.any())
    }
    assert untouched == set()


# The experts


def test_alignment_keeps_the_place_of_every_cell():
    """Each 7x7 cell, aligned to 56x56, dominates just its own 8x8 block: the centre one rows and columns 24-31."""
    cells = torch.eye(49).view(49, 1, 7, 7)
    dominating = align_map(cells, (56, 56)).squeeze(1).argmax(dim=0)
    block = torch.arange(56) // 8
    assert torch.equal(dominating, block.unsqueeze(1) * 7 + block)
    rows, columns = (dominating == 24).nonzero().unbind(dim=1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (24, 31, 24, 31)


def test_an_expert_mixes_its_scales_with_a_softmax_at_each_position(small):
    expert, maps = small().vision_model.experts[0], small().vision_model.encode(images(2)).feature_maps
    local, weights = expert(maps)
    scales = [
        align_map(project(level), (16, 16)) for project, level in zip(expert.scale_projections, maps, strict=True)
    ]
    for y, x in ((0, 0), (7, 12), (15, 15)):
        scores = torch.stack([expert.scale_attention(scale)[0, 0, y, x] for scale in scales])
        beta = scores.exp() / scores.exp().sum()
        assert_same(weights[0, :, y, x], beta)
        assert_same(local[0, :, y, x], sum(b * scale[0, :, y, x] for b, scale in zip(beta, scales, strict=True)))
    assert local.shape == (2, 64, 16, 16)


def test_scores_at_native_resolution_are_aligned_themselves(small):
    model = small(vision_config={"scale_attention_native": True})
    expert = model.vision_model.experts[2]
    maps = model.vision_model.encode(images(2)).feature_maps
    local, weights = expert(maps)
    projected = [project(level) for project, level in zip(expert.scale_projections, maps, strict=True)]
    scores = [align_map(expert.scale_attention(level), (16, 16)) for level in projected]
    shares = torch.cat(scores, dim=1).exp()
    shares = shares / shares.sum(dim=1, keepdim=True)
    assert_same(weights, shares)
    assert_same(local, sum(shares[:, k : k + 1] * align_map(projected[k], (16, 16)) for k in range(4)))


class CoarseExpert(MedMoEExpert):
    """Reads the coarsest level alone."""

    def __init__(self, config, channels):
        super().__init__(config, channels[-1:])

    def forward(self, feature_maps, *args, **kwargs):
        return super().forward(feature_maps[-1:], *args, **kwargs)


@pytest.fixture
def registry():
    with mock.patch.dict(modeling_medmoe._EXPERTS):
        yield


@pytest.mark.usefixtures("registry")
def test_a_registered_expert_is_used_saved_and_loaded(small, tmp_path):
    register_expert("coarse", CoarseExpert)
    model = small(vision_config={"expert_type": "coarse"})
    assert {type(expert) for expert in model.vision_model.experts} == {CoarseExpert}
    output = model(**texts(), pixel_values=images())
    assert output.scale_weights.shape[1] == 1
    model.save_pretrained(tmp_path)
    assert MedMoEConfig.from_pretrained(tmp_path).vision_config.expert_type == "coarse"
    again = MedMoEModel.from_pretrained(tmp_path)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


@pytest.mark.usefixtures("registry")
def test_a_name_belongs_to_one_class_unless_it_is_replaced():
    register_expert("coarse", CoarseExpert)
    register_expert("coarse", CoarseExpert)
    with pytest.raises(ValueError, match=r'"coarse" is already registered \(CoarseExpert\)'):
        register_expert("coarse", MedMoEExpert)
    register_expert("coarse", MedMoEExpert, exist_ok=True)
    assert modeling_medmoe.expert_class("coarse") is MedMoEExpert


def test_an_unknown_expert_type_names_the_known_ones(small, monkeypatch):
    # Without those that other tests have registered in this process.
    known = {name: modeling_medmoe._EXPERTS[name] for name in ("convolution", "linear", "token")}
    monkeypatch.setattr(modeling_medmoe, "_EXPERTS", known)
    with pytest.raises(ValueError, match=r'"tokens"\. Known types: convolution, linear, token\. Did you mean "token"'):
        small(vision_config={"expert_type": "tokens"})
    with pytest.raises(ValueError, match="register_expert"):
        small(vision_config={"expert_type": "perceiver"})


def test_levels_of_the_pyramid_are_normed(small):
    plain, normed = small(), small(vision_config={"pyramid_norm": True})
    normed.load_state_dict(plain.state_dict(), strict=False)
    pixels = images(2)
    for index, (before, after) in enumerate(
        zip(
            plain.vision_model.encode(pixels).feature_maps,
            normed.vision_model.encode(pixels).feature_maps,
            strict=True,
        )
    ):
        norm = normed.vision_model.level_norms[index]
        centred = before - before.mean(dim=1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        assert_same(after, scaled * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1), 1e-5)


def test_a_router_can_have_a_norm_in_front():
    router = lived_in(MedMoERouter(8, 5, 6, norm=True))
    embeds = torch.randn(2, 8)
    normed = nn.functional.layer_norm(embeds, (8,), router.norm.weight, router.norm.bias)
    hidden = (normed @ router.fc1.weight.t() + router.fc1.bias).clamp_min(0)
    assert_same(router(embeds), hidden @ router.fc2.weight.t() + router.fc2.bias)


def test_what_the_merged_pyramid_reads():
    """The patch embedding and the first three stages after merging: transformers' own hidden states."""
    sizes = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "window_size": 2, "image_size": 64}
    native = NativeSwinModel(NativeSwinConfig(**sizes), add_pooling_layer=False).eval()
    ours = MedMoESwinModel(MedMoESwinConfig(**sizes, pyramid="merged"), add_pooling_layer=False).eval()
    ours.load_state_dict(native.state_dict())
    pixels = images(2)
    expected = native(pixels, output_hidden_states=True).hidden_states[:4]
    for found, tokens, side in zip(ours(pixels).feature_maps, expected, (16, 8, 4, 2), strict=True):
        assert found.shape[2:] == (side, side)
        assert_same(found.flatten(2).transpose(1, 2), tokens)
    wide = ours(images(1, 64, 96)).feature_maps
    assert [tuple(level.shape[2:]) for level in wide] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_new_experts_listen_to_every_scale(small_config):
    """Kaiming's initialisation is for the convolutions; on the scorer's single output it would pick one scale."""
    model = MedMoEModel(small_config()).eval()
    weights = model.vision_model(images()).scale_weights
    assert 0.2 < weights.min() < weights.max() < 0.3
    spread = [layer.convolution.weight.std() for layer in model.modules() if isinstance(layer, MedMoEConvLayer)]
    assert min(spread) > 0.05


@pytest.fixture(scope="module")
def paper():
    return MedMoEVisionModel(MedMoEConfig.from_preset("paper").vision_config).eval()


def multiply_adds(model):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images(1, 224, 224))
    return counter.get_total_flops() / 2


def test_size_and_cost_of_the_paper_s_image_tower(paper):
    """Table 3: 37 M parameters with all experts, 7.8 G multiply-adds with one."""
    assert sum(parameter.numel() for parameter in paper.parameters()) == pytest.approx(36.9e6, abs=0.1e6)
    # Counted as it is drawn there: the scale attention's first layer on maps brought to 56x56 beforehand.
    drawn = 768 * 192 * (3 * 56**2 - 28**2 - 14**2 - 7**2)
    assert 7.4e9 < multiply_adds(paper) + drawn < 7.8e9
    assert 6.2e9 < multiply_adds(paper) < 6.4e9


def test_more_experts_cost_no_more(paper):
    config = MedMoEConfig.from_preset("paper", vision_config={"modalities": [f"kind {k}" for k in range(12)]})
    twelve = MedMoEVisionModel(config.vision_config).eval()
    assert len(twelve.experts) == 12
    assert multiply_adds(twelve) - multiply_adds(paper) == 6 * 128  # the router's further outputs


# The backbone


def swin(**changes):
    shape = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2), "window_size": 7} | changes
    native = lived_in(NativeSwinModel(NativeSwinConfig(drop_path_rate=0.0, **shape)))
    ours = MedMoESwinModel(MedMoESwinConfig(drop_path_rate=0.0, **shape), add_pooling_layer=False).eval()
    ours.load_state_dict(native.state_dict())
    return native, ours


def test_our_swin_is_the_native_one_at_its_own_size():
    native, ours = swin()
    pixels, stages = images(2, 224, 224), []
    for stage in native.encoder.layers:
        target = native.layernorm if stage.downsample is None else stage.downsample
        target.register_forward_pre_hook(lambda _, inputs: stages.append(inputs[0]))
    expected = native(pixels, output_hidden_states=True)
    outputs = ours(pixels, output_hidden_states=True)
    assert_same(outputs.last_hidden_state, expected.last_hidden_state)
    assert_same(outputs.pooler_output, expected.pooler_output)
    for states, right in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        assert_same(states, right)
    # The pyramid: what leaves the blocks of each stage, before merging.
    assert [tuple(level.shape) for level in outputs.feature_maps] == [
        (2, 8, 56, 56),
        (2, 16, 28, 28),
        (2, 32, 14, 14),
        (2, 64, 7, 7),
    ]
    for level, stage in zip(outputs.feature_maps, stages, strict=True):
        assert_same(level.flatten(2).transpose(1, 2), stage)


@pytest.mark.parametrize("size", [(224, 224), (448, 224), (100, 224)])
@pytest.mark.parametrize("pyramid", ["stages", "merged"])
def test_blocks_in_the_order_of_windows_give_what_transformers_blocks_give(size, pyramid):
    """Several groups of windows, one window, and maps that need padding (by transformers' own stage)."""
    config = MedMoESwinConfig(embed_dim=8, depths=(2, 2, 2, 1), num_heads=(1, 1, 2, 2), window_size=7, pyramid=pyramid)
    model = lived_in(MedMoESwinModel(config, add_pooling_layer=False))
    pixels = images(3, *size)
    expected = model(pixels)
    calls = []
    model.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        observed = model(pixels)
        assert calls
        model.encoder.layers[0]._forward_hooks.clear()
        calls.clear()
        outputs = model(pixels)
    assert not calls
    for found in (observed, outputs):
        assert_same(found.last_hidden_state, expected.last_hidden_state, 1e-6)
        for one, right in zip(found.feature_maps, expected.feature_maps, strict=True):
            assert_same(one, right, 1e-6)


def test_an_image_of_another_size_in_between_changes_nothing():
    _, ours = swin()
    pixels = images(1, 224, 224)
    before = ours(pixels)
    for side in (320, 64):
        ours(images(1, side, side))
    after = ours(pixels)
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(before.feature_maps, after.feature_maps, strict=True))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (100, 131), (65, 224), (224, 65)])
def test_any_size_from_64_up(small, height, width):
    outputs = small().vision_model(images(2, height, width))
    assert outputs.local_embeds.shape == (2, 64, -(-height // 4), -(-width // 4))
    assert outputs.local_embeds.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 3, 63, 64), (1, 3, 224, 32), (3, 224, 224)])
def test_smaller_images_are_refused(small, shape):
    with pytest.raises(ValueError, match="sides of 64 pixels or more, got .*" + str(shape[-1])):
        small()(pixel_values=torch.zeros(shape))


def test_a_single_image_of_64_pixels_can_be_trained_on(small):
    model = small().train()
    model(pixel_values=images(1), **texts(1), return_loss=True).loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


TIMM = ["timm/resnet18", "timm/convnext_atto", "timm/swin_tiny_patch4_window7_224"]


def timm_tower(backbone, **fields):
    sizes = {"expert_hidden_size": 8, "local_size": 16, "scale_attention_size": 8, "modalities": ["ct", "mri"]}
    return lived_in(MedMoEVisionModel(MedMoEVisionConfig(backbone=backbone, **sizes | fields)))


@pytest.mark.parametrize(
    ("backbone", "channels"),
    list(zip(TIMM, [[64, 128, 256, 512], [40, 80, 160, 320], [96, 192, 384, 768]], strict=True)),
)
def test_pyramids_of_timm(backbone, channels):
    model = timm_tower(backbone)
    maps = model.encode(images(2, 64, 96)).feature_maps
    strides = (4, 8, 16, 32)
    assert [tuple(level.shape) for level in maps] == [
        (2, width, 64 // stride, 96 // stride) for width, stride in zip(channels, strides, strict=True)
    ]
    outputs = model(images(2, 64, 96))
    assert outputs.local_embeds.shape == (2, 16, 16, 24)
    assert outputs.pooler_output.shape == (2, channels[-1])


def test_timm_s_channels_last_maps_are_turned_even_where_they_are_square_cubes():
    """At 384 pixels the first map of a Swin-T is 96 x 96 with 96 channels: its shape does not tell its layout."""
    model, pixels = timm_tower("timm/swin_tiny_patch4_window7_224"), images(1, 384, 384)
    raw = model.backbone.features(pixels)[0]
    assert raw.shape == (1, 96, 96, 96)
    assert torch.equal(model.encode(pixels).feature_maps[0], raw.permute(0, 3, 1, 2))


def test_convolutions_run_channels_last_on_a_cpu_with_the_same_result(monkeypatch):
    model, pixels = timm_tower("timm/resnet18"), images(2)
    seen = []
    features = model.backbone.features
    features.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    found = model(pixels)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(model.backbone, "_convolutional", False)
    expected = model(pixels)
    assert seen[1].is_contiguous()
    for name in ("pooler_output", "local_embeds"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_levels_of_a_timm_backbone_can_be_chosen():
    model = timm_tower("timm/resnet18", out_indices=(2, 4))
    assert model.backbone.channels == [128, 512]
    assert model(images(2)).local_embeds.shape == (2, 16, 8, 8)


@pytest.mark.parametrize(
    ("fields", "strides"),
    [
        ({"backbone": "timm/vit_tiny_patch16_224"}, "16, 16, 16"),
        ({"backbone": "timm/resnet18", "out_indices": [4]}, "32"),
    ],
)
def test_what_is_no_pyramid_is_refused(fields, strides):
    with pytest.raises(ValueError, match=rf"is not hierarchical: its levels have strides \[{strides}\]"):
        timm_tower(**fields)


def test_a_dual_encoder_with_a_timm_backbone(small, tmp_path):
    with pytest.raises(ValueError, match="width 512 and the report embedding 64; set `projection_dim`"):
        small(vision_config={"backbone": "timm/resnet18"})
    model, batch = small(vision_config={"backbone": "timm/resnet18"}, projection_dim=16), texts()
    pixels = images()
    model.save_pretrained(tmp_path)
    loaded = MedMoEModel.from_pretrained(tmp_path)
    assert_same(
        loaded(pixel_values=pixels, **batch).logits_per_image, model(pixel_values=pixels, **batch).logits_per_image
    )


# Words and reports

REPORTS = ["pneumonia in the left lung", "no pneumothorax, no effusion.", "cardiomegaly"]
PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] pneu ##mon ##ia ##moth ##orax in the left lung no e ##ff ##usion card ##io"
WORDPIECES = BertTokenizer(vocab={piece: i for i, piece in enumerate([*PIECES.split(), "##mega", "##ly", ",", "."])})


def slow_words(hidden, word_ids, pooling):
    """The words of one text: the pieces that carry the same number, in the order of the text."""
    groups = {}
    for vector, word in zip(hidden, word_ids, strict=True):
        if word is not None:
            groups.setdefault(word, []).append(vector)
    return [sum(group) / (len(group) if pooling == "mean" else 1) for group in groups.values()]


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize(
    ("side", "max_length", "first"),
    [("right", 32, [0, 1, 2, 3, 4]), ("right", 4, [0]), ("left", 7, [0, 1, 2, 3, 4]), ("left", 5, [2, 3, 4])],
)
def test_pieces_become_words(pooling, side, max_length, first):
    """Whole texts; cut in the middle of a word; cut from the left, where the numbers do not start at 0."""
    tokenizer = copy.deepcopy(WORDPIECES)
    tokenizer.truncation_side = side
    encoding = tokenizer(REPORTS, padding=True, truncation=True, max_length=max_length)
    word_ids = [encoding.word_ids(i) for i in range(len(REPORTS))]
    assert list(dict.fromkeys(word for word in word_ids[0] if word is not None)) == first
    hidden = torch.randn(len(REPORTS), len(word_ids[0]), 8)
    numbers = torch.tensor([[-1 if word is None else word for word in line] for line in word_ids])
    hidden[numbers < 0] = float("nan")  # tokens of no word have no influence
    words, mask = pool_words(hidden, numbers, pooling)
    for text, line in enumerate(word_ids):
        expected = slow_words(hidden[text], line, pooling)
        assert mask[text].tolist() == [slot < len(expected) for slot in range(len(line))]
        assert_same(words[text, : len(expected)], torch.stack(expected))
        assert not words[text, len(expected) :].any()


def slow_report(model, batch, index):
    """Word embeddings and report embedding of one text: the last layers' sum, of it the words, of these the mean."""
    only = row(batch, index)
    states = model.encoder(
        input_ids=only["input_ids"], attention_mask=only["attention_mask"], output_hidden_states=True
    ).hidden_states
    layers = sum(states[-model.config.num_summed_layers :])
    numbers = [None if number < 0 else number for number in only["word_ids"][0].tolist()]
    words = torch.stack(slow_words(layers[0], numbers, model.config.word_pooling))
    return words, words.mean(dim=0)


@pytest.mark.parametrize("changes", [
    {},
    {"word_pooling": "mean", "num_summed_layers": 1},
    {"text_config": {"model_type": "distilbert"}},
    {"text_config": {"model_type": "roberta", "max_position_embeddings": 50}},
])  # fmt: skip
def test_the_text_tower_sums_layers_and_pieces(small, changes):
    model, batch = small(**changes).text_model, texts()
    outputs = model(**batch)
    for index in range(3):
        words, report = slow_report(model, batch, index)
        assert outputs.word_mask[index].sum() == len(words)
        assert_same(outputs.word_embeds[index, : len(words)], words, 1e-5)
        assert_same(outputs.pooler_output[index], report, 1e-5)


def test_token_types_are_used_where_the_encoder_has_them(small):
    batch = texts() | {"token_type_ids": torch.ones(3, 9, dtype=torch.long)}
    bert, distilbert = small(), small(text_config={"model_type": "distilbert"})
    assert not torch.allclose(bert.text_model(**batch).pooler_output, bert.text_model(**texts()).pooler_output)
    assert distilbert.text_model(**batch).pooler_output.isfinite().all()


def test_without_word_ids_every_token_is_a_word(small):
    model, batch = small().text_model, texts()
    batch.pop("word_ids")
    outputs = model(**batch)
    assert torch.equal(outputs.word_mask, batch["attention_mask"] == 1)
    states = model(**batch, output_hidden_states=True).hidden_states
    assert_same(outputs.word_embeds[0], states[-1][0] + states[-2][0])
    assert_same(outputs.pooler_output[2], outputs.word_embeds[2, :7].mean(dim=0))


def test_a_text_without_words_is_one_word_and_gives_numbers_everywhere(small):
    model, batch = small().train(), texts()
    batch["word_ids"][1] = -1
    text = model.text_model(**batch)
    states = model.text_model(**batch, output_hidden_states=True).hidden_states
    tokens = (states[-1] + states[-2])[1, :8]  # the second text has eight tokens
    assert text.word_mask[1].tolist() == [True] + [False] * 8
    assert_same(text.word_embeds[1, 0], tokens.sum(dim=0), 1e-5)
    outputs = model(pixel_values=images(), **batch, return_loss=True, modality_labels=torch.tensor([0, -100, 1]))
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


# What the dual encoder compares


SIMILARITIES = [
    {"similarity": "global", "vision_config": {"global_features": "expert"}},
    {"similarity": "local"},
    {"similarity": "mean"},
    {"similarity": "mean", "vision_config": {"global_features": "expert"}, "projection_dim": 16},
    {"similarity": "local", "local_loss": "token"},
    {"similarity": "global"},
]


@pytest.mark.parametrize("changes", SIMILARITIES)
@pytest.mark.parametrize("modality", [None, [None, "mri", -100]])
def test_each_prompt_reads_the_image_with_the_expert_that_it_selects(small, changes, modality):
    """... unless the caller knows the image's modality."""
    model, pixels, prompts = small(**changes), images(3), texts(4)
    selected = [1, 4, 1, 0]
    decide(model, images=[2, 4, 1], reports=selected)
    outputs = model(pixel_values=pixels, **prompts, modality=modality)
    assert outputs.expert_ids.tolist() == ([2, 4, 1] if modality is None else [2, 2, 1])
    assert outputs.logits_per_image.shape == (3, 4)
    assert torch.equal(outputs.logits_per_text, outputs.logits_per_image.t())
    own = model.vision_model(pixels, modality=outputs.expert_ids)
    assert_same(outputs.scale_weights, own.scale_weights)
    decide(model, images=[3], reports=[5])
    for image in range(3):
        for prompt in range(4):
            expert = "mri" if modality is not None and image == 1 else selected[prompt]
            alone = model(pixel_values=pixels[image : image + 1], **row(prompts, prompt), modality=expert)
            assert_same(alone.logits_per_image[0, 0], outputs.logits_per_image[image, prompt], 1e-5)


def test_the_logits_are_what_the_config_names(small):
    model, pixels, prompts = small(), images(3), texts(2)
    outputs = {}
    for model.config.similarity in ("global", "local", "mean"):
        outputs[model.config.similarity] = model(pixel_values=pixels, **prompts, modality="ct")
    image, text = outputs["global"].vision_model_output.pooler_output, outputs["global"].text_model_output
    cosines = cosine_similarity(image.unsqueeze(1), text.pooler_output.unsqueeze(0), dim=-1)
    assert_same(outputs["global"].logits_per_image, 10 * cosines, 1e-5)
    local = local_logits(model.config, outputs["local"].local_embeds, text.word_embeds, text.word_mask)
    assert_same(outputs["local"].logits_per_image, local, 1e-5)
    assert_same(outputs["mean"].logits_per_image, (10 * cosines + local) / 2, 1e-5)


def test_the_backbone_runs_once_each_selected_expert_once_and_no_other(small):
    model = small(similarity="mean")
    decide(model, images=[4, 2, 2], reports=[1, 4, 1, 4])
    with calls_of_experts(model) as experts, calls_of(backbone=model.vision_model.backbone) as backbone:
        model(pixel_values=images(3), **texts(4))
    assert backbone == {"backbone": 1}
    assert experts == {"0": 0, "1": 1, "2": 1, "3": 0, "4": 1, "5": 0}


def test_gradients_reach_the_experts_through_the_logits_of_prompts(small):
    model = small(similarity="local")
    decide(model, images=[2, 2, 2], reports=[1, 4])
    model(pixel_values=images(3), **texts(2)).logits_per_image.sum().backward()
    trained = {name.split(".")[2] for name in gradients(model) if name.startswith("vision_model.experts")}
    assert trained == {"1", "4"}


@pytest.mark.parametrize(
    ("router", "modality", "expert_ids"),
    [
        ("report", None, [5, 0, 3]),
        ("image", None, [4, 2, 2]),
        ("report", "cxr", [0, 0, 0]),
        ("report", [None, "MR", -100], [5, 2, 3]),
        ("image", torch.tensor([-100, 5, 1]), [4, 5, 1]),
    ],
)
def test_who_selects_the_expert_in_training(small, router, modality, expert_ids):
    model = small(router=router)
    decide(model, images=[4, 2, 2], reports=[5, 0, 3] if router == "report" else None)
    pixels, batch = images(), texts()
    outputs = model(pixel_values=pixels, **batch, modality=modality, return_loss=True)
    assert outputs.expert_ids.tolist() == expert_ids
    assert_same(outputs.local_embeds, model.vision_model(pixels, modality=expert_ids).local_embeds)


def test_an_image_alone_asks_the_image_router(small):
    model = small()
    decide(model, images=[4, 2, 2], reports=[5, 0, 3])
    assert model(pixel_values=images()).expert_ids.tolist() == [4, 2, 2]
    assert model(pixel_values=images(), modality=["us", None, None]).expert_ids.tolist() == [3, 2, 2]


def test_wrong_modalities_are_refused(small):
    with pytest.raises(ValueError, match="Unknown modality 'pet'"):
        small()(pixel_values=images(), modality="pet")
    with pytest.raises(ValueError, match="2 entries for 3 images"):
        small()(pixel_values=images(), **texts(), modality=["ct", "ct"])


@pytest.mark.parametrize("changes", [{}, {"local_loss": "token", "router": "image"}, {"projection_dim": 16}])
def test_the_total_loss(small, changes):
    model, labels = small(**changes), torch.tensor([3, -100, 1])
    outputs = model(pixel_values=images(), **texts(), return_loss=True, modality_labels=labels)
    expected_global = contrastive_loss(cosine_logits(outputs.image_embeds, outputs.text_embeds, 10))
    expected_local = local_loss(model.config, outputs.local_embeds, outputs.word_embeds, outputs.word_mask)
    heads = [outputs.router_logits, outputs.report_router_logits]
    assert (heads[1] is None) == (model.config.router == "image")
    expected_aux = sum(modality_loss(model.config, logits, labels) for logits in heads if logits is not None)
    assert_same(outputs.loss_global, expected_global, 1e-5)
    assert_same(outputs.loss_local, expected_local, 1e-5)
    assert_same(outputs.loss_aux, expected_aux, 1e-5)
    assert_same(outputs.loss, 1 * expected_global + 1 * expected_local + 4 * expected_aux, 1e-5)
    weighted = {"global_loss_weight": 0.5, "local_loss_weight": 0, "aux_loss_weight": 2}
    for name, weight in weighted.items():
        setattr(model.config, name, weight)
    torch.manual_seed(0)
    other = model(pixel_values=images(), **texts(), return_loss=True, modality_labels=labels)
    assert_same(other.loss, 0.5 * other.loss_global + 2 * other.loss_aux)


def slow_contrast(logits, targets):
    """-1/B Σ_i Σ_j T_ij log softmax_j(s_ij), plus the same of the transposed similarities."""
    logits = logits.detach().double()
    return -(targets * (logits.log_softmax(dim=1) + logits.t().log_softmax(dim=1))).sum() / len(logits)


@pytest.mark.parametrize("local", ["gloria", "token"])
@pytest.mark.parametrize("positives", ["label", "text_similarity"])
def test_several_positives(small, positives, local):
    """In the global loss and in GLoRIA's; `token` contrasts within a report and stays as it is."""
    model = small(local_loss=local, positives=positives, positives_temperature=0.2, projection_dim=16)
    reports = texts()
    inputs = {"pixel_values": images(), **reports, "return_loss": True}
    if positives == "label":
        inputs["positive_groups"] = torch.tensor([5, -1, 5])
        targets = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]).double()
    else:
        # Of the reports before their projection, which the contrast trains.
        embeds = nn.functional.normalize(model.text_model(**reports).pooler_output.detach().double(), dim=-1)
        targets = (embeds @ embeds.t() / 0.2).softmax(dim=-1)
    outputs = model(**inputs)
    logits = 10 * outputs.image_embeds @ outputs.text_embeds.t()
    assert_same(outputs.loss_global, slow_contrast(logits, targets).float(), 1e-5)
    model.config.positives = "none"
    alone = model(**inputs | {"positive_groups": None})
    assert (outputs.loss_global - alone.loss_global).abs() > 1e-4
    if local == "token":
        assert torch.equal(outputs.loss_local, alone.loss_local)
    else:
        logits = local_logits(model.config, outputs.local_embeds, outputs.word_embeds, outputs.word_mask)
        assert_same(outputs.loss_local, slow_contrast(logits, targets).float(), 1e-5)


def test_groups_that_all_differ_change_no_bit(small):
    model, inputs, found = small(), {"pixel_values": images(), **texts(), "return_loss": True}, []
    for groups in (None, torch.tensor([3, -1, 2**62])):
        model.zero_grad()
        outputs = model(**inputs, positive_groups=groups)
        outputs.loss.backward()
        found.append({"loss": outputs.loss, **gradients(model)})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_groups_must_be_as_many_as_pairs(small):
    with pytest.raises(ValueError, match=r"each of 3 pairs, got the shape \(1,\)"):
        small()(pixel_values=images(), **texts(), return_loss=True, positive_groups=torch.tensor([1]))


@pytest.mark.parametrize("labels", [None, torch.full((3,), -100)])
def test_without_known_modalities_there_is_no_auxiliary_loss(small, labels):
    model = small()
    outputs = model(pixel_values=images(), **texts(), return_loss=True, modality_labels=labels)
    outputs.loss.backward()
    assert outputs.loss_aux == 0
    assert_same(outputs.loss, outputs.loss_global + outputs.loss_local)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_a_loss_needs_a_text_for_each_image(small):
    with pytest.raises(ValueError, match="got 3 images, 2 texts"):
        small()(pixel_values=images(3), **texts(2), return_loss=True)


def test_something_must_be_given(small):
    with pytest.raises(ValueError, match="needs `pixel_values`, `input_ids` or both"):
        small()()


# What comes out


def shapes(outputs):
    return {name: tuple(value.shape) for name, value in outputs.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(("changes", "width"), [({}, 64), ({"projection_dim": 16}, 16)])
def test_fields_and_shapes(small, changes, width):
    model, pixels, batch = small(**changes), images(3), texts(3)
    vision = {
        "last_hidden_state": (3, 4, 64),
        "pooler_output": (3, width),
        "local_embeds": (3, width, 16, 16),
        "scale_weights": (3, 4, 16, 16),
        "router_logits": (3, 6),
        "expert_ids": (3,),
    }
    text = {
        "last_hidden_state": (3, 9, 64),
        "pooler_output": (3, width),
        "word_embeds": (3, 9, width),
        "word_mask": (3, 9),
    }
    both = {
        "logits_per_image": (3, 3),
        "logits_per_text": (3, 3),
        "text_embeds": (3, width),
        "image_embeds": (3, width),
        "local_embeds": (3, width, 16, 16),
        "word_embeds": (3, 9, width),
        "word_mask": (3, 9),
        "router_logits": (3, 6),
        "report_router_logits": (3, 6),
        "expert_ids": (3,),
        "scale_weights": (3, 4, 16, 16),
    }
    assert shapes(model(pixel_values=pixels)) == vision
    assert shapes(model(**batch)) == text
    outputs = model(pixel_values=pixels, **batch)
    assert shapes(outputs) == both
    assert shapes(outputs.vision_model_output) == vision
    assert shapes(outputs.text_model_output) == text
    losses = {"loss": (), "loss_global": (), "loss_local": (), "loss_aux": ()}
    assert shapes(model(pixel_values=pixels, **batch, return_loss=True)) == losses | both
    assert outputs.expert_ids.dtype == torch.int64
    assert outputs.word_mask.dtype == torch.bool
    assert_same(outputs.scale_weights.sum(dim=1), torch.ones(3, 16, 16))
    for embeds in (outputs.image_embeds, outputs.text_embeds):
        assert_same(embeds.norm(dim=-1), torch.ones(3))


def test_both_together_embed_as_each_alone(small):
    model, pixels, batch = small(projection_dim=16), images(3), texts(3)
    outputs = model(pixel_values=pixels, **batch)
    vision, text = model.get_image_features(pixels), model.get_text_features(**batch)
    assert_same(outputs.image_embeds, normalize(vision.pooler_output, dim=-1))
    assert_same(outputs.text_embeds, normalize(text.pooler_output, dim=-1))
    assert_same(outputs.local_embeds, vision.local_embeds)
    assert_same(outputs.word_embeds, text.word_embeds)
    assert_same(vision.pooler_output, model.visual_projection(model.vision_model(pixels).pooler_output))
    assert_same(text.pooler_output, model.text_projection(model.text_model(**batch).pooler_output))


def test_global_features_are_the_swin_s_mean_or_the_expert_s(small):
    for source in ("backbone", "expert"):
        outputs = small(vision_config={"global_features": source}).vision_model(images())
        mean = outputs.last_hidden_state.mean(dim=1) if source == "backbone" else outputs.local_embeds.mean(dim=(2, 3))
        assert_same(outputs.pooler_output, mean)


def test_global_features_can_be_both_side_by_side(small):
    model = small(projection_dim=16, vision_config={"global_features": "both"})
    outputs = model.vision_model(images())
    expected = torch.cat([outputs.last_hidden_state.mean(dim=1), outputs.local_embeds.mean(dim=(2, 3))], dim=1)
    assert_same(outputs.pooler_output, expected)
    assert model.get_image_features(images()).pooler_output.shape == (3, 16)
    with pytest.raises(StrictDataclassError, match="needs `projection_dim`"):
        small(vision_config={"global_features": "both"})


def test_with_two_routers_the_image_s_selects_and_the_report_s_can_be_asked(small):
    model = small(router="both")
    decide(model, images=[2, 3, 4], reports=[0, 1, 5])
    labels = torch.tensor([2, 3, 5])
    outputs = model(pixel_values=images(), **texts(), return_loss=True, modality_labels=labels)
    assert outputs.expert_ids.tolist() == [2, 3, 4]
    assert model(pixel_values=images(), **texts()).expert_ids.tolist() == [2, 3, 4]
    assert model.route(**texts()).expert_ids.tolist() == [0, 1, 5]
    assert model.ground(images(), **texts()).expert_ids.tolist() == [2, 3, 4]
    expected = sum(cross_entropy(head, labels) for head in (outputs.router_logits, outputs.report_router_logits))
    assert_same(outputs.loss_aux, expected, 1e-5)


def test_a_learned_scale_is_bounded_and_saved(small, tmp_path):
    model = small(learned_scale=True, contrast="mean")
    batch = {"pixel_values": images(), **texts(), "return_loss": True}
    for value, scale in ((None, 1 / 0.07), (2.0, 7.389056), (9.0, 100.0)):
        if value is not None:
            model.logit_scale.data.fill_(value)
        outputs = model(**batch)
        logits = scale * outputs.image_embeds @ outputs.text_embeds.t()
        own = torch.arange(3)
        assert_same(outputs.loss_global, (cross_entropy(logits, own) + cross_entropy(logits.t(), own)) / 2, 1e-4)
        assert_same(outputs.logits_per_image, logits, 1e-3)
    model.save_pretrained(tmp_path)
    assert MedMoEModel.from_pretrained(tmp_path).logit_scale.item() == 9.0


def test_without_local_maps_no_expert_runs(small):
    model, pixels = small(), images()
    with calls_of_experts(model) as calls:
        outputs = model.get_image_features(pixels, local=False)
    assert set(calls.values()) == {0}
    assert outputs.local_embeds is None
    assert_same(outputs.pooler_output, model.get_image_features(pixels).pooler_output)


def test_tuples(small):
    model, inputs = small(), {"pixel_values": images(), **texts()}
    outputs = model(**inputs)
    flat, plain = outputs.to_tuple(), model(**inputs, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(flat) == len(plain) == len(outputs)
    assert torch.equal(plain[0], outputs.logits_per_image)
    assert isinstance(flat[-1], tuple)
    assert torch.equal(flat[-1][0], outputs.vision_model_output.last_hidden_state)
    vision = model(pixel_values=inputs["pixel_values"], return_dict=False)
    assert torch.equal(vision[0], outputs.vision_model_output.last_hidden_state)


# Routing and grounding


def test_routing(small):
    model, pixels, batch = small(), images(), texts()
    with calls_of_experts(model) as calls:
        routed = {"image": model.route(pixels), "report": model.route(**batch)}
    assert set(calls.values()) == {0}
    logits = {
        "image": model.vision_model.router(model.vision_model.backbone(pixels).pooler_output),
        "report": model.report_router(model.text_model(**batch).pooler_output),
    }
    for router, routing in routed.items():
        exponentials = logits[router].exp()
        assert_same(routing.probabilities, exponentials / exponentials.sum(dim=1, keepdim=True))
        assert routing.expert_ids.tolist() == logits[router].argmax(dim=1).tolist()
        assert routing.modality == [model.config.modalities[k] for k in routing.expert_ids.tolist()]


def test_a_router_is_two_linear_layers():
    router = lived_in(MedMoERouter(8, 5, 6))
    embeds = torch.randn(2, 8)
    hidden = (embeds @ router.fc1.weight.t() + router.fc1.bias).clamp_min(0)
    assert_same(router(embeds), hidden @ router.fc2.weight.t() + router.fc2.bias)


def test_routing_needs_one_question(small):
    for inputs in ({}, {"pixel_values": images(), **texts()}):
        with pytest.raises(ValueError, match="takes either `pixel_values` or `input_ids`"):
            small().route(**inputs)
    with pytest.raises(ValueError, match="no report router"):
        small(router="image").route(**texts())


@pytest.mark.parametrize("changes", [{}, {"projection_dim": 16}, {"router": "image"}])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("modality", [None, ["ct", None, 5]])
def test_grounding(small, changes, count, modality):
    model, pixels, batch = small(**changes), images(3), texts(count)
    by_report = model.config.router == "report"
    decide(model, images=[2, 3, 4], reports=([0, 4, 2] if count == 3 else [4]) if by_report else None)
    grounded = model.ground(pixels, **batch, modality=modality)
    selected = [0, 4, 2] if count == 3 else [4, 4, 4]
    selected = selected if by_report else [2, 3, 4]
    assert grounded.expert_ids.tolist() == (selected if modality is None else [1, selected[1], 5])
    local = model.get_image_features(pixels, modality=grounded.expert_ids).local_embeds
    words = model.get_text_features(**batch)
    assert grounded.heatmaps.shape == (3, 9, 16, 16)
    assert torch.equal(grounded.word_mask, words.word_mask.expand(3, -1))
    for image, word, y, x in ((0, 0, 0, 0), (1, 2, 5, 9), (2, 1, 15, 15)):
        text = image if count == 3 else 0
        scores = (words.word_embeds[text] @ local[image, :, y, x])[words.word_mask[text]]
        share = (scores.double().softmax(dim=0))[word]
        assert_same(grounded.heatmaps[image, word, y, x].sigmoid(), share.float(), 1e-5)
    assert not grounded.heatmaps[~grounded.word_mask].any()


@pytest.mark.parametrize("size", [None, 16])
@pytest.mark.parametrize("count", [1, 3])
def test_grounding_in_the_global_space(small, size, count):
    model = small(projection_dim=size, vision_config={"global_features": "expert"})
    pixels, batch = images(3), texts(count)
    grounded = model.ground(pixels, **batch)
    tower = model.vision_model(pixels, modality=grounded.expert_ids)
    words = model.text_model(**batch)

    def same(embeds):
        return embeds

    to_image = model.visual_projection or same
    to_text = model.text_projection or same
    for image in range(3):
        text = image if count == 3 else 0
        mask = words.word_mask[text].tolist()
        for y, x in ((0, 0), (5, 9), (15, 15)):
            region = to_image(tower.local_embeds[image, :, y, x])
            scores = [(to_text(words.word_embeds[text, word]) @ region).item() for word in range(sum(mask))]
            for word, score in enumerate(scores):
                others = scores[:word] + scores[word + 1 :]
                expected = torch.tensor(score - sum(others) / len(others))
                assert_same(grounded.heatmaps[image, word, y, x], expected, 1e-5)
    assert not grounded.heatmaps[~grounded.word_mask].any()


@pytest.mark.parametrize("size", [None, 16])
def test_a_single_words_heatmap_sums_up_to_the_global_similarity(small, size):
    model = small(projection_dim=size, vision_config={"global_features": "expert"})
    pixels, batch = images(3), texts(3, length=5)
    batch["word_ids"] = torch.where(batch["word_ids"] >= 0, 0, -1)
    batch = row(batch, 0)
    grounded = model.ground(pixels, **batch)
    global_embeds = model.get_image_features(pixels, modality=grounded.expert_ids).pooler_output
    expected = global_embeds @ model.get_text_features(**batch).pooler_output[0]
    assert grounded.word_mask.sum(dim=1).tolist() == [1, 1, 1]
    assert_same(grounded.heatmaps[:, 0].mean(dim=(1, 2)), expected, 1e-5)


@pytest.mark.parametrize("changes", [{}, {"projection_dim": 16}, {"vision_config": {"global_features": "expert"}}])
@pytest.mark.parametrize("count", [1, 3])
def test_grounding_against_a_reference(small, changes, count):
    model, pixels, batch, others = small(**changes), images(3), texts(count), texts(2, length=5)
    grounded = model.ground(pixels, **batch, reference=others)
    local = model.vision_model(pixels, modality=grounded.expert_ids).local_embeds
    words, reference = model.text_model(**batch), model.text_model(**others).pooler_output.mean(dim=0)

    def same(embeds):
        return embeds

    to_region, to_word = (model.local_projection or same), (model.word_projection or same)
    for image, word, y, x in ((0, 0, 0, 0), (1, 2, 5, 9), (2, 1, 15, 15)):
        text = image if count == 3 else 0
        difference = to_word(words.word_embeds[text, word]) - to_word(reference)
        expected = difference @ to_region(local[image, :, y, x])
        assert_same(grounded.heatmaps[image, word, y, x], expected, 1e-5)
    assert not grounded.heatmaps[~grounded.word_mask].any()


def test_grounding_needs_one_text_or_one_for_each_image(small):
    with pytest.raises(ValueError, match="each of the 3 images; got 2"):
        small().ground(images(3), **texts(2))


# Saving and loading


@contextmanager
def poisoned_memory():
    """Uninitialised memory is filled with NaN, so that nothing is right by chance."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_loads_whole(model, folder):
    model.save_pretrained(folder)
    with poisoned_memory():
        loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    with safe_open(folder / "model.safetensors", "pt") as saved:
        assert set(saved.keys()) == set(model.state_dict())
    assert not loaded.training
    for kind in ("named_parameters", "named_buffers"):
        expected = dict(getattr(model, kind)())
        assert {
            name: torch.equal(tensor, expected[name]) for name, tensor in getattr(loaded, kind)()
        } == dict.fromkeys(expected, True)
    return loaded


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (MedMoEModel, {}),
        (MedMoEModel, {"projection_dim": 16, "router": "image"}),
        (MedMoEForImageClassification, {"num_labels": 4}),
        (MedMoEModel, {"projection_dim": 16, "text_config": {"model_type": "distilbert"}}),
        (MedMoEModel, {"text_config": {"model_type": "roberta", "max_position_embeddings": 50}}),
    ],
)
def test_loading_gives_back_every_tensor(small, kind, changes, tmp_path):
    assert_loads_whole(small(kind, **changes), tmp_path)


@pytest.mark.parametrize("backbone", TIMM)
def test_loading_a_timm_backbone_gives_back_every_tensor(backbone, tmp_path):
    model = timm_tower(backbone)
    loaded, pixels = assert_loads_whole(model, tmp_path), images(1)
    assert_same(loaded(pixels).local_embeds, model(pixels).local_embeds)


def test_what_a_checkpoint_lacks_is_initialised(small, tmp_path):
    """An image-routed encoder becomes a report-routed one with another head: the new parts are as new, not memory."""
    small(router="image").save_pretrained(tmp_path)
    with poisoned_memory():
        loaded = MedMoEModel.from_pretrained(tmp_path, router="report", projection_dim=16)
    assert all(tensor.isfinite().all() for tensor in loaded.state_dict().values())
    assert loaded.report_router.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not loaded.report_router.fc1.bias.any()


def test_the_towers_load_out_of_the_dual_encoder(small, tmp_path):
    dual, pixels, batch = small(word_pooling="mean"), images(), texts()
    dual.save_pretrained(tmp_path)
    vision, text = MedMoEVisionModel.from_pretrained(tmp_path), MedMoETextModel.from_pretrained(tmp_path)
    for tower, part in ((vision, dual.vision_model), (text, dual.text_model)):
        assert tower.state_dict().keys() == part.state_dict().keys()
        assert all(torch.equal(tensor, part.state_dict()[name]) for name, tensor in tower.state_dict().items())
    assert torch.equal(vision(pixels).local_embeds, dual.vision_model(pixels).local_embeds)
    assert torch.equal(text(**batch).word_embeds, dual.text_model(**batch).word_embeds)


def test_the_towers_save_and_load_alone(small, tmp_path):
    dual, pixels, batch = small(), images(), texts()
    vision = assert_loads_whole(dual.vision_model, tmp_path / "vision")
    text = assert_loads_whole(dual.text_model, tmp_path / "text")
    assert torch.equal(vision(pixels).local_embeds, dual.vision_model(pixels).local_embeds)
    assert torch.equal(text(**batch).word_embeds, dual.text_model(**batch).word_embeds)


def test_the_text_tower_takes_bert_s_weights(small):
    config = small().config.text_config
    bert = lived_in(BertModel(config, add_pooling_layer=False))
    tower = MedMoETextModel(MedMoETextConfig(text_config=config)).eval() if config.num_hidden_layers > 3 else None
    tower = tower or MedMoETextModel(MedMoETextConfig(text_config=config, num_summed_layers=1)).eval()
    tower.encoder.load_state_dict(bert.state_dict())
    batch = texts()
    expected = bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    assert_same(tower(**batch).last_hidden_state, expected)


def test_config_changes_at_loading(small, tmp_path):
    small().save_pretrained(tmp_path)
    loaded = MedMoEModel.from_pretrained(tmp_path, similarity="local", vision_config={"global_features": "expert"})
    assert loaded.config.similarity == "local"
    assert loaded.vision_model.config.global_features == "expert"
    assert loaded.vision_model.backbone.channels == [8, 16, 32, 64]


def test_resized_token_embeddings_are_saved(small, tmp_path):
    model = small()
    model.resize_token_embeddings(100)
    assert model.config.text_config.vocab_size == model.text_model.config.text_config.vocab_size == 100
    model.save_pretrained(tmp_path)
    loaded, batch = MedMoEModel.from_pretrained(tmp_path), texts(vocab_size=100)
    assert loaded.get_input_embeddings().weight.shape == (100, 64)
    assert_same(loaded(**batch).pooler_output, model(**batch).pooler_output)


# Attention, hidden states, precision, checkpointing, compilation


@contextmanager
def calls_of_sdpa():
    real = nn.functional.scaled_dot_product_attention
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", side_effect=real) as spy:
        yield spy


def test_sdpa_and_eager_attention_agree(small, tmp_path):
    """8 blocks of the Swin and 3 layers of BERT follow the switch, at loading and afterwards."""
    small().save_pretrained(tmp_path)
    inputs = {"pixel_values": images(), **texts()}
    sdpa = MedMoEModel.from_pretrained(tmp_path)
    eager = MedMoEModel.from_pretrained(tmp_path, attn_implementation="eager")
    with calls_of_sdpa() as spy:
        expected = sdpa(**inputs)
        assert spy.call_count == 11
    with calls_of_sdpa() as spy:
        outputs = [eager(**inputs)]
        sdpa.set_attn_implementation("eager")
        outputs.append(sdpa(**inputs))
        assert spy.call_count == 0
        eager.set_attn_implementation("sdpa")
        outputs.append(eager(**inputs))
        assert spy.call_count == 11
    for output in outputs:
        assert_same(output.logits_per_image, expected.logits_per_image, 1e-5)
        assert_same(output.local_embeds, expected.local_embeds, 1e-5)


@pytest.mark.parametrize("kind", [MedMoEModel, MedMoEForImageClassification])
def test_hidden_states_and_attentions(small, kind):
    model = small(kind, attn_implementation="eager")
    flags = {"output_hidden_states": True, "output_attentions": True}
    both = kind is MedMoEModel
    inputs = {"pixel_values": images(2)} | (texts(2) if both else {})
    outputs = model(**inputs, **flags)
    vision = outputs.vision_model_output if both else outputs
    assert [tuple(state.shape) for state in vision.hidden_states] == [
        (2, 256, 8),
        (2, 64, 16),
        (2, 16, 32),
        (2, 4, 64),
        (2, 4, 64),
    ]
    # (windows of 4 x 4, heads, tokens, tokens)
    assert [attention.shape[1:] for attention in vision.attentions] == [(1, 16, 16)] * 2 + [(2, 16, 16)] * 2
    if both:
        assert len(outputs.text_model_output.hidden_states) == 4
        assert [tuple(attention.shape) for attention in outputs.text_model_output.attentions] == [(2, 2, 9, 9)] * 3
        assert outputs.text_model_output.hidden_states[-1] is outputs.text_model_output.last_hidden_state
    plain = model(**inputs)
    for part in (plain.vision_model_output, plain.text_model_output) if both else (plain,):
        assert part.hidden_states is None


def one_step(model, inputs, seed=1):
    torch.manual_seed(seed)
    model.zero_grad()
    outputs = model(**inputs)
    loss = outputs.loss if "loss" in outputs else outputs.pooler_output.square().sum()
    loss.backward()
    return loss, gradients(model)


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        (MedMoEModel, {"return_loss": True, "modality": [0, 1, 1]}),
        (MedMoEForImageClassification, {"labels": torch.tensor([0, 1, 1]), "modality": [0, 1, 1]}),
        (MedMoEVisionModel, {"modality": [0, 1, 1]}),
        (MedMoETextModel, {}),
    ],
)
@pytest.mark.parametrize("enable", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_activation_checkpointing_changes_no_gradient(small, kind, inputs, enable):
    model = small(classifier_features="both", vision_config={"global_features": "expert"})
    if kind in (MedMoEVisionModel, MedMoETextModel):
        model = model.vision_model if kind is MedMoEVisionModel else model.text_model
    elif kind is MedMoEForImageClassification:
        model = lived_in(kind(model.config))
    model.train()
    inputs = inputs | ({} if kind is MedMoETextModel else {"pixel_values": images()})
    inputs = inputs | (texts() if kind in (MedMoEModel, MedMoETextModel) else {})
    checkpointed = copy.deepcopy(model)
    getattr(checkpointed, enable)()
    loss, expected = one_step(model, inputs)
    again, recomputed = one_step(checkpointed, inputs)
    assert_same(again, loss)
    assert recomputed.keys() == expected.keys()
    for name, gradient in recomputed.items():
        assert_same(gradient, expected[name], 1e-5)
    for name, norm in batch_norms(checkpointed).items():
        assert norm.num_batches_tracked == int(".0.scale" in name or ".1.scale" in name)
    layers = [module for module in checkpointed.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert all(layer.gradient_checkpointing for layer in layers)
    assert {type(layer).__name__ for layer in layers} == {
        MedMoETextModel: {"BertLayer"},
        MedMoEModel: {"BertLayer", "SwinStage", "SwinLayer"},
    }.get(kind, {"SwinStage", "SwinLayer"})


@pytest.mark.parametrize("backbone", ["swin", "timm/resnet18"])
def test_inputs_can_require_gradients(small, backbone):
    """What adapters on a checkpointed, frozen model need."""
    model = small(vision_config={"backbone": backbone}, projection_dim=16)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    outputs = model(pixel_values=images(), **texts())
    assert outputs.image_embeds.requires_grad
    assert outputs.text_embeds.requires_grad


@pytest.mark.parametrize("backbone", ["swin", "timm/resnet18"])
def test_bfloat16_keeps_batch_norm_in_float32(small, backbone, tmp_path):
    model = small(vision_config={"backbone": backbone}, projection_dim=16)
    model.save_pretrained(tmp_path)
    half = MedMoEModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    in_norms = {
        id(tensor) for norm in batch_norms(half).values() for tensor in norm.state_dict(keep_vars=True).values()
    }
    assert {tensor.dtype for tensor in half.parameters() if id(tensor) in in_norms} == {torch.float32}
    assert {tensor.dtype for tensor in half.parameters() if id(tensor) not in in_norms} == {torch.bfloat16}
    inputs = {"pixel_values": images(), **texts(), "modality": [0, 1, 2]}
    expected, outputs = model(**inputs), half(**inputs)
    for name in ("image_embeds", "text_embeds", "local_embeds", "word_embeds"):
        cosine = cosine_similarity(getattr(outputs, name).float(), getattr(expected, name), dim=1)
        assert cosine[cosine != 0].min() > 0.99, name
    assert outputs.local_embeds.dtype == torch.bfloat16
    assert outputs.logits_per_image.dtype == torch.float32


def test_training_under_bfloat16_autocast(small):
    model = small().train()
    inputs = {"pixel_values": images(), **texts(), "modality": [0, 1, 1], "modality_labels": torch.tensor([0, 1, 1])}
    expected = model(**inputs, return_loss=True).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs, return_loss=True).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


# A block with and one without a shift, two scales, three experts: compiling takes as long as the model is deep.
SHALLOW = {
    "projection_dim": 16,
    "text_config": {"num_hidden_layers": 2},
    "vision_config": {
        "modalities": ["ct", "mri", "xray"],
        "swin_config": {"depths": (2, 1), "num_heads": (1, 2), "embed_dim": 8},
    },
}


@pytest.fixture
def compiled():
    torch.compiler.reset()
    return lambda model, backend="eager": torch.compile(copy.deepcopy(model), backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "changes"), [("eager", {}), ("aot_eager", {"similarity": "mean"})])
def test_compiled_models_give_the_same(small, compiled, backend, changes):
    model = small(**SHALLOW, **changes)
    inputs = {"pixel_values": images(), **texts(), "modality_labels": torch.arange(3)}
    fast = compiled(model, backend)
    for extra in ({}, {"return_loss": True}):
        expected, outputs = model(**inputs, **extra), fast(**inputs, **extra)
        assert_same(outputs.logits_per_image, expected.logits_per_image, 1e-5)
        assert_same(outputs.local_embeds, expected.local_embeds, 1e-5)
    outputs.loss.backward()
    expected.loss.backward()
    assert_same(outputs.loss, expected.loss, 1e-5)
    assert_same(gradients(fast._orig_mod), gradients(model), 1e-4)


@pytest.mark.slow
def test_a_compiled_image_tower_gives_the_same(small, compiled):
    model, pixels = small().vision_model, images()
    fast = compiled(model)
    for modality in ([0, 1, 1], [4, 4, 4]):
        assert_same(fast(pixels, modality=modality).local_embeds, model(pixels, modality=modality).local_embeds)


# Classification


@pytest.mark.parametrize("features", ["backbone", "expert", "both"])
def test_the_head_sees_what_the_config_names(small, features):
    model, pixels = small(MedMoEForImageClassification, classifier_features=features, num_labels=4), images()
    model.vision_model.router = Decided([2, 0, 2])
    tower = model.vision_model(pixels)
    parts = {"backbone": tower.last_hidden_state.mean(dim=1), "expert": tower.local_embeds.mean(dim=(2, 3))}
    seen = torch.cat(list(parts.values()), dim=1) if features == "both" else parts[features]
    assert_same(model(pixels).logits, seen @ model.classifier.weight.t() + model.classifier.bias, 1e-5)
    with calls_of_experts(model) as calls:
        model(pixels, modality="us")
    assert calls == {str(index): int(index == 3 and features != "backbone") for index in range(6)}


def test_a_frozen_tower_stays_as_it_is(small):
    model = small(
        MedMoEForImageClassification, classifier_features="both", freeze_vision_model=True, num_labels=2
    ).train()
    before = copy.deepcopy(model.vision_model.state_dict())
    model(images(), labels=torch.tensor([0, 1, 1])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert gradients(model).keys() == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.vision_model.state_dict().items())
    assert model.training
    assert not model.vision_model.training


def test_a_classifier_starts_from_the_dual_encoder(small, tmp_path, caplog):
    dual = small(projection_dim=16)
    dual.save_pretrained(tmp_path)
    caplog.set_level("WARNING")
    with poisoned_memory():
        model, info = MedMoEForImageClassification.from_pretrained(
            tmp_path, num_labels=3, freeze_vision_model=True, output_loading_info=True
        )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    assert "UNEXPECTED" not in caplog.text
    weights = model.vision_model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in dual.vision_model.state_dict().items())
    assert model.classifier.weight.shape == (3, 64)
    assert model.classifier.weight.isfinite().all()
    assert not any(parameter.requires_grad for parameter in model.vision_model.parameters())
    assert model.classifier.weight.requires_grad


@pytest.mark.parametrize(("problem", "labels", "loss"), [
    ("single_label_classification", torch.tensor([0, 2, 1]), cross_entropy),
    (None, torch.tensor([0, 2, 1]), cross_entropy),
    ("multi_label_classification", torch.eye(3), nn.functional.binary_cross_entropy_with_logits),
    (None, torch.eye(3), nn.functional.binary_cross_entropy_with_logits),
    ("regression", torch.randn(3, 3), nn.functional.mse_loss),
])  # fmt: skip
def test_problem_types(small, problem, labels, loss):
    model, pixels = small(MedMoEForImageClassification, num_labels=3, problem_type=problem), images()
    outputs = model(pixels, labels=labels)
    assert_same(outputs.loss, loss(outputs.logits, labels))
    assert "loss" not in model(pixels)


# Trainer


class Rows(torch.utils.data.Dataset):
    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["pixel_values"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


def collate(rows):
    batch = {name: torch.stack([item[name] for item in rows]) for name in rows[0]}
    return batch | ({"return_loss": True} if "input_ids" in batch else {})


def trainer(model, data, folder, **options):
    defaults = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 3, "report_to": []}
    arguments = TrainingArguments(
        folder, use_cpu=True, save_strategy="no", disable_tqdm=True, remove_unused_columns=False, **defaults | options
    )
    return Trainer(model, arguments, data_collator=collate, train_dataset=data, eval_dataset=data)


def test_trainer_trains_the_dual_encoder(small, tmp_path):
    model = small()
    data = Rows(pixel_values=images(8), **texts(8), modality_labels=torch.tensor([0, 1, 2, 3, 4, 5, -100, -100]))
    training = trainer(model, data, tmp_path, learning_rate=3e-3, max_steps=8)
    before = training.evaluate()["eval_loss"]
    batches = [collate([data[i] for i in range(start, start + 4)]) for start in (0, 4)]
    with torch.no_grad():
        assert before == pytest.approx(sum(model(**batch).loss.item() for batch in batches) / 2, rel=1e-4)
    training.train()
    assert training.evaluate()["eval_loss"] < before


def test_trainer_reports_the_loss_without_modality_labels(small, tmp_path):
    """`Trainer` takes `modality_labels` for labels that it cannot do without, unless told otherwise."""
    data = Rows(pixel_values=images(4), **texts(4))
    assert "eval_loss" in trainer(small(), data, tmp_path, label_names=[]).evaluate()


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 2, 0]), torch.eye(4)[:, :3]])
def test_accumulated_steps_are_one_large_step(small, labels, tmp_path):
    pixels = images(4)
    start = small(MedMoEForImageClassification, num_labels=3)
    heads = []
    for size, steps in ((4, 1), (1, 4)):
        model = copy.deepcopy(start)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        data = Rows(pixel_values=pixels, labels=labels)
        trainer(model, data, tmp_path, optim="sgd", learning_rate=0.1, max_grad_norm=0, **options).train()
        heads.append(model.classifier.weight - start.classifier.weight)
    assert heads[0].abs().max() > 1e-4
    assert_same(heads[1], heads[0], 1e-5)


def test_nothing_warns(small):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(similarity="mean")(pixel_values=images(), **texts(), return_loss=True).loss.backward()


def test_a_frozen_text_encoder_encodes_each_text_once_and_with_others_of_its_length(small):
    """21 texts, of which 12 are different: two calls, of eight texts and of four, with the longest in the second."""
    model = small().text_model.double()
    ids = torch.randint(5, 90, (12, 30))
    lengths = torch.tensor([30, *torch.randint(2, 9, (11,)).tolist()])
    mask = (torch.arange(30) < lengths.unsqueeze(1)).long()
    rows = torch.cat([torch.arange(12), torch.arange(9)])[torch.randperm(21)]
    batch = {"input_ids": (ids * mask)[rows], "attention_mask": mask[rows], "token_type_ids": 0 * ids[rows]}
    with torch.no_grad():
        expected = model(**batch)
    model.encoder.requires_grad_(False)
    calls = []
    model.encoder.register_forward_pre_hook(
        lambda module, inputs, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = model(**batch)
    assert calls == [(8, int(lengths.sort()[0][7])), (4, 30)]
    assert torch.equal(found.word_mask, expected.word_mask)
    for name in ("pooler_output", "word_embeds"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(found.last_hidden_state[seen], expected.last_hidden_state[seen], rtol=1e-9, atol=1e-9)
    assert len(model(**batch, output_hidden_states=True).hidden_states) == model.encoder.config.num_hidden_layers + 1
    assert calls[2:] == [(21, 30)]
