"""The tokenizer's word ids, defaults and ways to be built, against loops written here."""

import json
import string

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BertTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

from medmoe_hf.model.tokenization_medmoe import MedMoETokenizer

CAPTIONS = [
    "The heart is normal in size. No focal consolidation, effusion, or pneumothorax.",
    "CT: 3.5-cm hepatic lesion (segment VII), washout on delayed phase!",
    "Mild cardiomegaly",
    "there's a well-circumscribed T2-hyperintense mass [sic] in the left thalamus",
]
WORDS = ["the heart is normal in size", "no focal consolidation effusion or lesion", "phase mass left"]


@pytest.fixture(scope="module")
def tokenizer():
    return MedMoETokenizer.from_words(WORDS, max_length=64)


@pytest.fixture
def roberta(tmp_path):
    """A small byte-level BPE tokenizer of the RoBERTa kind, trained here."""
    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(CAPTIONS * 3, vocab_size=320, special_tokens=special, show_progress=False)
    bpe.save_model(str(tmp_path))
    vocab, merges = str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    return RobertaTokenizer(vocab=vocab, merges=merges, model_max_length=40)


def word_ids_by_loop(tokens):
    """The definition for BERT: a piece without ## starts a word; brackets are [CLS], [SEP], [PAD]."""
    ids, count = [], -1
    for token in tokens:
        if token in ("[CLS]", "[SEP]", "[PAD]"):
            ids.append(-1)
            continue
        count += not token.startswith("##")
        ids.append(count)
    return ids


def same_as(one, other, texts=CAPTIONS):
    """Two tokenizers give equal outputs, settings included."""
    for kwargs in ({}, {"max_length": 7}, {"truncation": False, "padding": False}):
        assert one(texts, **kwargs).data == other(texts, **kwargs).data
    assert one("left mass", "no effusion").data == other("left mass", "no effusion").data
    for name in ("model_max_length", "model_input_names", "padding_side", "truncation_side", "special_tokens_map"):
        assert getattr(one, name) == getattr(other, name)
    assert one.get_vocab() == other.get_vocab()
    return True


# --- word ids


@pytest.mark.parametrize("padding", [True, False, "max_length"])
@pytest.mark.parametrize("max_length", [None, 5, 6, 7, 11])
def test_word_ids_against_a_loop(tokenizer, padding, max_length):
    encoded = tokenizer(CAPTIONS, padding=padding, max_length=max_length)
    for ids, words in zip(encoded["input_ids"], encoded["word_ids"], strict=True):
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert words == word_ids_by_loop(tokens)
        assert len(ids) <= (max_length or 64)
        if max_length and padding == "max_length":
            assert len(ids) == max_length


def test_left_padding(tokenizer):
    encoded = tokenizer(CAPTIONS, padding_side="left", return_tensors="pt")
    for row, mask in zip(encoded["word_ids"], encoded["attention_mask"], strict=True):
        assert (row[mask == 0] == -1).all()
        assert row[mask == 1].tolist() == [-1, *row[mask == 1][1:-1].tolist(), -1]
    right = tokenizer(CAPTIONS, return_tensors="pt")
    for left_row, right_row in zip(encoded["word_ids"], right["word_ids"], strict=True):
        assert [i for i in left_row.tolist() if i >= 0] == [i for i in right_row.tolist() if i >= 0]


def test_types_and_shapes(tokenizer):
    single = tokenizer("no effusion")
    assert single["word_ids"] == [-1, 0, 1, -1]
    assert tokenizer(["no effusion"])["word_ids"] == [[-1, 0, 1, -1]]
    batch = tokenizer(["no effusion", "mass"], return_tensors="pt")
    assert batch["word_ids"].dtype == torch.int64
    assert batch["word_ids"].tolist() == [[-1, 0, 1, -1], [-1, 0, -1, -1]]
    names = ["input_ids", "token_type_ids", "attention_mask", "word_ids"]
    assert list(batch) == tokenizer.model_input_names == names
    as_numpy = tokenizer("mass", return_tensors="np")["word_ids"]
    assert isinstance(as_numpy, np.ndarray)
    assert as_numpy.tolist() == [[-1, 0, -1]]


def test_no_special_tokens(tokenizer):
    assert tokenizer("no effusion", add_special_tokens=False)["word_ids"] == [0, 1]
    assert tokenizer("")["word_ids"] == [-1, -1]


def test_special_tokens_in_the_text_are_words(tokenizer):
    assert tokenizer("no [MASK] mass")["word_ids"] == [-1, 0, 1, 2, -1]


def test_pairs_go_on_counting(tokenizer):
    encoded = tokenizer("no effusion", "left mass")
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"]).count("[SEP]") == 2
    assert encoded["word_ids"] == [-1, 0, 1, -1, 2, 3, -1]
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    cut = tokenizer(["the heart is normal", "no mass"], ["left mass", "no mass"], max_length=7)
    assert cut["word_ids"] == [[-1, 0, 1, -1, 2, 3, -1], [-1, 0, 1, -1, 2, 3, -1]]


def test_pre_split_words(tokenizer):
    encoded = tokenizer([["x-ray", "normal"], ["mass", "", "left"]], is_split_into_words=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
    assert tokens[1:-1] == ["x", "-", "r", "##a", "##y", "normal"]
    assert encoded["word_ids"][0] == [-1, 0, 0, 0, 0, 0, 1, -1]
    assert encoded["word_ids"][1][:4] == [-1, 0, 1, -1]  # an empty item is no word


def test_left_truncation_counts_from_zero():
    tokenizer = MedMoETokenizer.from_words(WORDS)
    tokenizer.truncation_side = "left"
    assert tokenizer("the heart is normal", max_length=4)["word_ids"] == [-1, 0, 1, -1]
    assert tokenizer.words("the heart is normal", max_length=4) == ["is", "normal"]


def test_overflowing_rows(tokenizer):
    encoded = tokenizer("the heart is normal", max_length=4, return_overflowing_tokens=True)
    assert encoded["word_ids"] == [[-1, 0, 1, -1], [-1, 0, 1, -1]]


def test_byte_level_bpe(roberta):
    tokenizer = MedMoETokenizer.from_tokenizer(roberta, max_length=200)
    encoded = tokenizer(CAPTIONS)
    assert "token_type_ids" not in encoded
    for row, (text, ids, words) in enumerate(zip(CAPTIONS, encoded["input_ids"], encoded["word_ids"], strict=True)):
        pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert ids[: len(roberta(text)["input_ids"])] == roberta(text)["input_ids"]
        for index, (piece, _) in enumerate(pieces):  # the pieces of a word, joined, are the pre-tokenizer's word
            assert "".join(t for t, w in zip(tokens, words, strict=True) if w == index) == piece
        assert max(words) == len(pieces) - 1
        assert tokenizer.words(CAPTIONS)[row] == [text[start:end].strip() for _, (start, end) in pieces]
    assert tokenizer("no mass", "left")["word_ids"].count(-1) == 4  # <s> </s></s> </s>


# --- defaults of a call


def test_calls_truncate_and_pad_unless_told_otherwise():
    tokenizer = MedMoETokenizer.from_words(WORDS, max_length=8)
    assert [len(ids) for ids in tokenizer(CAPTIONS)["input_ids"]] == [8, 8, 8, 8]
    assert [len(ids) for ids in tokenizer(["mass", "left mass"])["input_ids"]] == [4, 4]
    assert [len(ids) for ids in tokenizer(["mass", "left mass"], padding=False)["input_ids"]] == [3, 4]
    assert [len(ids) for ids in tokenizer(["mass", "left mass"], padding="max_length")["input_ids"]] == [8, 8]
    assert len(tokenizer(CAPTIONS[0], max_length=5)["input_ids"]) == 5
    assert len(tokenizer(CAPTIONS[0], truncation=False)["input_ids"]) > 8
    # What the zero-shot-image-classification pipeline does.
    batch = tokenizer(CAPTIONS, return_tensors="pt", padding=True)
    assert batch["word_ids"].shape == batch["input_ids"].shape == (4, 8)


def test_truncation_inside_a_word(tokenizer):
    assert tokenizer("left pneumothorax", max_length=6)["word_ids"] == [-1, 0, 1, 1, 1, -1]
    assert tokenizer.words("left pneumothorax", max_length=6) == ["left", "pneumothorax"]
    assert tokenizer.words("left pneumothorax", max_length=3) == ["left"]


# --- words


def test_words_are_those_of_word_ids(tokenizer):
    rows = tokenizer.words(CAPTIONS)
    encoded = tokenizer(CAPTIONS)
    for text, row, ids in zip(CAPTIONS, rows, encoded["word_ids"], strict=True):
        assert len(row) == max(ids) + 1
        assert "".join(row) == text.replace(" ", "")
        assert tokenizer.words(text) == row
    assert rows[1][:6] == ["CT", ":", "3", ".", "5", "-"]


def test_words_of_other_calls(tokenizer):
    assert tokenizer.words("No effusion", "Left mass") == ["No", "effusion", "Left", "mass"]
    pairs = tokenizer.words(["No", "Mass"], ["Left mass", "No"], return_tensors="pt")
    assert pairs == [["No", "Left", "mass"], ["Mass", "No"]]
    assert tokenizer.words(["X-ray", "", "Mass"], is_split_into_words=True) == ["X-ray", "Mass"]
    assert tokenizer.words([["X-ray"], ["Mass"]], is_split_into_words=True) == [["X-ray"], ["Mass"]]
    assert tokenizer.words("") == []


# --- pad


@pytest.mark.parametrize("side", ["right", "left"])
def test_pad(tokenizer, side):
    rows = [dict(tokenizer(text)) for text in CAPTIONS]
    whole = tokenizer(CAPTIONS, padding_side=side, return_tensors="pt")
    padded = tokenizer.pad([dict(row) for row in rows], padding_side=side, return_tensors="pt")
    for key, value in whole.items():
        assert torch.equal(padded[key], value), key
    tensors = [{key: torch.tensor(value) for key, value in row.items()} for row in rows]
    assert torch.equal(tokenizer.pad(tensors, padding_side=side)["word_ids"], whole["word_ids"])
    longer = tokenizer.pad(rows, padding="max_length", max_length=64, padding_side=side, return_tensors="np")
    assert longer["word_ids"].shape == (4, 64)
    assert ((longer["word_ids"] == -1) >= (longer["attention_mask"] == 0)).all()


def test_pad_with_a_side_of_its_own(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    left = MedMoETokenizer.from_pretrained(tmp_path, padding_side="left")
    assert left.pad([left("mass"), left("left mass")])["word_ids"] == [[-1, -1, 0, -1], [-1, 0, 1, -1]]


def test_collator(tokenizer):
    rows = [dict(tokenizer(text)) for text in CAPTIONS]
    batch = DataCollatorWithPadding(tokenizer)(rows)
    assert torch.equal(batch["word_ids"], tokenizer(CAPTIONS, return_tensors="pt")["word_ids"])
    assert "word_ids" not in tokenizer.pad([{"input_ids": [5, 6]}, {"input_ids": [5]}])


# --- from_words


def test_from_words_vocabulary():
    tokenizer = MedMoETokenizer.from_words(["Chest", "x-ray", "chest", "Naïve", "two words"])
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    characters = string.ascii_lowercase + string.digits + string.punctuation
    expected = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]
    assert tokens == [*expected, "chest", "ray", "naive", "two", "words"]
    assert MedMoETokenizer.from_words(["chest"]).get_vocab() == MedMoETokenizer.from_words(["chest"]).get_vocab()
    found = tokenizer.convert_ids_to_tokens(tokenizer("NAÏVE X-Ray")["input_ids"])
    assert found == ["[CLS]", "naive", "x", "-", "ray", "[SEP]"]


def test_from_words_never_meets_unknown_ascii():
    tokenizer = MedMoETokenizer.from_words(["chest"], max_length=5000)
    text = f"{string.printable} {'pneumonoultramicroscopic' * 10} q7/z"
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokenizer("chestnut")["input_ids"], skip_special_tokens=True) == "chestnut"
    assert tokenizer.unk_token_id in tokenizer("病")["input_ids"]


def test_from_words_length():
    assert MedMoETokenizer.from_words(["chest"]).model_max_length == 512
    with pytest.raises(ValueError, match="2 pieces leaves no room"):
        MedMoETokenizer.from_words(["chest"], max_length=2)


# --- wrapping


def bert(**kwargs):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, "left", "mass", "no", "effusion", "##s", "the", "heart", "is"]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, **kwargs)


def test_from_tokenizer_keeps_settings(roberta):
    source = bert(model_max_length=20, padding_side="left", truncation_side="left", do_lower_case=False)
    source.add_special_tokens({"extra_special_tokens": ["<region>"]})
    source("left mass", max_length=4, truncation=True, padding="max_length")  # leaves its mark on the backend
    wrapped = MedMoETokenizer.from_tokenizer(source)
    assert (wrapped.model_max_length, wrapped.padding_side, wrapped.truncation_side) == (20, "left", "left")
    assert wrapped.special_tokens_map == source.special_tokens_map
    assert wrapped.model_input_names == ["input_ids", "token_type_ids", "attention_mask", "word_ids"]
    text = "Left mass <region> the effusions"
    assert wrapped(text)["input_ids"] == source(text)["input_ids"]
    assert wrapped.decode(source(text)["input_ids"], skip_special_tokens=True) == source.decode(
        source(text)["input_ids"], skip_special_tokens=True
    )
    assert MedMoETokenizer.from_tokenizer(source, max_length=9).model_max_length == 9
    assert same_as(MedMoETokenizer.from_tokenizer(wrapped), wrapped, ["left mass"])
    assert MedMoETokenizer.from_tokenizer(roberta).mask_token == "<mask>"
    wrapped.add_tokens(["hepatomegaly"])
    assert len(wrapped) == len(source) + 1  # a copy


def test_no_length_is_reported(caplog):
    assert MedMoETokenizer.from_tokenizer(bert()).model_max_length > 1e20
    assert "BertTokenizer has no model_max_length" in caplog.text
    caplog.clear()
    MedMoETokenizer.from_tokenizer(bert(), max_length=9)
    assert not caplog.text


def test_slow_tokenizers_are_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="fast tokenizers only, got Slow"):
        MedMoETokenizer.from_tokenizer(Slow())


def test_bert_folder_with_only_a_vocabulary(tmp_path):
    words = sorted(bert().get_vocab(), key=bert().get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    loaded = MedMoETokenizer.from_pretrained(tmp_path, model_max_length=16)
    assert loaded.model_max_length == 16
    encoded = loaded("The Masss")
    assert loaded.convert_ids_to_tokens(encoded["input_ids"]) == ["[CLS]", "the", "mass", "##s", "[SEP]"]
    assert encoded["word_ids"] == [-1, 0, 1, 1, -1]
    assert encoded["token_type_ids"] == [0] * 5
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "model_max_length": 9}))
    cased = MedMoETokenizer.from_pretrained(tmp_path)
    assert cased.convert_ids_to_tokens(cased("The mass")["input_ids"]) == ["[CLS]", "[UNK]", "mass", "[SEP]"]
    assert cased.model_max_length == 9


@pytest.mark.parametrize("with_config", [True, False])
def test_folders_of_other_tokenizers(tmp_path, roberta, with_config):
    for name, source in (("bert", bert(model_max_length=30)), ("roberta", roberta)):
        source("left", max_length=3, truncation=True, padding="max_length")
        source.save_pretrained(tmp_path / name)
        if not with_config:
            (tmp_path / name / "tokenizer_config.json").unlink()
        loaded = MedMoETokenizer.from_pretrained(tmp_path / name, model_max_length=source.model_max_length)
        assert isinstance(loaded, MedMoETokenizer)
        for pair in (None, "no effusion"):
            theirs = source("the heart, is", pair)
            ours = loaded("the heart, is", pair)
            assert ours["input_ids"] == theirs["input_ids"]
            assert ours.get("token_type_ids") == theirs.get("token_type_ids")
        assert loaded.special_tokens_map.items() >= source.special_tokens_map.items()
        assert set(loaded.special_tokens_map.values()) == set(source.special_tokens_map.values())
        assert loaded(["left", "the left"])["word_ids"][0][-1] == -1
        loaded.save_pretrained(tmp_path / "ours")
        assert same_as(MedMoETokenizer.from_pretrained(tmp_path / "ours"), loaded, ["left mass", "the"])


def test_generic_fast_class(tmp_path):
    source = bert(model_max_length=30)
    generic = PreTrainedTokenizerFast(
        tokenizer_object=source.backend_tokenizer, model_max_length=30, **source.special_tokens_map
    )
    generic.save_pretrained(tmp_path)
    loaded = MedMoETokenizer.from_pretrained(tmp_path)
    assert set(loaded("left")) == {"input_ids", "attention_mask", "word_ids"}  # as the source does
    assert loaded("left")["input_ids"] == source("left")["input_ids"]


@pytest.mark.parametrize("config", [{}, {"model_type": "medmoe"}, {"model_type": "bert"}])
@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
def test_tokenizer_files_beside_a_model(tmp_path, config, file):
    """A checkpoint whose tokenizer nobody named: its config must not send AutoTokenizer and this class in circles."""
    source = bert()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(source.get_vocab(), key=source.get_vocab().get)))
    if file == "tokenizer.json":
        (tmp_path / "vocab.txt").unlink()
        source.backend_tokenizer.save(str(tmp_path / file))
    loaded = MedMoETokenizer.from_pretrained(tmp_path, model_max_length=12)
    assert loaded("the masss")["input_ids"] == source("the masss")["input_ids"]
    assert loaded("the masss")["token_type_ids"] == [0] * 5
    assert loaded.pad_token == "[PAD]"


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer"):
        MedMoETokenizer.from_pretrained(tmp_path)


# --- saving


def test_round_trip_is_identical(tokenizer, tmp_path):
    tokenizer("mass", max_length=4, padding="max_length", padding_side="left", return_tensors="pt")
    tokenizer.save_pretrained(tmp_path)
    loaded = MedMoETokenizer.from_pretrained(tmp_path)
    assert same_as(loaded, tokenizer)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"] is None
    assert saved["padding"] is None
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["auto_map"]["AutoTokenizer"] == ["tokenization_medmoe.MedMoETokenizer", None]
    assert config["model_input_names"] == ["input_ids", "token_type_ids", "attention_mask", "word_ids"]
    assert (tmp_path / "tokenization_medmoe.py").is_file()
    again = MedMoETokenizer.from_pretrained(tmp_path, model_max_length=5)
    assert len(again(CAPTIONS[0])["input_ids"]) == 5
