"""Ways of running the experts that must not show: grouped, inside a graph, without a map, with folded norms."""

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn.functional import interpolate

from medmoe_hf.model import MedMoEVisionModel, modeling_medmoe
from medmoe_hf.model.modeling_medmoe import MedMoEConvLayer, MedMoEScaleScorer, MedMoETokenExpert
from medmoe_hf.model.word_regions_medmoe import gloria_logits

KINDS = {
    "paper": {},
    "plus": {"pyramid_norm": True, "scale_attention_native": True, "router_norm": True},
    "official": {"expert_type": "token"},
    "soft": {"mixture": "soft", "map_size": 5},
    "map of another size": {"map_size": 9},
}
SIX_AND_TWO_ALIKE = [3, 0, 5, 3, 1, 2, 4]


@pytest.fixture(params=list(KINDS))
def tower(request, small_config, lived_in):
    config = small_config(router="image", vision_config=KINDS[request.param]).vision_config
    return lived_in(MedMoEVisionModel(config))


def slow_expert(expert, feature_maps, size):
    """As the paper draws it: a norm after each convolution, scores on aligned maps, position by position mixed."""
    aligned, scores = [], []
    for project, feature_map in zip(expert.scale_projections, feature_maps, strict=True):
        hidden = feature_map
        for layer in project:
            if isinstance(layer, MedMoEConvLayer):
                norm = layer.batch_norm
                hidden = nn.functional.conv2d(
                    hidden, layer.convolution.weight, padding=layer.convolution.kernel_size[0] // 2
                )
                deviation = (norm.running_var + norm.eps).sqrt()
                hidden = (hidden - norm.running_mean[:, None, None]) / deviation[:, None, None]
                hidden = (hidden * norm.weight[:, None, None] + norm.bias[:, None, None]).relu()
            else:
                hidden = layer(hidden)
        scorer = nn.Sequential(expert.scale_attention.fc1, nn.ReLU(), expert.scale_attention.fc2)
        aligned.append(expert.align(hidden, size))
        scores.append(
            interpolate(scorer(hidden), size=tuple(size), mode="bilinear")
            if expert.score_native
            else scorer(aligned[-1])
        )
    weights = torch.cat(scores, dim=1).softmax(dim=1)
    return sum(weights[:, [index]] * scale for index, scale in enumerate(aligned)), weights


@torch.no_grad()
def test_an_expert_gives_what_the_plain_formulation_gives(tower):
    """Folded norms, and the first layer of the scores before the interpolation."""
    maps = tower.encode(torch.randn(2, 3, 64, 96)).feature_maps
    size = tower.map_size(maps)
    for expert in tower.experts[:2]:
        for found, right in zip(expert(maps, size), slow_expert(expert, maps, size), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


def test_a_linear_layer_may_run_before_the_interpolation():
    scorer = MedMoEScaleScorer(6, 4)
    maps = torch.randn(2, 6, 3, 5)

    def align(values):
        return interpolate(values, size=(7, 11), mode="bilinear")

    torch.testing.assert_close(scorer(maps, align), scorer(align(maps)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("source", "size"), [((3, 5), (7, 11)), ((28, 28), (56, 56)), ((9, 8), (4, 5)), ((1, 2), (6, 3))]
)
def test_tokens_are_interpolated_as_one_sequence(source, size):
    """In value and gradient, as torch does it."""
    maps = torch.randn(2, 6, *source, dtype=torch.double).to(memory_format=torch.channels_last).requires_grad_()
    found = MedMoETokenExpert.align(maps, size)
    right = interpolate(maps.flatten(2), size=size[0] * size[1], mode="linear").unflatten(2, size)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(right)
    gradients = [torch.autograd.grad((value * weights).sum(), maps)[0] for value in (found, right)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_the_mean_needs_no_map(tower):
    """In value and in gradient, at sizes that divide by nothing."""
    pixels = torch.randn(3, 3, 64, 100)
    found = {}
    for local in (True, False):
        inputs = pixels.clone().requires_grad_()
        output = tower.encode(inputs)
        ids = torch.tensor([4, 0, 4])
        mixture = tower.mixture_weights(tower.router(output.pooler_output))
        if local:
            mean = tower.fuse(output.feature_maps, ids, mixture)[0].mean(dim=(2, 3))
        else:
            mean = tower.mean_embeds(output.feature_maps, ids, mixture)
        mean.square().sum().backward()
        found[local] = mean.detach(), inputs.grad
    for right, value in zip(*found.values(), strict=True):
        torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["expert", "both"])
def test_the_tower_without_local_maps_gives_the_same_embedding(small_config, lived_in, kind):
    fields = {"vision_config": {"global_features": kind}, "projection_dim": 16}
    tower = lived_in(MedMoEVisionModel(small_config(**fields).vision_config))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            tower(pixels, local=False).pooler_output, tower(pixels).pooler_output, rtol=1e-5, atol=1e-6
        )


@torch.no_grad()
@pytest.mark.parametrize("mean_only", [True, False])
def test_each_image_with_its_expert_s_parameters_is_what_groups_give(tower, mean_only, monkeypatch):
    """As it is done inside a graph."""
    maps = tower.encode(torch.randn(len(SIX_AND_TWO_ALIKE), 3, 64, 96)).feature_maps
    arguments = maps, torch.tensor(SIX_AND_TWO_ALIKE), tower.map_size(maps), mean_only
    grouped = tower._dispatch(*arguments)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    calls = []
    for expert in tower.experts[1:]:
        expert.register_forward_pre_hook(lambda *_: calls.append(1))
    for found, right in zip(tower._dispatch(*arguments), grouped, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    assert not calls


@pytest.mark.parametrize("mean_only", [True, False])
def test_one_by_one_without_gradients_is_what_groups_give_with_them(tower, mean_only):
    whole = tower.encode(torch.randn(len(SIX_AND_TWO_ALIKE), 3, 64, 96)).feature_maps
    maps = [feature_map.detach() for feature_map in whole]
    arguments = maps, torch.tensor(SIX_AND_TWO_ALIKE), tower.map_size(maps), mean_only
    sizes = []
    for expert in tower.experts:
        expert.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0][0])))
    grouped = tower._dispatch(*arguments)
    assert max(sizes) > 1
    sizes.clear()
    with torch.no_grad():
        alone = tower._dispatch(*arguments)
    assert sizes == [1] * len(SIX_AND_TWO_ALIKE)
    for found, right in zip(alone, grouped, strict=True):
        torch.testing.assert_close(found, right.detach(), rtol=1e-5, atol=1e-5)
        assert found.stride() == right.stride()


def test_groups_give_the_gradients_of_images_one_by_one_in_the_format_of_the_maps(tower):
    """A gradient in another memory format makes each step of an expert's backward pass several times as slow."""
    ids, size = torch.tensor(SIX_AND_TWO_ALIKE), (8, 12)
    whole = tower.encode(torch.randn(len(ids), 3, 64, 96)).feature_maps
    maps = [feature_map.detach().contiguous(memory_format=torch.channels_last) for feature_map in whole]
    words = torch.randn(4, 3, tower.config.local_size)
    weights = torch.randn(len(ids), 4)
    inputs = [feature_map.requires_grad_() for feature_map in maps]
    # The same bias for the scores of all scales has no influence: its gradient is rounding.
    parameters = {name: value for name, value in tower.experts.named_parameters() if not name.endswith("fc2.bias")}

    def gradients(local):
        logits = gloria_logits(local, words, torch.ones(4, 3, dtype=torch.bool), 4.0, 5.0, 10.0)
        return torch.autograd.grad((logits * weights).sum(), [*inputs, *parameters.values()])

    alone = [
        tower.experts[expert]([feature_map[[row]] for feature_map in maps], size)[0]
        for row, expert in enumerate(SIX_AND_TWO_ALIKE)
    ]
    expected = gradients(torch.cat(alone).contiguous())
    formats = []

    def watched(_, __, outputs):
        outputs[0].register_hook(
            lambda gradient: formats.append(gradient.is_contiguous(memory_format=torch.channels_last))
        )

    for expert in tower.experts:
        expert.register_forward_hook(watched)
    found = gradients(tower._dispatch(maps, ids, size)[0])
    assert formats == [True] * 6
    for name, value, right in zip([*map(str, range(len(maps))), *parameters], found, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5 * right.abs().max().item() + 1e-7, msg=name)


@pytest.mark.parametrize("asked", [{}, {"output_hidden_states": True, "output_attentions": True}])
def test_a_backbone_in_pieces_is_what_it_is_in_one(tower, asked, monkeypatch):
    pixels = torch.randn(5, 3, 64, 96)
    seen = []
    tower.backbone.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    if asked:
        tower.set_attn_implementation("eager")
    whole = tower.encode(pixels, **asked)
    monkeypatch.setattr(modeling_medmoe, "CPU_PIXELS", 2 * 64 * 96)
    with torch.no_grad():
        parts = tower.encode(pixels, **asked)
    assert seen == [5, 2, 2, 1]
    assert parts.keys() == whole.keys()
    for name, value in parts.items():
        for found, right in zip(
            *([one] if torch.is_tensor(one) else one for one in (value, whole[name])), strict=True
        ):
            torch.testing.assert_close(found, right.detach(), rtol=1e-5, atol=1e-5, msg=name)
    assert ("attentions" in parts) == bool(asked)


@torch.no_grad()
def test_processes_that_work_together_call_every_module_once(tower, monkeypatch):
    """Sharded weights are gathered by all of them at a time, whatever their batches and routes."""
    monkeypatch.setattr(modeling_medmoe, "in_process_group", lambda: True)
    monkeypatch.setattr(modeling_medmoe, "CPU_PIXELS", 1)
    calls = []
    for module in (tower.backbone, *tower.experts):
        module.register_forward_pre_hook(lambda module, _: calls.append(module))
    tower(torch.randn(3, 3, 64, 64), modality=[0, 0, 2])
    assert calls == [tower.backbone, *tower.experts]


def test_images_with_named_experts_are_grouped_without_a_look_at_the_device(tower, monkeypatch):
    """On a GPU each look would wait for all that has been launched before."""
    maps = tower.encode(torch.randn(len(SIX_AND_TWO_ALIKE), 3, 64, 96)).feature_maps
    ids = torch.tensor(SIX_AND_TWO_ALIKE)
    expected = tower.fuse(maps, ids)

    def looked(tensor, *arguments):
        raise AssertionError("read on the host")

    for name in ("tolist", "item", "__bool__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, looked)
    found = tower.fuse(maps, tower.select_experts(torch.zeros(7, 6), SIX_AND_TWO_ALIKE), None, SIX_AND_TWO_ALIKE)
    with pytest.raises(AssertionError, match="read on the host"):
        tower.fuse(maps, ids, None, [3, 0, 5, None, 1, 2, 4])
    monkeypatch.undo()
    for value, right in zip(found, expected, strict=True):
        assert torch.equal(value, right)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["swin", "timm/resnet18"])
def test_backbone_and_experts_are_graphs_with_gradients(small_config, lived_in, backbone):
    """Without a break, in training, and the same as uncompiled."""
    torch._dynamo.reset()
    tower = lived_in(MedMoEVisionModel(small_config(vision_config={"backbone": backbone}).vision_config)).train()
    pixels = torch.randn(3, 3, 64, 64)
    maps = [feature_map.detach() for feature_map in tower.encode(pixels).feature_maps]
    runs = {tower.backbone: lambda part: part(pixels).pooler_output, tower.experts[0]: lambda part: part(maps)[0]}
    for part, run in runs.items():
        found = []
        for module in (part, torch.compile(part, backend="aot_eager", fullgraph=True)):
            part.zero_grad(set_to_none=True)
            torch.manual_seed(0)
            value = run(module)
            value.square().sum().backward()
            gradients = [weight.grad.flatten() for weight in part.parameters() if weight.grad is not None]
            found.append((value, torch.cat(gradients)))
        for value, right in zip(*found, strict=True):
            assert (value - right).norm() <= 1e-4 * right.norm()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("backbone", ["swin", "timm/resnet18", "timm/convnext_atto"])
def test_the_tower_is_one_graph(small_config, lived_in, backbone):
    """Without a break, for routings that differ within the batch, and the same graph for another batch size."""
    torch._dynamo.reset()
    config = small_config(router="image", vision_config={"backbone": backbone}).vision_config
    tower = lived_in(MedMoEVisionModel(config))
    # As after training, where images go to different experts.
    tower.router.fc1.weight.mul_(60)
    graphs = torch._dynamo.testing.CompileCounter()
    graph = torch.compile(tower, backend=graphs, fullgraph=True)
    for count in (9, 2):
        pixels = 2 * torch.randn(count, 3, 64, 64) + torch.randn(count, 3, 1, 1)
        torch._dynamo.mark_dynamic(pixels, 0)
        right, found = tower(pixels), graph(pixels)
        if count == 9:
            assert len(set(right.expert_ids.tolist())) > 1
        for name in ("pooler_output", "local_embeds", "scale_weights", "router_logits"):
            torch.testing.assert_close(found[name], right[name], rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 1
