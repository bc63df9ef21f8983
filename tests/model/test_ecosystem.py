"""The model in other libraries' hands: PEFT, Accelerate's offloading, hooks, pickle, export, the meta device."""

import copy
import pickle

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers import AutoConfig, AutoModel

from medmoe_hf.model import MedMoEForImageClassification, MedMoEModel, MedMoEVisionModel
from medmoe_hf.model.modeling_medmoe import MedMoEBatchNorm, MedMoEConv2d
from medmoe_hf.model.word_regions_medmoe import gloria_logits


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    words = torch.tensor([[-1, 0, 0, 1, 2, 3, -1], [-1, 0, 1, 1, -1, -1, -1], [-1, 0, 1, 2, 3, 4, -1]])
    return {
        "pixel_values": torch.randn(4, 3, 64, 64) + torch.arange(4).view(-1, 1, 1, 1) * torch.linspace(-1, 1, 64),
        "input_ids": torch.randint(5, 90, (3, 7)),
        "attention_mask": mask,
        "word_ids": words,
    }


@pytest.fixture(scope="module")
def make(small_config, lived_in, inputs):
    """Makes the dual encoder, every part of its output dependent on the experts, of which the inputs go to several."""

    def of(**changes):
        torch.manual_seed(0)
        model = lived_in(MedMoEModel(small_config(**{"similarity": "mean", **changes})))
        texts = {name: value for name, value in inputs.items() if name != "pixel_values"}
        with torch.no_grad():
            for router, embeds in (
                (model.vision_model.router, model.vision_model.encode(inputs["pixel_values"]).pooler_output),
                (model.report_router, model.text_model(**texts).pooler_output),
            ):
                nn.init.normal_(router.fc1.weight, std=3.0)
                router.fc1.bias.copy_(-router.fc1.weight @ embeds.mean(dim=0))
                router.fc2.bias.sub_(router(embeds).mean(dim=0))
        return model

    return of


@pytest.fixture(scope="module")
def folder(make, tmp_path_factory):
    place = tmp_path_factory.mktemp("ecosystem") / "dual"
    make().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def expected(make, inputs):
    with torch.no_grad():
        outputs = make()(**inputs)
    assert len(outputs.expert_ids.unique()) > 1
    return outputs


def assert_outputs(found, expected, names=("logits_per_image", "image_embeds", "local_embeds", "scale_weights")):
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


# PEFT


def test_the_convolutions_take_what_torchs_take():
    ours, theirs = MedMoEConv2d(3, 5, 3, 2, padding=1, bias=False), nn.Conv2d(3, 5, 3, 2, padding=1, bias=False)
    theirs.load_state_dict(ours.state_dict())
    maps = torch.randn(2, 3, 9, 9)
    assert torch.equal(ours(maps), theirs(maps))


@pytest.mark.parametrize("targets", [["fc1"], ["fc1", "fc2"], ["convolution"], ["convolution", "fc1", "fc2"]])
def test_lora_on_expert_layers(make, inputs, expected, targets):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(make(), peft.LoraConfig(target_modules=targets, r=2)).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        apart = wrapped(**inputs)
        merged = wrapped.merge_and_unload(safe_merge=True)(**inputs)
    assert (apart.local_embeds - expected.local_embeds).abs().max() > 1e-3
    assert_outputs(merged, apart)


# Offloading and hooks


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloading_of_everything(make, inputs, expected, tmp_path, where):
    model = make()
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert model.vision_model.experts[0].scale_attention.fc1.weight.is_meta
    with torch.no_grad():
        assert_outputs(model(**inputs), expected)


@pytest.mark.parametrize("device_map", [
    {"vision_model": "disk", "text_model": "cpu", "report_router": "cpu"},
    {"vision_model": "cpu", "text_model": "disk", "report_router": "disk"},
    "auto",
])  # fmt: skip
def test_device_maps_with_a_disk(folder, inputs, expected, tmp_path, device_map):
    room = {"cpu": "300KB"} if device_map == "auto" else None
    model = AutoModel.from_pretrained(folder, device_map=device_map, max_memory=room, offload_folder=str(tmp_path))
    assert "disk" in model.hf_device_map.values()
    with torch.no_grad():
        assert_outputs(model(**inputs), expected)


@pytest.mark.parametrize("kind", ["forward", "pre", "wrapped"])
def test_hooks_on_expert_layers_run(make, inputs, expected, kind):
    model, called = make(), set()
    layers = {name: layer for name, layer in model.vision_model.experts.named_modules() if not list(layer.children())}
    for name, layer in layers.items():
        if kind == "forward":
            layer.register_forward_hook(lambda module, given, result, name=name: called.add(name))
        elif kind == "pre":
            layer.register_forward_pre_hook(lambda module, given, name=name: called.add(name))
        else:
            layer.forward = lambda given, own=layer.forward, name=name: (called.add(name), own(given))[1]
    with torch.no_grad():
        outputs = model.vision_model(inputs["pixel_values"])
    assert torch.equal(outputs.expert_ids, expected.vision_model_output.expert_ids)
    torch.testing.assert_close(outputs.local_embeds, expected.vision_model_output.local_embeds, rtol=1e-4, atol=1e-5)
    selected = {str(expert) for expert in outputs.expert_ids.tolist()}
    assert called == {name for name in layers if name.split(".")[0] in selected}


def test_a_hook_may_change_a_norms_output(make, inputs, expected):
    model = make()
    for layer in model.vision_model.experts.modules():
        if isinstance(layer, MedMoEBatchNorm):
            layer.register_forward_hook(lambda module, given, result: torch.zeros_like(result))
    with torch.no_grad():
        assert not model.vision_model(inputs["pixel_values"]).local_embeds.any()


# Pickle


@pytest.mark.parametrize("again", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy])
def test_a_used_model_can_be_pickled_and_copied(make, inputs, expected, again):
    model = make()
    with torch.no_grad():
        model(**inputs)
        twin = again(model)
        assert_outputs(twin(**inputs), expected)
        assert_outputs(model(**inputs, output_hidden_states=True), expected)
    states = twin(**inputs, output_hidden_states=True).text_model_output.hidden_states
    assert len(states) == 4  # recorded once each, not twice
    assert_outputs(pickle.loads(pickle.dumps(twin))(**inputs), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert_outputs(model(**inputs), expected)


# Export and the meta device


@pytest.mark.parametrize("changes", [
    {"similarity": "mean", "vision_config": {"global_features": "expert"}},
    pytest.param({"similarity": "local", "local_loss": "token"}, marks=pytest.mark.slow),
    pytest.param({"similarity": "global"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_export_of_a_whole_model_that_reports_route(make, inputs, changes):
    tiny = {
        "modalities": ["ct", "mri", "xray"],
        "swin_config": {"depths": (1, 1), "num_heads": (1, 1), "embed_dim": 8},
        **changes.get("vision_config", {}),
    }
    changes = {**changes, "text_config": {"num_hidden_layers": 1}, "num_summed_layers": 1, "projection_dim": 16}
    model = make(**{**changes, "vision_config": tiny})
    batch, texts = torch.export.Dim("batch"), torch.export.Dim("texts")
    sizes = {name: {0: batch if name == "pixel_values" else texts} for name in inputs}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=sizes, strict=False).module()
        others = {name: value.flip(0)[:2] for name, value in inputs.items()}
        others["pixel_values"] = torch.cat([inputs["pixel_values"][1:], torch.randn(2, 3, 64, 64)])
        for given in (inputs, others):
            reference = model(**given)
            found = program(**given)
            assert_outputs(found, reference)
            assert torch.equal(found.expert_ids, reference.expert_ids)
        routed = model.route(**{name: value for name, value in inputs.items() if name != "pixel_values"})
    assert len(routed.expert_ids.unique()) > 1


def test_padded_similarities_are_those_of_the_words_alone():
    torch.manual_seed(0)
    maps, words = torch.randn(3, 8, 4, 4), torch.randn(5, 6, 8)
    mask = torch.arange(6) < torch.tensor([6, 3, 0, 1, 4]).unsqueeze(1)
    plain = gloria_logits(maps, words, mask, 4.0, 5.0, 10.0)

    class Similarity(nn.Module):
        def forward(self, maps, words, mask):
            return gloria_logits(maps, words, mask, 4.0, 5.0, 10.0)

    exported = torch.export.export(Similarity(), (maps, words, mask), strict=False).module()(maps, words, mask)
    torch.testing.assert_close(exported, plain, rtol=1e-5, atol=1e-5)
    assert not exported[:, 2].any()


@pytest.mark.parametrize(("local_loss", "gradients"), [("gloria", True), ("token", False)])
def test_sizes_on_the_meta_device(small_config, inputs, local_loss, gradients):
    with torch.device("meta"):
        model = MedMoEModel(small_config(similarity="mean", local_loss=local_loss)).eval()
        classifier = MedMoEForImageClassification(small_config(classifier_features="both", num_labels=4)).eval()
    given = {name: value.to("meta") for name, value in inputs.items()}
    with torch.set_grad_enabled(gradients):
        outputs = model(**given)
        assert outputs.logits_per_image.shape == (4, 3)
        assert outputs.local_embeds.shape == (4, 64, 16, 16)
        assert model.get_image_features(given["pixel_values"], modality="ct").local_embeds.shape == (4, 64, 16, 16)
        assert model.ground(**given | {"pixel_values": given["pixel_values"][:3]}).heatmaps.shape == (3, 7, 16, 16)
        assert classifier(given["pixel_values"]).logits.shape == (4, 4)
        pairs = given | {"pixel_values": given["pixel_values"][:3]}
        assert model.train()(**pairs, return_loss=True).loss.shape == ()


# Batches of nothing


@pytest.mark.parametrize(("images", "texts"), [(0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("similarity", ["mean", "global"])
def test_batches_of_nothing(make, inputs, expected, images, texts, gradients, similarity):
    model = make(similarity=similarity, projection_dim=16)
    given = {name: value[: images if name == "pixel_values" else texts] for name, value in inputs.items()}
    with torch.set_grad_enabled(gradients):
        outputs = model(**given, output_hidden_states=True)
    assert outputs.logits_per_image.shape == (images, texts)
    assert outputs.image_embeds.shape == (images, 16)
    assert outputs.text_embeds.shape == (texts, 16)
    assert outputs.local_embeds.shape == (images, 16, 16, 16)
    assert outputs.word_embeds.shape == (texts, 7, 16)
    assert outputs.vision_model_output.hidden_states[0].shape == (images, 256, 8)


def test_a_loss_of_nothing_is_refused(make, small_config, inputs):
    nothing = {name: value[:0] for name, value in inputs.items()}
    with pytest.raises(ValueError, match="needs images, and one text for each; got 0 images, 0 texts"):
        make()(**nothing, return_loss=True)
    classifier = MedMoEForImageClassification(small_config(num_labels=4))
    assert classifier(nothing["pixel_values"]).logits.shape == (0, 4)
    with pytest.raises(ValueError, match="`pixel_values` holds none"):
        classifier(nothing["pixel_values"], labels=torch.zeros(0, dtype=torch.long))


# Recorded outputs, as CLIP's


def recorded(outputs, name):
    return [part.get(name) and len(part[name]) for part in (outputs.text_model_output, outputs.vision_model_output)]


@pytest.mark.parametrize("by", ["argument", "whole", "parts", "loading"])
def test_hidden_states_by_the_configuration(folder, inputs, by):
    model = AutoModel.from_pretrained(folder, **({"output_hidden_states": True} if by == "loading" else {}))
    if by == "whole":
        model.config.output_hidden_states = True
    if by == "parts":
        model.config.text_config.output_hidden_states = model.config.vision_config.output_hidden_states = True
    arguments = {"output_hidden_states": True} if by == "argument" else {}
    assert recorded(model(**inputs, **arguments), "hidden_states") == [4, 5]
    assert recorded(model(**inputs, output_hidden_states=False), "hidden_states") == [None, None]
    features = model.get_image_features(inputs["pixel_values"], **arguments)
    assert len(features.hidden_states) == 5


@pytest.mark.parametrize("by", ["argument", "whole", "parts"])
def test_attentions_by_the_configuration(folder, inputs, by):
    model = AutoModel.from_pretrained(folder, attn_implementation="eager")
    if by == "whole":
        model.config.output_attentions = True
    if by == "parts":
        model.config.text_config.output_attentions = model.config.vision_config.output_attentions = True
    arguments = {"output_attentions": True} if by == "argument" else {}
    assert recorded(model(**inputs, **arguments), "attentions") == [3, 4]
    assert not any(recorded(model(**inputs, output_attentions=False), "attentions"))


def test_a_tower_alone_and_its_backbone(small_config, inputs):
    config = small_config().vision_config
    config.output_hidden_states = True
    model = MedMoEVisionModel(config).eval()
    assert len(model(inputs["pixel_values"]).hidden_states) == 5
    assert model.backbone(inputs["pixel_values"]).hidden_states is None
    config.swin_config.output_hidden_states = True
    assert len(model.backbone(inputs["pixel_values"]).hidden_states) == 5
    classifier = MedMoEForImageClassification(small_config(output_hidden_states=True))
    assert len(classifier(inputs["pixel_values"]).hidden_states) == 5


@pytest.mark.parametrize(("wanted", "kept"), [([0, 2], {0, 2}), (-1, {-1}), ([1, -1, 9], {1, -1}), (2, {2})])
@pytest.mark.parametrize("gradients", [True, False])  # without them, the batch goes through in pieces
def test_chosen_hidden_states(make, inputs, wanted, kept, gradients, monkeypatch):
    monkeypatch.setattr("medmoe_hf.model.modeling_medmoe.CPU_PIXELS", 2 * 64 * 64)
    with torch.set_grad_enabled(gradients):
        every = make()(**inputs, output_hidden_states=True)
        some = make()(**inputs, output_hidden_states=wanted)
    for part in ("text_model_output", "vision_model_output"):
        states, all_states = some[part].hidden_states, every[part].hidden_states
        assert len(states) == len(all_states)
        wanted_ones = {index % len(states) for index in kept}
        assert {index for index, state in enumerate(states) if state is not None} == wanted_ones
        assert all(torch.equal(states[index], all_states[index]) for index in wanted_ones)


def test_a_timm_backbone_gives_its_maps(small_config):
    pytest.importorskip("timm")
    config = small_config(vision_config={"backbone": "timm/resnet18"}).vision_config
    states = MedMoEVisionModel(config).eval()(torch.randn(1, 3, 64, 64), output_hidden_states=[0, 2]).hidden_states
    assert [state and tuple(state.shape) for state in (states[1], states[3])] == [None, None]
    assert [tuple(states[index].shape) for index in (0, 2)] == [(1, 64, 16, 16), (1, 256, 4, 4)]


@pytest.mark.parametrize(
    "name", ["hf-hub:someone/model", "hf_hub:someone/model", "local-dir:folder/x", "timm:a/b", "a/b"]
)
def test_backbones_from_elsewhere_are_refused(small_config, monkeypatch, name):
    """timm would fetch the configuration of a third party's repository when the model is made."""
    timm = pytest.importorskip("timm")
    asked = []

    def create(name, **options):
        asked.append(name)
        raise RuntimeError("asked")

    monkeypatch.setattr(timm, "create_model", create)
    config = small_config(vision_config={"backbone": f"timm/{name}"}, projection_dim=16)
    with pytest.raises(ValueError, match=r"is not part of timm.* set MEDMOE_FOREIGN_BACKBONES=1"):
        MedMoEModel(config)
    assert not asked
    monkeypatch.setenv("MEDMOE_FOREIGN_BACKBONES", "1")
    with pytest.raises(RuntimeError, match="asked"):
        MedMoEModel(config)
    assert asked == [name]


# 16 bits


@pytest.mark.parametrize(
    ("dtype", "backbone"),
    [(torch.bfloat16, "swin"), (torch.float16, "timm/resnet18"), (torch.float64, "timm/resnet18")],
)
def test_norms_of_a_model_made_in_16_bits(small_config, folder, dtype, backbone, tmp_path):
    """As `from_pretrained` has them: their running statistics would lose their small updates."""
    changes = {"vision_config": {"backbone": backbone}} if backbone != "swin" else {}
    config = small_config(projection_dim=16, **changes)
    MedMoEModel(config).save_pretrained(tmp_path)
    made = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path), dtype=dtype)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    types, expected = (
        {name: tensor.dtype for name, tensor in model.state_dict().items() if "num_batches" not in name}
        for model in (made, loaded)
    )
    assert types == expected
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert {value for name, value in types.items() if "running_mean" in name} == {kept}
    assert types["vision_model.router.fc1.weight"] == dtype
    if dtype == torch.bfloat16:
        pixels = torch.tensor(np.random.default_rng(0).normal(size=(2, 3, 64, 64)), dtype=torch.float32)
        made.load_state_dict(loaded.state_dict())
        with torch.no_grad():
            features = [model.eval().get_image_features(pixels).pooler_output for model in (made, loaded)]
        assert torch.equal(*features)
