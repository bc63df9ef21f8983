"""A saved folder in sentence-transformers: its own client, without a word about our classes."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file

sentence_transformers = pytest.importorskip("sentence_transformers", reason='pip install "medmoe_hf[sentence]"')

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, util  # noqa: E402
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments  # noqa: E402
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # noqa: E402

from medmoe_hf.model import MedMoEModel  # noqa: E402
from medmoe_hf.model.saving_medmoe import SENTENCE_TRANSFORMERS_FILES  # noqa: E402

TEXTS = ["chest radiograph with an effusion", "normal", "a liver lesion " * 30]
WITHIN = {"rtol": 0, "atol": 1e-5}


def opened(folder, **arguments):
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", local_files_only=True, **arguments)


@pytest.fixture(scope="module")
def client(saved):
    return opened(saved.folder)


def test_the_modules_come_from_the_folder(client):
    assert [type(module).__name__ for module in client] == ["Transformer", "Normalize"]
    assert client.modalities == ["text", "image"]
    assert client.similarity_fn_name == "cosine"
    assert client.get_embedding_dimension() == 32


def test_embeddings_are_those_of_the_model(client, saved, pictures):
    np.testing.assert_allclose(client.encode(pictures), saved.images(pictures), **WITHIN)
    # the last text is longer than the processor allows
    np.testing.assert_allclose(client.encode(TEXTS), saved.texts(TEXTS), **WITHIN)
    with torch.no_grad():
        ours = saved.model(**saved.processor(images=pictures, text=TEXTS, return_tensors="pt"))
    cosines = client.similarity(client.encode(pictures), client.encode(TEXTS))
    np.testing.assert_allclose(cosines, ours.logits_per_image / saved.model.global_scale, rtol=0, atol=1e-5)


def test_files_of_16_bits_and_dicom_keep_their_range(client, saved, tmp_path):
    deep = Image.fromarray((np.arange(64 * 70, dtype=np.uint16) * 14).reshape(64, 70))
    deep.save(tmp_path / "deep.png")
    scan = shutil.copy(get_testdata_file("CT_small.dcm"), tmp_path / "scan.dcm")
    files = [str(tmp_path / "deep.png"), str(scan)]
    # A path counts as an image by its suffix, so others need the key.
    found = np.concatenate([client.encode(files[:1]), client.encode([{"image": files[1]}])])
    np.testing.assert_allclose(found, saved.images(files), **WITHIN)


def test_semantic_search_ranks_as_our_cosines(client, saved, pictures):
    hits = util.semantic_search(client.encode(TEXTS[:2]), client.encode(pictures), top_k=6)
    cosines = saved.texts(TEXTS[:2]) @ saved.images(pictures).T
    for row, found in zip(cosines, hits, strict=True):
        assert [hit["corpus_id"] for hit in found] == list(np.argsort(-row))
        np.testing.assert_allclose([hit["score"] for hit in found], np.sort(row)[::-1], **WITHIN)


def test_prompts_precede_texts_and_are_saved(saved, pictures, tmp_path):
    client = opened(saved.folder, prompts={"chest": "chest radiograph with "})
    client.save_pretrained(str(tmp_path / "kept"), create_model_card=False)
    again = opened(tmp_path / "kept")
    assert again.prompts["chest"] == "chest radiograph with "
    expected = saved.texts(["chest radiograph with an effusion"])
    np.testing.assert_allclose(again.encode(["an effusion"], prompt_name="chest"), expected, **WITHIN)
    np.testing.assert_allclose(again.encode(pictures), saved.images(pictures), **WITHIN)
    # transformers reads and saves the folder, which keeps what sentence-transformers wrote
    MedMoEModel.from_pretrained(tmp_path / "kept").save_pretrained(tmp_path / "kept")
    assert opened(tmp_path / "kept").prompts["chest"] == "chest radiograph with "


def test_what_is_missing_is_written_and_the_rest_is_kept(saved, tmp_path):
    for name, content in SENTENCE_TRANSFORMERS_FILES.items():
        assert json.loads((saved.folder / name).read_text()) == content
    folder = tmp_path / "again"
    folder.mkdir()
    (folder / "modules.json").write_text("[]")
    saved.model.save_pretrained(folder)
    assert (folder / "modules.json").read_text() == "[]"
    assert SENTENCE_TRANSFORMERS_FILES.keys() <= {path.name for path in folder.iterdir()}


def test_a_step_of_its_trainer_is_a_step_of_ours(saved, pictures, tmp_path):
    """Plain SGD on the symmetric contrastive loss, against the same step written out with our model."""
    client = opened(saved.folder)
    texts = [f"{word} lesion" for word in ("chest", "liver", "fundus", "breast", "colon", "brain")]
    pairs = datasets.Dataset.from_dict(
        {"image": pictures, "caption": texts},
        features=datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}),
    )
    loss = MultipleNegativesRankingLoss(
        client, scale=10.0, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    arguments = Arguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=len(texts),
        max_steps=1,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    SentenceTransformerTrainer(client, arguments, train_dataset=pairs, loss=loss).train()

    model = MedMoEModel.from_pretrained(saved.folder).train()
    inputs = saved.processor(images=pictures, text=texts, return_tensors="pt")
    images = model.get_image_features(inputs.pop("pixel_values")).pooler_output
    words = model.get_text_features(**inputs).pooler_output
    logits = 10 * torch.nn.functional.cosine_similarity(images[:, None], words[None], dim=-1)
    aim = torch.arange(len(texts))
    entropy = torch.nn.functional.cross_entropy
    ((entropy(logits, aim) + entropy(logits.T, aim)) / 2).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()

    moved = dict(client[0].model.named_parameters())
    before = dict(saved.model.named_parameters())
    assert any((before[name] - moved[name]).abs().max() > 1e-3 for name in moved)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(moved[name], parameter, rtol=1e-4, atol=1e-5)
