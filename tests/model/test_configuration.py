"""The configurations: presets and overrides, what is refused and how, JSON, names of modalities."""

import importlib
import importlib.metadata
import json
import sys

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, BertConfig, DistilBertConfig

from medmoe_hf.model import MedMoEConfig, MedMoESwinConfig, MedMoETextConfig, MedMoEVisionConfig

SIX = {0: "xray", 1: "ct", 2: "mri", 3: "ultrasound", 4: "histopathology", 5: "fundus"}


def saved_and_loaded(config, folder, **changes):
    config.save_pretrained(folder)
    return type(config).from_pretrained(folder, **changes)


# Presets and overrides


def test_the_default_is_the_paper():
    assert MedMoEConfig.from_preset("paper").to_dict() == MedMoEConfig(text_config={"vocab_size": 28996}).to_dict()


def test_values_of_the_paper():
    config = MedMoEConfig.from_preset("paper")
    vision, text, swin = config.vision_config, config.text_config, config.vision_config.swin_config
    assert config.modalities == SIX
    assert (config.router, config.projection_dim, config.local_loss) == ("report", None, "gloria")
    assert (config.temp1, config.temp2, config.temp3) == (4, 5, 10)
    assert (config.global_loss_weight, config.local_loss_weight, config.aux_loss_weight) == (1, 1, 4)
    assert (config.num_summed_layers, config.word_pooling) == (4, "sum")
    assert (vision.num_experts, vision.global_features, vision.image_size) == (6, "backbone", 224)
    assert (vision.expert_hidden_size, vision.local_size, vision.scale_attention_size) == (144, 768, 192)
    assert vision.router_hidden_size == 128
    assert (swin.embed_dim, list(swin.depths), list(swin.num_heads)) == (96, [2, 2, 6, 2], [3, 6, 12, 24])
    assert (text.model_type, text.hidden_size, text.num_hidden_layers, text.vocab_size) == ("bert", 768, 12, 28996)


@pytest.mark.parametrize("preset", ["paper", "official", "plus", "tiny"])
def test_overrides_change_single_fields_of_nested_configs(preset):
    before = MedMoEConfig.from_preset(preset)
    after = MedMoEConfig.from_preset(
        preset, temp1=9, text_config={"vocab_size": 50}, vision_config={"swin_config": {"window_size": 3}}
    )
    assert (after.temp1, after.text_config.vocab_size, after.vision_config.swin_config.window_size) == (9, 50, 3)
    assert after.text_config.hidden_size == before.text_config.hidden_size
    assert after.vision_config.swin_config.embed_dim == before.vision_config.swin_config.embed_dim
    assert after.vision_config.image_size == before.vision_config.image_size
    assert MedMoEConfig.from_preset(preset).to_dict() == before.to_dict(), "the preset itself was changed"


def test_own_modalities_replace_the_six():
    config = MedMoEConfig.from_preset("tiny", vision_config={"modalities": {0: "dermoscopy", 1: "OCT"}})
    assert config.modalities == {0: "dermoscopy", 1: "OCT"}
    assert config.vision_config.num_experts == 2
    twelve = MedMoEVisionConfig(modalities=[f"kind {k}" for k in range(12)])
    assert (twelve.num_experts, twelve.modalities[11]) == (12, "kind 11")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"projecton_dim": 3}, "`projecton_dim` .* Did you mean `projection_dim`"),
        ({"vision_config": {"local_sise": 3}}, "Did you mean `vision_config.local_size`"),
        (
            {"vision_config": {"swin_config": {"windw_size": 3}}},
            "Did you mean `vision_config.swin_config.window_size`",
        ),
        ({"text_config": {"hiden_size": 3}}, "BertConfig. Did you mean `text_config.hidden_size`"),
        ({"text_config": {"model_type": "bort"}}, 'transformers knows no "bort"'),
    ],
)
def test_overrides_with_typing_errors_are_refused_with_a_suggestion(overrides, message):
    with pytest.raises(ValueError, match=message):
        MedMoEConfig.from_preset("tiny", **overrides)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    known = "official, paper, plus, small, tiny"
    with pytest.raises(ValueError, match=rf'Unknown preset "large"\. Known presets: {known}'):
        MedMoEConfig.from_preset("large")


@pytest.mark.parametrize(("given", "kind", "width"), [
    ({"model_type": "distilbert", "dim": 24, "n_heads": 2}, DistilBertConfig, 24),
    ({"hidden_size": 24, "num_attention_heads": 2}, BertConfig, 24),
    (BertConfig(hidden_size=24, num_attention_heads=2), BertConfig, 24),
    (None, BertConfig, 768),
])  # fmt: skip
def test_the_text_encoder_is_resolved_by_its_model_type(given, kind, width):
    config = MedMoETextConfig(text_config=given)
    assert type(config.text_config) is kind
    assert config.hidden_size == width


def test_the_swin_is_of_a_type_of_its_own():
    swin = MedMoEVisionConfig().swin_config
    assert type(swin) is MedMoESwinConfig
    assert swin.model_type == "medmoe_swin"


@pytest.mark.parametrize(
    ("fields", "side"),
    [({}, 224), ({"image_size": 96}, 96), ({"swin_config": {"image_size": 192}}, 192), ({"backbone": "timm/x"}, 224)],
)
def test_image_size_is_told_once(fields, side):
    config = MedMoEVisionConfig(**fields)
    assert config.image_size == side
    assert config.swin_config is None or config.swin_config.image_size == side


def test_a_timm_backbone_has_no_swin():
    config = MedMoEVisionConfig(backbone="timm/resnet18", swin_config={"embed_dim": 8}, out_indices=(2, 3, 4))
    assert config.swin_config is None
    assert config.hidden_size is None


# What is refused


@pytest.mark.parametrize(("make", "fields", "message"), [
    (MedMoEVisionConfig, {"expert_hidden_size": 0}, "`expert_hidden_size` must be greater than 0, got 0"),
    (MedMoEVisionConfig, {"local_size": -1}, "`local_size` must be greater than 0"),
    (MedMoEVisionConfig, {"image_size": 0}, "`image_size` must be greater than 0"),
    (MedMoEVisionConfig, {"modalities": []}, "at least one expert"),
    (MedMoEVisionConfig, {"modalities": {0: "a", 2: "b"}}, "without a gap"),
    (MedMoEVisionConfig, {"modalities": {"a": "b"}}, "must map expert numbers to names"),
    (MedMoEVisionConfig, {"modalities": ["CT", "ct"]}, "a unique name per expert"),
    (MedMoEVisionConfig, {"modalities": ["ct", " "]}, "a unique name per expert"),
    (MedMoEVisionConfig, {"backbone": "resnet18"}, '`backbone` must be "swin" or "timm/<name>", got "resnet18"'),
    (MedMoEVisionConfig, {"out_indices": (1, 2)}, "`out_indices` chooses levels of a timm backbone"),
    (MedMoEVisionConfig, {"global_features": "all"}, "global_features"),
    (MedMoEVisionConfig, {"router_hidden_size": "128"}, "router_hidden_size"),
    (MedMoETextConfig, {"num_summed_layers": 13}, r"1\.\.12"),
    (MedMoETextConfig, {"num_summed_layers": 0}, r"1\.\.12"),
    (MedMoETextConfig, {"word_pooling": "max"}, "word_pooling"),
    (MedMoEConfig, {"temp1": 0}, "`temp1` must be greater than 0, got 0"),
    (MedMoEConfig, {"temp3": -1.0}, "`temp3` must be greater than 0"),
    (MedMoEConfig, {"temp1": float("nan")}, "`temp1` must be a finite number, got nan"),
    (MedMoEConfig, {"temp2": float("inf")}, "`temp2` must be a finite number, got inf"),
    (MedMoEConfig, {"local_loss_weight": float("nan")}, "`local_loss_weight` must be finite and not negative"),
    (MedMoEConfig, {"initializer_range": float("nan")}, "`initializer_range` must be a finite number"),
    (MedMoEConfig, {"projection_dim": 10**9}, "`projection_dim` must be at most 65536, got 1000000000"),
    (MedMoEConfig, {"text_config": {"num_hidden_layers": 10**9}}, "_layers` must be at most 1000, got 1000000000"),
    (MedMoEConfig, {"text_config": {"model_type": "distilbert", "n_layers": 10**9}}, "_layers` must be at most 1000"),
    (MedMoEConfig, {"text_config": {"vocab_size": 10**9}}, "`text_config.vocab_size` must be at most 16777216"),
    (MedMoEVisionConfig, {"modalities": [f"m{k}" for k in range(10**5)]}, "at most 1000 experts, got 100000"),
    (MedMoEVisionConfig, {"local_size": 10**9}, "`local_size` must be at most 65536"),
    (MedMoEVisionConfig, {"map_size": 10**9}, "`map_size` must be at most 16384"),
    (MedMoEVisionConfig, {"image_size": 10**9}, "`image_size` must be at most 16384"),
    (MedMoEVisionConfig, {"swin_config": {"depths": [10**9]}}, r"depths` must sum up to 1\.\.1000 layers"),
    (MedMoEVisionConfig, {"swin_config": {"depths": [1] * 40}}, "`hidden_size` must be at most 65536"),
    (MedMoEVisionConfig, {"swin_config": {"embed_dim": 10**9}}, "`embed_dim` must be at most 65536"),
    (MedMoEVisionConfig, {"modalities": {2 * k: "x" * 99 for k in range(500)}}, r"without a gap, got .{200}\.\.\.\.$"),
    (MedMoEConfig, {"positives_temperature": 0.0}, "`positives_temperature` must be greater than 0"),
    (MedMoEConfig, {"local_loss_regions": 0}, "`local_loss_regions` must be greater than 0, got 0"),
    (MedMoEConfig, {"local_loss_weight": -1}, "`local_loss_weight` must be finite and not negative, got -1"),
    (MedMoEConfig, {"projection_dim": 0}, "`projection_dim` must be greater than 0"),
    (MedMoEConfig, {"router": "reports"}, "router"),
    (MedMoEConfig, {"similarity": "cosine"}, "similarity"),
    (MedMoEConfig, {"local_loss": "convirt"}, "local_loss"),
    (MedMoEConfig, {"num_summed_layers": 13}, r"1\.\.12"),
    (MedMoEConfig, {"vision_config": {"local_size": 0}}, "`local_size` must be greater than 0"),
    (MedMoEConfig, {"vision_config": {"local_size": 64}}, r"vision_config\.local_size=64.* Set `projection_dim`"),
    (MedMoEConfig, {"text_config": {"hidden_size": 24}}, r"text_config\.hidden_size=24.* Set `projection_dim`"),
    (MedMoEConfig, {"vision_config": 5}, "vision_config"),
])  # fmt: skip
def test_wrong_values_are_refused(make, fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        make(**fields)


def test_widths_may_differ_with_projections():
    config = MedMoEConfig(projection_dim=32, vision_config={"local_size": 64}, text_config={"hidden_size": 24})
    assert config.projection_dim == 32


def test_the_width_of_the_backbone_does_not_matter_where_it_is_not_compared():
    swin = {"embed_dim": 8, "num_heads": (1, 1, 1, 1)}
    config = MedMoEConfig(vision_config={"global_features": "expert", "swin_config": swin})
    assert config.vision_config.hidden_size == 64


@pytest.mark.parametrize(
    ("where", "field", "value"),
    [
        (("vision_config",), "expert_hidden_size", 0),
        (("vision_config",), "modalities", {1: "ct"}),
        ((), "temp2", 0),
        ((), "num_summed_layers", 99),
    ],
)
def test_a_wrong_value_assigned_later_is_refused_when_saving(where, field, value, small_config, tmp_path):
    config = small_config()
    owner = config.vision_config if where else config
    setattr(owner, field, value)
    with pytest.raises(StrictDataclassError, match=field):
        config.save_pretrained(tmp_path)


def test_a_wrong_type_is_refused_when_assigned(small_config):
    with pytest.raises(StrictDataclassError, match="window_size"):
        small_config().vision_config.swin_config.window_size = "7"


# JSON


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"projection_dim": 32, "router": "image", "similarity": "mean", "num_labels": 5, "freeze_vision_model": True},
        {"vision_config": {"modalities": ["dermoscopy"], "global_features": "expert"}},
        {"vision_config": {"backbone": "timm/resnet18", "out_indices": (2, 3, 4)}, "projection_dim": 8},
        {"text_config": {"model_type": "distilbert"}},
    ],
)
def test_round_trip_through_json(changes, small_config, tmp_path):
    config = small_config(**changes)
    loaded = saved_and_loaded(config, tmp_path)
    assert loaded.to_json_string() == config.to_json_string()
    assert loaded.modalities == config.modalities
    assert type(loaded.text_config) is type(config.text_config)
    assert AutoConfig.from_pretrained(tmp_path).to_json_string() == config.to_json_string()


def test_the_towers_take_their_part_of_the_dual_encoder_s_file(small_config, tmp_path):
    config = small_config(word_pooling="mean", temp1=7)
    config.save_pretrained(tmp_path)
    vision, text = MedMoEVisionConfig.from_pretrained(tmp_path), MedMoETextConfig.from_pretrained(tmp_path)
    assert vision.to_dict() == config.vision_config.to_dict() | {"_name_or_path": vision._name_or_path}
    assert text.text_config.to_dict() == config.text_config.to_dict()
    assert (text.num_summed_layers, text.word_pooling) == (2, "mean")
    assert not hasattr(text, "temp1")


def test_changes_at_loading_are_laid_over_the_saved_config(small_config, tmp_path):
    loaded = saved_and_loaded(
        small_config(), tmp_path, temp1=2, vision_config={"expert_hidden_size": 5}, text_config={"vocab_size": 20}
    )
    assert (loaded.temp1, loaded.vision_config.expert_hidden_size, loaded.text_config.vocab_size) == (2, 5, 20)
    assert loaded.vision_config.swin_config.embed_dim == 8
    assert loaded.text_config.hidden_size == 64


def test_the_file_says_what_the_model_is(small_config, tmp_path):
    small_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "medmoe"
    assert saved["auto_map"] == {"AutoConfig": "configuration_medmoe.MedMoEConfig"}
    assert saved["vision_config"]["swin_config"]["model_type"] == "medmoe_swin"
    assert saved["vision_config"]["modalities"] == {str(index): name for index, name in SIX.items()}


def test_attention_implementation_reaches_every_nested_config(small_config):
    config = small_config(attn_implementation="eager")
    nested = config.text_config, config.vision_config.swin_config, config.text_model_config().text_config
    assert [part._attn_implementation for part in nested] == ["eager"] * 3


# Names of modalities


@pytest.mark.parametrize(("given", "ids"), [
    ("xray", [0, 0, 0]),
    ("CXR", [0, 0, 0]),
    (" X-Ray ", [0, 0, 0]),
    ("DX", [0, 0, 0]),
    ("MR", [2, 2, 2]),
    ("us", [3, 3, 3]),
    ("pathology", [4, 4, 4]),
    ("SM", [4, 4, 4]),
    ("OP", [5, 5, 5]),
    (5, [5, 5, 5]),
    (None, [-100, -100, -100]),
    (-100, [-100, -100, -100]),
    (["ct"], [1, 1, 1]),
    (["ct", None, -100], [1, -100, -100]),
    (("fundus", 2, "cr"), [5, 2, 0]),
    (torch.tensor([1, -100, 5]), [1, -100, 5]),
    (torch.tensor(4), [4, 4, 4]),
    ([torch.tensor(4), np.int64(3), "CT"], [4, 3, 1]),
    (np.array(["CT", "MR", "US"]), [1, 2, 3]),
])  # fmt: skip
def test_modalities_by_name_alias_or_id(given, ids):
    assert MedMoEVisionConfig().modality_ids(given, 3) == ids


@pytest.mark.parametrize(("given", "message"), [
    ("petct", "Unknown modality 'petct'. Known are {0: xray, 1: ct, 2: mri, .* and -100 = unknown"),
    (6, "Unknown modality 6"),
    (-1, "Unknown modality -1"),
    (True, "Unknown modality True"),
    (torch.tensor([1.5, 0, 0]), "Unknown modality 1.5"),
    ([["ct"], "ct", "ct"], "Unknown modality"),
    (1.5, "must be a name, an id or one of these for each image"),
    (["ct", "mr"], "has 2 entries for 3 images"),
    ([], "has 0 entries for 3 images"),
])  # fmt: skip
def test_unknown_modalities_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        MedMoEVisionConfig().modality_ids(given, 3)


@pytest.mark.parametrize("fields", [
    {"num_labels": 10**9},
    {"text_config": {"num_labels": 10**9}},
    {"vision_config": {"num_labels": 10**9}},
    {"vision_config": {"swin_config": {"num_labels": 10**9}}},
])  # fmt: skip
def test_a_table_of_labels_is_not_made_without_a_bound(fields):
    with pytest.raises(ValueError, match="`num_labels` must be at most 1000000, got 1000000000"):
        MedMoEConfig(**fields)


def test_a_preset_that_is_nearly_known_is_suggested():
    with pytest.raises(ValueError, match=r'Unknown preset "tinny"\. .* Did you mean `tiny`\?'):
        MedMoEConfig.from_preset("tinny")


@pytest.mark.parametrize(("given", "ids"), [
    ("image", [-100, -100, -100]),
    (("image", "text"), [-100, -100, -100]),
])  # fmt: skip
def test_the_kind_of_an_input_is_no_modality(given, ids):
    """sentence-transformers passes it by this name."""
    assert MedMoEVisionConfig().modality_ids(given, 3) == ids
    assert MedMoEVisionConfig(modalities=["ct", "image"]).modality_ids("image", 3) == [1, 1, 1]


def test_own_names_come_before_the_aliases():
    config = MedMoEVisionConfig(modalities=["MR", "Dermoscopy", "xray"])
    assert config.modality_ids(["mr", "DERMOSCOPY", "cxr"], 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="Unknown modality 'ct'"):
        config.modality_ids("ct", 3)


@pytest.mark.parametrize("part", ["configuration", "image_processing", "tokenization"])
def test_an_older_transformers_is_told_what_is_needed(monkeypatch, part):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.22.2")
    for name in {"configuration", part}:
        monkeypatch.delitem(sys.modules, f"medmoe_hf.model.{name}_medmoe")
    with pytest.raises(ImportError, match=r'pip install "transformers>=5\.23"'):
        importlib.import_module(f"medmoe_hf.model.{part}_medmoe")
