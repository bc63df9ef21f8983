"""Studies through a model with random weights: against slice by slice, and what comes out of the command."""

import gzip
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_encoders import medmoe_folder
from torch.nn.functional import normalize
from typer.testing import CliRunner

import medmoe_hf
from medmoe_hf.cli import app
from medmoe_hf.errors import ArgumentError, EncoderError
from medmoe_hf.evaluation.rejector import fit_rejector, known_images
from medmoe_hf.inference.studies import Question, StudyPredictor, predict, summary, write_predictions
from medmoe_hf.inference.studies.misspelt import spelling_notes
from medmoe_hf.inference.studies.pooling import pool_slices, route_series, softmax
from medmoe_hf.inference.studies.predictor import plain_reason
from medmoe_hf.inference.studies.tasks import normal_sentences, task_of_labels
from medmoe_hf.model import Calibration, Task
from medmoe_hf.model.rejection_medmoe import sample_weights
from medmoe_hf.model.studies_medmoe import read_studies

pytest.importorskip("pydicom")
from ct_series import COUNT, NAME, SIZE, ct_series, gray

LABELS = ["no finding", "pneumonia", "effusion"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return medmoe_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def predictor(model):
    return StudyPredictor(model, batch_size=4)


def slice_by_slice(predictor, path, expert, **kwargs):
    """Embeddings (N, D) and router log-probabilities (N, K), each slice on its own through the public model."""
    model, processor = predictor.encoder.model, predictor.encoder.processor
    embeds, votes = [], []
    (study,) = read_studies([path], **kwargs)
    with torch.no_grad():
        for index in range(len(study.series[0])):
            pixels = processor(images=study.series[0].slice(index), return_tensors="pt")["pixel_values"]
            embeds.append(normalize(model.get_image_features(pixels, modality=expert).pooler_output[0], dim=0))
            votes.append(model.vision_model(pixels).router_logits[0].log_softmax(dim=-1))
    return torch.stack(embeds), torch.stack(votes).double().numpy()


def class_embeds(predictor, prompts):
    found = [predictor.encoder.encode_texts(list(sentences)).mean(dim=0) for sentences in prompts.values()]
    return torch.stack([normalize(embed, dim=0) for embed in found], dim=1)


def test_slices_are_refused_as_route_refuses_them(predictor, tmp_path, monkeypatch):
    ct_series(tmp_path)
    model, processor = predictor.encoder.model, predictor.encoder.processor
    (study,) = predictor(read_studies([tmp_path]), Question(labels=LABELS), show_progress=False)
    assert (study.series[0].ood_scores, study.series[0].accepted) == (None, None)
    (found,) = read_studies([tmp_path])
    pixels = processor(images=[found.series[0].slice(index) for index in range(COUNT)], return_tensors="pt")
    many = np.repeat(known_images(model, pixels["pixel_values"])[0], 6, axis=0)
    ids, weights = np.zeros(len(many), dtype=int), sample_weights(model.vision_model)
    rejector = fit_rejector(many, ids, many, ids, experts=1, weights=weights, directions=2)
    # The same for all experts: without training, rounding decides which of them reads a slice.
    count = len(predictor.encoder.modalities)
    alike = {"means": rejector.means.expand(count, -1), "limits": 0.9 * rejector.limits.expand(count)}
    monkeypatch.setattr(model, "rejector", replace(rejector, **alike))
    (study,) = predictor(read_studies([tmp_path]), Question(labels=LABELS), show_progress=False)
    expected = model.route(pixels["pixel_values"]).ood_score.numpy()
    np.testing.assert_allclose(study.series[0].ood_scores, expected, rtol=1e-2)
    assert study.series[0].ood_score == pytest.approx(np.median(expected), rel=1e-2)
    assert study.series[0].accepted == (np.median(expected) <= 1)


@pytest.mark.parametrize("trust_header", [False, True])
def test_a_series_is_scored_as_its_slices_are_one_by_one(predictor, tmp_path, trust_header):
    ct_series(tmp_path)
    question = Question(labels=LABELS, text="effusion", trust_header=trust_header, pooling="mean")
    (study,) = predictor(read_studies([tmp_path]), question, show_progress=False)
    (series,) = study.series
    _, votes = slice_by_slice(predictor, tmp_path, None)
    ct = predictor.encoder.modalities.index("ct")
    routing = route_series(votes, ct)
    assert list(series.routing.values()) == pytest.approx(routing.tolist(), abs=1e-4)
    expert = "ct" if trust_header else predictor.encoder.modalities[routing.argmax()]
    assert series.expert == expert
    assert (series.kind, series.count, series.header_modality) == ("slices", COUNT, "ct")
    embeds, _ = slice_by_slice(predictor, tmp_path, expert)
    task = task_of_labels(LABELS, expert)
    logits = (predictor.encoder.logit_scale * embeds @ class_embeds(predictor, task.prompts)).double().numpy()
    by_label = {label.label: label for label in series.labels}
    for column, name in enumerate(LABELS):
        np.testing.assert_allclose(by_label[name].slice_scores, logits[:, column], atol=1e-4)
        np.testing.assert_allclose(by_label[name].slice_probabilities, softmax(logits)[:, column], atol=1e-4)
        assert by_label[name].key_slices[0] == softmax(logits)[:, column].argmax()
    pooled = softmax(pool_slices(logits, "mean"))
    assert [by_label[name].probability for name in LABELS] == pytest.approx(pooled.tolist(), abs=1e-4)
    cosines = embeds @ predictor.encoder.encode_texts(["effusion"])[0]
    np.testing.assert_allclose(series.texts[0].slice_scores, cosines.numpy(), atol=1e-5)
    assert [label.probability for label in study.labels] == [label.probability for label in series.labels]


def test_slices_that_were_read_by_another_expert_are_read_again(predictor, tmp_path):
    """The first slices lead to one expert, all of them together to another."""
    _, votes = slice_by_slice(predictor, ct_series(tmp_path / "a", modality="OT")[0].parent, None)
    own = votes.argmax(axis=1)
    winner = route_series(votes, None).argmax()
    assert (own != winner).any(), "the test needs slices that vote differently"
    order = np.argsort(own == winner, kind="stable")  # dissenters first
    for place, index in enumerate(order):
        Image.fromarray((gray(index) + 400) // 4).convert("L").save(tmp_path / f"{place}.png")
    pixels = np.stack([np.asarray(Image.open(tmp_path / f"{place}.png")) for place in range(COUNT)], axis=-1)
    nibabel = pytest.importorskip("nibabel")
    nibabel.Nifti1Image(pixels.swapaxes(0, 1)[:, ::-1].astype(np.int16), np.eye(4)).to_filename(tmp_path / "v.nii")
    one_by_one = StudyPredictor(predictor.encoder, batch_size=1)
    (study,) = one_by_one(read_studies([tmp_path / "v.nii"]), Question(labels=LABELS), show_progress=False)
    (series,) = study.series
    embeds, votes = slice_by_slice(predictor, tmp_path / "v.nii", series.expert)
    assert predictor.encoder.modalities[route_series(votes, None).argmax()] == series.expert
    prompts = task_of_labels(LABELS, series.expert).prompts
    logits = predictor.encoder.logit_scale * embeds @ class_embeds(predictor, prompts)
    by_label = {label.label: label for label in series.labels}
    for column, name in enumerate(LABELS):
        np.testing.assert_allclose(by_label[name].slice_scores, logits[:, column].numpy(), atol=1e-4)


def test_names_order_and_folders_do_not_change_the_answer(predictor, tmp_path):
    ct_series(tmp_path / "plain")
    shuffled = [f"{number:03}" for number in np.random.default_rng(0).permutation(COUNT)]
    paths = ct_series(tmp_path / "shuffled" / "a", shuffled)
    (tmp_path / "shuffled" / "b").mkdir()
    for path in paths[::2]:
        path.rename(tmp_path / "shuffled" / "b" / path.name)
    plain, other = (predict(tmp_path / name, model=predictor, progress=False) for name in ("plain", "shuffled"))
    assert json.dumps(plain[0].to_dict()) == json.dumps(other[0].to_dict())


def test_a_damaged_slice_is_listed_and_takes_no_part(predictor, tmp_path):
    paths = ct_series(tmp_path)
    # The expert of the header: without a slice the router might vote for another one.
    options = {"model": predictor, "labels": LABELS, "pooling": "mean", "trust_header": True, "progress": False}
    complete = predict(tmp_path, **options)[0].series[0]
    paths[4].write_bytes(paths[4].read_bytes()[:-2000])
    (study,) = predict(tmp_path, **options)
    (series,) = study.series
    assert len(study.skipped) == 1
    assert study.skipped[0].reason.startswith("slice 5 cannot be read: ")
    assert paths[4].name not in study.skipped[0].reason
    expected = {label.label: np.delete(label.slice_scores, 4).mean() for label in complete.labels}
    for label in series.labels:
        assert np.flatnonzero(np.isnan(label.slice_scores)).tolist() == [4]
        assert label.score == pytest.approx(expected[label.label], abs=1e-4)
        assert 4 not in label.key_slices


def test_two_series_get_two_answers_and_pictures_are_studies(predictor, tmp_path):
    ct_series(tmp_path, count=3)
    ct_series(tmp_path, [f"b{index}.dcm" for index in range(4)], series="1.2.3.2", count=4)
    Image.fromarray(np.uint8(gray(7) // 4 + 100)).save(tmp_path / "x.png")
    (tmp_path / "notes.txt").write_text("no image")
    studies = predict(tmp_path, model=predictor, progress=False)
    assert [[(series.number, series.count) for series in study.series] for study in studies] == [
        [(1, 3), (2, 4)],
        [(1, 1)],
    ]
    assert studies[1].series[0].kind == "image"
    assert studies[1].series[0].header_modality is None
    assert "The header states no modality" in studies[1].series[0].expert_reason
    assert [one.path for one in studies.skipped] == [str(tmp_path / "notes.txt")]


@pytest.mark.parametrize("phrase", ["pneumonia", "ground glass"])
def test_heatmaps_are_those_of_the_model(predictor, tmp_path, phrase):
    ct_series(tmp_path, count=5)
    (study,) = predict(tmp_path, model=predictor, labels=LABELS, text="ground glass", progress=False)
    (series,) = study.series
    (found,) = list(series.heatmaps(phrase, [3]))
    model, processor = predictor.encoder.model, predictor.encoder.processor
    picture = read_studies([tmp_path])[0].series[0].slice(3)
    prompts = task_of_labels(LABELS, series.expert).prompts
    text = prompts[phrase][0] if phrase in prompts else phrase
    others = [prompts["no finding"][0], prompts["effusion"][0]]
    reference = others if phrase in prompts else list(normal_sentences(series.expert))
    grounding = model.ground(
        **processor(images=picture, text=[text], return_tensors="pt"),
        modality=series.expert,
        reference=processor(text=reference, return_tensors="pt"),
    )
    expected = processor.post_process_grounding(grounding, target_sizes=[SIZE], sigma=1.5)[0].mean(dim=0)
    cosines = series.texts[0].slice_scores
    weights = np.exp(predictor.encoder.logit_scale * cosines)
    assert series.texts[0].score == pytest.approx((weights * cosines).sum() / weights.sum(), abs=1e-9)
    assert found[0] == 3
    np.testing.assert_allclose(found[1], expected.detach().numpy(), atol=1e-4)
    assert series.picture(3).shape == (*SIZE, 3)


def test_nothing_that_identifies_is_written(predictor, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    folder = tmp_path / NAME / "export"
    paths = ct_series(folder, [f"{NAME}-{index}.dcm" for index in range(COUNT)])
    paths[2].write_bytes(paths[2].read_bytes()[:-2000])
    (folder / f"{NAME}.txt").write_text("no image")
    studies = predict(tmp_path / NAME, model=predictor, text="mass", progress=False)
    files = write_predictions(studies, tmp_path / "out")
    assert len(files) == 4
    assert '"model": "tiny"' in files[1].read_text()  # and not the folder of the model
    for path in files:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        content = re.sub(rb"base64,[^\"]*", b"", content)  # pixels may spell anything
        for planted in ("DOE", "JANE", "4711", "19700102", "1.2.3", str(tmp_path)):
            assert planted.encode() not in content, (path.name, planted)
    volume = nibabel.load(files[-1])
    assert volume.shape == (*SIZE, COUNT)
    assert not volume.get_fdata()[:, :, 2].any()
    write_predictions(studies, tmp_path / "kept", keep_identifiers=True)
    assert str(paths[1].name.split("-")[0]) in (tmp_path / "kept" / "prediction.json").read_text()


def test_reasons_lose_paths_and_names():
    path = "/exports/Jane Doe/IM1.dcm"
    assert (
        plain_reason(f"'{path}' is damaged;\n IM1.dcm ends early", path)
        == "'the file' is damaged; the file ends early"
    )
    assert "Jane" not in plain_reason("the folder Jane Doe is gone", path)


def test_a_task_may_come_with_the_model(predictor, tmp_path, monkeypatch):
    ct_series(tmp_path, count=3)
    own = task_of_labels(LABELS, "ct")
    monkeypatch.setattr(predictor.encoder.model, "tasks", {"chest": own}, raising=False)
    (study,) = predict(tmp_path, model=predictor, task="chest", progress=False)
    assert {label.label for label in study.labels} == set(LABELS)
    with pytest.raises(ArgumentError, match='no file "abdomen", and the model has no task of this name: it has chest'):
        predict(tmp_path, model=predictor, task="abdomen", progress=False)


@pytest.mark.parametrize("score", ["local", "mean"])
def test_a_task_is_answered_by_its_score_and_its_calibration(predictor, tmp_path, monkeypatch, score):
    """Scores of slices are those of `classify`, one by one."""
    ct_series(tmp_path)
    encoder = predictor.encoder
    prompts = {"effusion": ["Large pleural effusion.", "Fluid."], "clear": ["Clear lungs."]}
    half = dict.fromkeys(prompts, 0.5)
    fitted = Calibration(3.0, {"effusion": 0.4, "clear": -0.4}, half, half, 0.9, "marginal", half)
    own = Task("chest", prompts, score=score, calibration=fitted)
    told = Task("told", prompts, {name: [f"No {name}."] for name in prompts}, "multi-label", score)
    own, told = encoder.processor.tokenize_task(own), encoder.processor.tokenize_task(told)
    monkeypatch.setattr(encoder.model, "tasks", {"chest": own}, raising=False)
    # In batches of two, some slices are first read by another expert.
    predictor = StudyPredictor(encoder, batch_size=2)
    for task, asked in ((own, "chest"), (told, replace(told, tokens={}))):
        question = Question(task=asked, pooling="mean")
        (study,) = predictor(read_studies([tmp_path]), question, show_progress=False)
        (series,) = study.series
        (decoded,) = read_studies([tmp_path])[0].series
        pixels = [
            encoder.processor(images=decoded.slice(i), return_tensors="pt")["pixel_values"] for i in range(COUNT)
        ]
        answers = [encoder.model.classify(one, task, modality=series.expert) for one in pixels]
        scores = torch.cat([answer.scores for answer in answers]).double()
        by_label = {label.label: label for label in series.labels}
        expected = task.probabilities(scores.mean(dim=0, keepdim=True))[0]
        for column, name in enumerate(prompts):
            np.testing.assert_allclose(by_label[name].slice_scores, scores[:, column].numpy(), atol=1e-3)
            slices = torch.cat([answer.probabilities for answer in answers])[:, column]
            np.testing.assert_allclose(by_label[name].slice_probabilities, slices.numpy(), atol=1e-3)
            assert by_label[name].probability == pytest.approx(float(expected[column]), abs=1e-3)
        # Asked afterwards, of a series that was read for other labels.
        (other,) = predictor(read_studies([tmp_path]), Question(labels=LABELS), show_progress=False)
        later = {label.label: label.slice_scores for label in other.series[0].ask(question).labels}
        for name in prompts:
            np.testing.assert_allclose(later[name], by_label[name].slice_scores, atol=1e-3)


@pytest.mark.parametrize(("quantiles", "size"), [((0.9, 0.9), 2), ((0.2, 0.95), 1), ((0.0, 0.0), 0)])
def test_a_single_image_gets_the_decisions_of_its_task(predictor, tmp_path, monkeypatch, quantiles, size):
    ct_series(tmp_path, count=1)
    encoder = predictor.encoder
    prompts = {"effusion": ["Large pleural effusion.", "Fluid."], "clear": ["Clear lungs."]}
    half = dict.fromkeys(prompts, 0.5)
    # The threshold selects the less probable label.
    thresholds, limits = {"effusion": 0.99, "clear": 0.01}, dict(zip(prompts, quantiles, strict=True))
    fitted = Calibration(5.0, {"effusion": 1.0, "clear": 0.0}, thresholds, limits, 0.9, "marginal", half)
    own = encoder.processor.tokenize_task(Task("chest", prompts, calibration=fitted))
    monkeypatch.setattr(encoder.model, "tasks", {"chest": own}, raising=False)
    predictions = predict(tmp_path, model=predictor, task="chest", progress=False)
    (series,), labels = predictions[0].series, predictions[0].labels
    (decoded,) = read_studies([tmp_path])[0].series
    pixels = encoder.processor(images=decoded.slice(0), return_tensors="pt")["pixel_values"]
    answer = encoder.model.classify(pixels, own, modality=series.expert)
    for found in (series.labels, labels):
        assert [one.label for one in found if one.selected] == answer.labels[0] == ["clear"]
        assert sorted(one.label for one in found if one.in_set) == sorted(answer.sets[0])
    assert len(answer.sets[0]) == size
    written = write_predictions(predictions, tmp_path / "out")
    (row, other) = json.loads(written[1].read_text())["studies"][0]["labels"]
    assert {one["label"] for one in (row, other) if one["in_set"]} == set(answer.sets[0])
    members = ", ".join(one.label for one in series.labels if one.in_set) or "empty, no label fits well enough"
    assert series.decision == f"Selected by threshold: clear. 90% prediction set: {members}."
    assert series.decision in (tmp_path / "out" / "report.html").read_text()
    assert f"Study 1, series 1. {series.decision}" in summary(predictions)
    # Calibrations are fitted on single images.
    ct_series(tmp_path / "more", count=3)
    (several,) = predict(tmp_path / "more", model=predictor, task="chest", progress=False)
    assert {label.selected for label in [*several.labels, *several.series[0].labels]} == {None}
    assert several.series[0].decision == ""


@pytest.mark.parametrize(
    "paths", [np.zeros((8, 8, 3)), [np.zeros((8, 8))], torch.zeros(3, 8, 8), Image.new("L", (8, 8)), 3]
)
def test_what_is_no_path_is_refused_with_its_type(paths):
    kind = "ndarray|Tensor|Image|int"
    with pytest.raises(ArgumentError, match=rf"`paths` are files.*of the type ({kind})\..*pixels"):
        medmoe_hf.predict(paths)


@pytest.mark.parametrize(
    ("device", "told"), [("cuda", "finds no devices of the kind cuda"), ("gpu", "knows no device")]
)
def test_a_device_that_is_not_there_is_refused(device, told, model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ArgumentError, match=f'{told}.*"{device}".*"cpu"' if device == "cuda" else f'{told} "gpu"'):
        StudyPredictor(model, device=device)


def test_labels_that_look_misspelt_are_answered_with_a_note(predictor, tmp_path, monkeypatch):
    ct_series(tmp_path, count=1)
    # A word of the model's task, one of the labels that are asked by default, and one that nothing resembles.
    own = Task("own", {"silicosis": ["Silicosis."], "clear": ["Clear lungs."]})
    monkeypatch.setattr(predictor.encoder.model, "tasks", {"own": own}, raising=False)
    question = Question(labels=["No Finding", "silicossis", "pnuemonia", "tooth"])
    (study,) = found = predictor(read_studies([tmp_path]), question, show_progress=False)
    expected = [
        '"silicossis" is no word of the model\'s tasks; did you mean "silicosis"?',
        '"pnuemonia" is no word of the model\'s tasks; did you mean "pneumonia"?',
    ]
    assert study.series[0].to_dict()["notes"] == expected
    assert [line for line in summary(found).splitlines() if "did you mean" in line] == [f"Note: {e}" for e in expected]
    assert len(study.series[0].labels) == 4  # the answer stays
    asked = study.series[0].ask(Question(labels=["no finding", "cardiomegly"]))
    assert [note.split('"')[3] for note in asked.notes] == ["cardiomegaly"]


@pytest.mark.parametrize(
    ("labels", "noted"),
    [
        (["plural effusion", "no finding"], {"plural effusion": "pleural effusion"}),
        (["Abnormal", "no pneumonia"], {}),  # the opposite of a known word
        (["pnuemonia", "pneumonia"], {}),  # whoever asks both means both
        (["pneumonitis", "renal cell carcinoma", "grade 2"], {}),
    ],
)
def test_only_close_words_count_as_misspelt(labels, noted):
    known = ["normal", "no finding", "pneumonia", "pleural effusion", "small cell carcinoma", "grade 1"]
    notes = spelling_notes(labels, known)
    assert notes == [f'"{a}" is no word of the model\'s tasks; did you mean "{b}"?' for a, b in noted.items()]


def test_a_task_of_another_modality_decides_nothing(predictor, tmp_path, monkeypatch):
    ct_series(tmp_path / "scans", count=1)
    prompts = {"effusion": ["Large pleural effusion."], "clear": ["Clear lungs."]}
    half = dict.fromkeys(prompts, 0.5)
    fitted = Calibration(5.0, {"effusion": 1.0, "clear": 0.0}, half, half, 0.9, "marginal", half)
    asked = Question(trust_header=True)
    found = {}
    for modality in ("CT", "fundus", None):
        task = predictor.encoder.processor.tokenize_task(Task("own", prompts, modality=modality, calibration=fitted))
        (study,) = predictor(read_studies([tmp_path / "scans"]), replace(asked, task=task), show_progress=False)
        found[modality] = study.series[0]
    assert {name: series.foreign_task for name, series in found.items()} == {"CT": False, "fundus": True, None: False}
    assert [series.labels[0].probability for series in found.values()] == [found["CT"].labels[0].probability] * 3
    assert [bool(series.decision) for series in found.values()] == [True, False, True]
    # A folder that is called like a task of the model does not hide it.
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predictor.encoder.model, "tasks", {"own": task}, raising=False)
    (study,) = predict("scans", model=predictor, task="own", progress=False)
    assert {label.label for label in study.labels} == set(prompts)


def test_dicom_files_are_not_promised_where_they_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    options = ["--dicom", "--keep-identifiers", "--out", str(tmp_path / "out"), "--model", str(tmp_path / "no-model")]
    result = CliRunner().invoke(app, ["predict", str(tmp_path), *options])
    assert 'needs highdicom: pip install "medmoe_hf[dicom-out]"' in str(result.exception)


def test_models_without_experts_are_refused(tmp_path):
    with pytest.raises(EncoderError):
        StudyPredictor(tmp_path / "missing")
    assert medmoe_hf.predict is predict


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{ct}", "--labels", "pneumonia"], "One label is not enough"),
        (["{ct}", "--labels", "a, b", "--task", "x.yaml"], "Pass either `labels` or `task`, not both"),
        (["{ct}", "--task", "x.yaml"], 'There is no file "x.yaml", and the model has no task of this name'),
        (["{ct}/missing"], "missing"),
        (["{ct}", "--window", "a,b"], "--window a,b: expected a name, CENTRE,WIDTH, or three names"),
        (["{empty}"], "there is no image in"),
        (["{ct}", "--dicom"], "--dicom needs --out and --keep-identifiers"),
        (["{ct}", "--out", "{empty}"], "exists already; choose another folder, or replace it with --force"),
        (["{ct}", "--out", "{ct}", "--force"], "ct is not replaced, since all that is in it would be lost"),
    ],
)
def test_the_command_explains_what_is_wrong(model, tmp_path, arguments, message):
    ct_series(tmp_path / "ct", count=1)
    (tmp_path / "empty").mkdir()
    filled = [text.format(ct=tmp_path / "ct", empty=tmp_path / "empty") for text in arguments]
    result = CliRunner().invoke(app, ["predict", *filled, "--model", str(model)])
    assert result.exit_code == 1
    assert message in str(result.output) + str(result.exception)
    assert "Traceback" not in result.output


def test_the_command_prints_a_table_and_writes_the_folder(model, tmp_path):
    ct_series(tmp_path / "ct", count=4)
    command = [
        "predict",
        str(tmp_path / "ct"),
        "--model",
        str(model),
        "--labels",
        "no finding, mass",
        "--trust-header",
    ]
    result = CliRunner().invoke(
        app, [*command, "--text", "mass", "--window", "40,400", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[1].split()[:5] == ["1", "1", "4", "slices", "ct"]
    assert "report.html" in lines[-1]
    content = json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert content["model"] == "tiny"
    assert {label["label"] for label in content["studies"][0]["labels"]} == {"no finding", "mass"}
