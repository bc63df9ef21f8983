"""Tasks of MTEB and MIEB on local images, through sentence-transformers: their own evaluators, our checkpoint."""

import datasets
import numpy as np
import pytest

mteb = pytest.importorskip("mteb", reason='pip install "medmoe_hf[mteb]"')
sentence_transformers = pytest.importorskip("sentence_transformers", reason='pip install "medmoe_hf[sentence]"')

from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification  # noqa: E402
from mteb.models import SentenceTransformerEncoderWrapper  # noqa: E402

SENTENCES = ["chest radiograph", "liver lesion", "fundus"]
LABELS = [0, 1, 2, 1, 0, 2]
TEXTS = [f"{word} lesion" for word in ("chest", "liver", "fundus", "breast", "colon", "brain")]


def metadata(**facts):
    return TaskMetadata(
        description="Images of this test.",
        reference=None,
        dataset={"path": "local", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation=None,
        modalities=["image", "text"],
        **facts,
    )


class ZeroShot(AbsTaskZeroShotClassification):
    metadata = metadata(name="LocalZeroShot", type="ZeroShotClassification", category="i2t", main_score="accuracy")

    def load_data(self, num_proc=None, **kwargs):
        columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        rows = datasets.Dataset.from_dict({"image": self.pictures, "label": LABELS}, features=columns)
        self.dataset = datasets.DatasetDict({"test": rows})
        self.data_loaded = True

    def get_candidate_labels(self):
        return SENTENCES


class Retrieval(AbsTaskRetrieval):
    metadata = metadata(name="LocalRetrieval", type="Any2AnyRetrieval", category="t2i", main_score="ndcg_at_10")

    def load_data(self, num_proc=None, **kwargs):
        columns = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
        names = [f"image {index}" for index in range(len(self.pictures))]
        corpus = datasets.Dataset.from_dict({"id": names, "image": self.pictures}, features=columns)
        queries = datasets.Dataset.from_dict({"id": TEXTS, "text": TEXTS})
        relevant = {text: {name: 1} for text, name in zip(TEXTS, names, strict=True)}
        found = {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}
        self.dataset = {"default": {"test": found}}
        self.data_loaded = True


@pytest.fixture(scope="module")
def client(saved):
    model = sentence_transformers.SentenceTransformer(str(saved.folder), trust_remote_code=True, device="cpu")
    encoder = SentenceTransformerEncoderWrapper(model)
    # mteb takes every SentenceTransformer for one of texts only
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update={"modalities": model.modalities})
    return encoder


def scores(client, task, pictures, folder):
    task.pictures = pictures
    options = {"co2_tracker": False, "cache": None, "show_progress_bar": False}
    (result,) = mteb.evaluate(client, task, prediction_folder=folder, **options).task_results
    ((found,),) = result.scores.values()
    return found


def test_zero_shot_is_the_choice_of_our_model(client, saved, pictures, tmp_path):
    found = scores(client, ZeroShot(), pictures, tmp_path)
    cosines = saved.images(pictures) @ saved.texts(SENTENCES).T
    assert found["accuracy"] == pytest.approx((cosines.argmax(axis=1) == np.array(LABELS)).mean(), abs=1e-5)
    recalls = [(cosines.argmax(axis=1)[np.array(LABELS) == label] == label).mean() for label in range(3)]
    assert found["recall"] == pytest.approx(np.mean(recalls), abs=1e-5)


def test_retrieval_ranks_as_our_cosines(client, saved, pictures, tmp_path):
    found = scores(client, Retrieval(), pictures, tmp_path)
    cosines = saved.texts(TEXTS) @ saved.images(pictures).T
    ranks = (cosines > np.diag(cosines)[:, None]).sum(axis=1)
    assert found["ndcg_at_10"] == pytest.approx(np.mean(1 / np.log2(ranks + 2)), abs=1e-5)
    assert found["recall_at_1"] == pytest.approx(np.mean(ranks == 0), abs=1e-5)
    assert found["mrr_at_10"] == pytest.approx(np.mean(1 / (ranks + 1)), abs=1e-5)
