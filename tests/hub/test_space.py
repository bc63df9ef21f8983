"""The demo's functions, without a browser (tests/browser has one): every number against a slow plain formulation."""

import asyncio
import base64
import io
import json
import re
import shutil
import socket
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from PIL import Image, PngImagePlugin
from transformers import BertConfig, BertModel

gr = pytest.importorskip("gradio", reason='the demo needs gradio: pip install "medmoe_hf[demo]"')

from loopback_hub import Account, LoopbackHub  # noqa: E402

import medmoe_hf  # noqa: E402
from medmoe_hf.data import MODALITIES, phantom_sample  # noqa: E402
from medmoe_hf.hub import init_model  # noqa: E402
from medmoe_hf.hub.space import app  # noqa: E402
from medmoe_hf.hub.study_demo import examples  # noqa: E402
from medmoe_hf.hub.study_demo import page as study_page  # noqa: E402
from medmoe_hf.hub.study_demo import tab as study_tab  # noqa: E402
from medmoe_hf.model import MedMoEModel  # noqa: E402
from medmoe_hf.model.medical_images_medmoe import read_medical_image  # noqa: E402

ROOT = Path(__file__).parents[2]
SPACE = Path(app.__file__).parent
LABELS = ["a chest film with an effusion", "normal brain", "necrosis"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "tiny"
    init_model(folder, "tiny", overrides={"temp3": 50.0})  # so that an untrained model's answers differ
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder):
    return app.Checkpoint(str(folder))


@pytest.fixture(scope="module")
def model(folder):
    """The same weights in the package's own class."""
    return MedMoEModel.from_pretrained(folder).eval()


@pytest.fixture
def drawing():
    return phantom_sample(5, 0, image_size=96, modalities=["fundus"])["image"]


@pytest.fixture
def file(tmp_path, drawing):
    path = tmp_path / "drawing.png"
    drawing.save(path)
    return path


@pytest.fixture
def picture(checkpoint, file):
    return checkpoint.read(str(file))


def test_a_file_is_shown_as_it_is_and_routed(checkpoint, model, picture, drawing):
    np.testing.assert_array_equal(picture.shown, np.asarray(drawing.convert("RGB")))
    assert picture.told is None
    pixels = checkpoint.processor(images=drawing, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(picture.pixel_values, pixels)
    with torch.no_grad():
        vision = model.vision_model
        expected = vision.router(vision.backbone(pixels).pooler_output)[0].softmax(0).tolist()
    assert list(picture.probabilities) == list(MODALITIES)
    assert list(picture.probabilities.values()) == pytest.approx(expected, abs=1e-5)
    assert checkpoint.expert(picture, app.AUTOMATIC) == MODALITIES[int(np.argmax(expected))]
    assert checkpoint.expert(picture, "mri") == "mri"


def test_a_dicom_file_is_shown_as_the_model_reads_it(checkpoint):
    path = pydicom.data.get_testdata_file("CT_small.dcm")
    picture = checkpoint.read(path)
    assert picture.told == "ct"
    gray = read_medical_image(path).pixels
    assert picture.shown.shape == (*gray.shape, 3)
    assert np.abs(picture.shown - 255 * gray[..., None]).max() < 0.51
    assert "header says ct" in app.routed(checkpoint, picture, app.AUTOMATIC)


def test_large_pictures_are_shown_smaller(checkpoint, tmp_path):
    Image.new("L", (2048, 512), 7).save(tmp_path / "wide.png")
    assert checkpoint.read(str(tmp_path / "wide.png")).shown.shape == (256, 1024, 3)


@torch.no_grad()
def test_labels_are_compared_with_the_expert_that_was_asked(checkpoint, model, picture):
    texts = model.get_text_features(**checkpoint.processor(text=LABELS, return_tensors="pt")).pooler_output
    found = []
    for modality in ("xray", "fundus"):
        image = model.get_image_features(picture.pixel_values, modality=modality).pooler_output
        cosines = torch.nn.functional.cosine_similarity(image, texts)
        expected = (50 * cosines).softmax(0).tolist()
        found.append(checkpoint.compare(picture, modality, LABELS))
        assert list(found[-1]) == LABELS
        assert list(found[-1].values()) == pytest.approx(expected, abs=1e-4)
    assert found[0] != found[1]
    chosen = checkpoint.expert(picture, app.AUTOMATIC)
    assert checkpoint.compare(picture, app.AUTOMATIC, LABELS) == checkpoint.compare(picture, chosen, LABELS)


@torch.no_grad()
def test_a_phrase_is_held_against_normal_reports_of_the_experts_modality(checkpoint, model, picture):
    tokens = checkpoint.processor(text="hard exudates", return_tensors="pt")
    normal = checkpoint.processor(text=app.TEXTS["fundus"]["normal"], return_tensors="pt")
    words = model.text_projection(model.text_model(**tokens).word_embeds[0, :2])
    absent = model.text_projection(model.text_model(**normal).pooler_output).mean(0)
    local = model.vision_model(picture.pixel_values, modality="fundus").local_embeds[0]
    cells = torch.zeros(local.shape[1:])
    for row in range(local.shape[1]):
        for column in range(local.shape[2]):
            region = model.visual_projection(local[:, row, column])
            cells[row, column] = sum((word - absent) @ region for word in words) / 2
    expected = checkpoint.processor.post_process_grounding(cells[None, None], target_sizes=[(96, 96)], sigma=1.5)
    found = checkpoint.ground(picture, "fundus", "hard exudates")
    assert found.shape == (96, 96)
    np.testing.assert_allclose(found, expected[0][0].numpy(), atol=1e-4)


@torch.no_grad()
def test_scales_and_nearest_reports(checkpoint, model, picture):
    means, dominating, nearest = checkpoint.scales_and_nearest(picture, "ct")
    features = model.get_image_features(picture.pixel_values, modality="ct")
    weights = features.scale_weights[0].numpy()
    assert list(means.values()) == pytest.approx([float(scale.mean()) for scale in weights], abs=1e-5)
    names = list(means)
    assert names[0] == "scale 1, finest"
    assert names[-1].endswith(", coarsest")
    assert dominating.shape == (96, 96)
    enlarged = torch.nn.functional.interpolate(features.scale_weights, (96, 96), mode="bilinear")[0].numpy()
    np.testing.assert_array_equal(np.take_along_axis(enlarged, dominating[None], 0)[0], enlarged.max(axis=0))
    assert len(np.unique(dominating)) > 1

    image = features.pooler_output[0].numpy()
    cosines = {}
    for modality, texts in json.loads((SPACE / "reports.json").read_text()).items():
        for text in texts["reports"]:
            words = checkpoint.processor(text=text, return_tensors="pt")
            embed = model.get_text_features(**words).pooler_output[0].numpy()
            cosines[modality, text] = float(image @ embed / np.linalg.norm(image) / np.linalg.norm(embed))
    best = sorted(cosines.values(), reverse=True)[:5]
    assert [cosine for cosine, _, _ in nearest] == pytest.approx(best, abs=1e-5)
    assert all(cosines[modality, text] == pytest.approx(cosine, abs=1e-5) for cosine, modality, text in nearest)


def test_heat_is_clear_where_it_is_least_and_opaque_where_it_is_most():
    colours = app.heat_colours(np.array([[-1.0, 0.0], [1.0, 3.0]], dtype=np.float32))
    assert colours[..., 3].tolist() == [[0, 64], [128, 255]]
    assert colours[0, 0, :3].max() < 10
    assert colours[1, 1, :3].min() > 150
    assert app.heat_colours(np.full((2, 2), 0.3))[..., 3].max() == 0


def decoded(source):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


def test_pictures_travel_inside_the_page_and_words_are_escaped(picture):
    heatmap = np.zeros((96, 96), dtype=np.float32)
    heatmap[23, 71] = 2.0
    page = app.picture_html(picture, "<script>", heatmap, "normal reports")
    below, above = (decoded(source) for source in re.findall('src="([^"]+)"', page))
    np.testing.assert_array_equal(below, picture.shown)
    assert above[..., 3].argmax() == 23 * 96 + 71
    assert above[..., 3].sum() == 255
    assert "<script>" not in page
    assert "“&lt;script&gt;” is warmest 74 % from the left and 24 % from the top" in page
    assert "<script>" not in app.nearest_html([(0.5, "<script>", "<script>")])


def test_the_map_of_scales_has_a_legend_in_words():
    page = app.scales_html(np.array([[0, 1], [1, 1]]), ["fine", "coarse"])
    assert "fine: dominates on 25%" in page
    assert "coarse: dominates on 75%" in page
    pixels = decoded(re.search('src="([^"]+)"', page)[1])
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 2


def test_a_file_is_deleted_once_it_is_read(checkpoint, file):
    page = app.Page(checkpoint)
    picture, status, shown, router, labels, zero_shot, means, _, nearest = page.load(
        str(file), "fundus", "", "cupping"
    )
    assert not file.exists()
    assert status == f'<p role="status">{app.routed(checkpoint, picture, "fundus")}</p>'
    assert shown.count("<img") == 2
    assert router == picture.probabilities
    assert labels == "\n".join(app.TEXTS["fundus"]["labels"])
    assert zero_shot == checkpoint.compare(picture, "fundus", labels.split("\n"))
    assert sum(means.values()) == pytest.approx(1)
    assert nearest.count("<li>") == app.NEAREST


@pytest.mark.parametrize("name", ["broken.png", "cut off.dcm", "notes.txt", "empty.jpg"])
def test_a_broken_file_gets_a_sentence(checkpoint, tmp_path, name):
    path = tmp_path / name
    whole = Path(pydicom.data.get_testdata_file("CT_small.dcm")).read_bytes()
    path.write_bytes({"cut off.dcm": whole[:20000], "empty.jpg": b""}.get(name, b"nothing of the kind"))
    picture, status, shown, *rest = app.Page(checkpoint).load(str(path), app.AUTOMATIC, "mine", "")
    assert picture is None
    assert 'role="alert"' in status
    assert name in status
    assert str(tmp_path) not in status
    assert "batch" not in status
    assert "Your picture will be here" in shown
    assert rest == [None, "mine", None, None, "", ""]
    assert not path.exists()


def test_who_chose_is_said(checkpoint, picture):
    chosen = checkpoint.expert(picture, app.AUTOMATIC)
    other = next(modality for modality in MODALITIES if modality != chosen)
    share = f"{max(picture.probabilities.values()):.0%}"
    unknown = "Whether the model knows pictures of this kind was not checked: it has no rejector."
    first = f"The router chose the {chosen} expert ({share})."
    assert app.routed(checkpoint, picture, app.AUTOMATIC) == f"{first} {unknown}"
    assert f"{first} You chose the same. {unknown}" == app.routed(checkpoint, picture, chosen)
    assert f"You overruled it: the {other} expert was asked." in app.routed(checkpoint, picture, other)


def test_what_is_refused_is_said(checkpoint, file, picture, monkeypatch):
    score = checkpoint.model.route(picture.pixel_values)
    for value, words in ((0.7, "is like those that the model knows"), (1.3, "Do not rely on what is said about it")):
        answer = replace(score, ood_score=torch.tensor([value]), accepted=torch.tensor([value <= 1]))
        monkeypatch.setattr(checkpoint.model, "route", lambda pixel_values, answer=answer: answer)
        assert words in app.routed(checkpoint, checkpoint.read(str(file)), app.AUTOMATIC)


def test_without_a_picture_every_button_says_so(checkpoint):
    page = app.Page(checkpoint)
    for answer in (
        page.describe(None, app.AUTOMATIC, "", "")[0],
        page.compare(None, app.AUTOMATIC, "a\nb")[0],
        page.ground(None, app.AUTOMATIC, "effusion")[0],
    ):
        assert "There is no picture" in answer
    assert "no longer here" in page.load("/nowhere/at/all.png", app.AUTOMATIC, "", "")[1]


def test_labels_follow_the_expert_until_they_are_edited(checkpoint, picture):
    page = app.Page(checkpoint)
    assert page.describe(picture, "ct", app.default_labels("xray"), "")[3] == app.default_labels("ct")
    assert page.describe(picture, "ct", "one\ntwo", "")[3] == "one\ntwo"
    status, probabilities = page.compare(picture, "ct", "one\n\n one \n")
    assert "two or more labels" in status
    assert probabilities is None
    assert "phrase first" in page.ground(picture, "ct", "  ")[0]


def test_other_modalities_have_no_labels_and_no_reference(tmp_path, file):
    init_model(tmp_path / "other", "tiny", overrides={"vision_config": {"modalities": ["pet", "spect"]}})
    checkpoint = app.Checkpoint(str(tmp_path / "other"))
    picture, _, shown, router, labels, zero_shot, *_ = app.Page(checkpoint).load(
        str(file), app.AUTOMATIC, "", "hot spot"
    )
    assert set(router) == {"pet", "spect"}
    assert (labels, zero_shot) == ("", None)
    assert "than for the other words" in shown
    # Two words, each held against the other: the mean is nothing.
    np.testing.assert_allclose(checkpoint.ground(picture, "pet", "hot spot"), 0, atol=1e-4)


def texts_of(blocks):
    return " ".join(str(component["props"].get("value")) for component in blocks.config["components"])


def test_nothing_is_kept_or_sent_elsewhere(checkpoint, monkeypatch, folder):
    seen = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: seen.update(options, blocks=self))
    app.launch(str(folder), 7861, isolate=False)
    assert seen["blocks"].analytics_enabled is False
    assert seen["blocks"].delete_cache == (60, 60)
    assert (seen["share"], seen["server_port"], seen["run_history"]) == (False, 7861, False)
    assert (seen["max_file_size"], seen["state_session_capacity"]) == ("200mb", 100)
    assert "http" not in json.dumps([str(font) for font in (*seen["theme"]._font, *seen["theme"]._font_mono)])
    assert "not a medical device" in texts_of(seen["blocks"])
    assert str(folder.parent.parent) not in texts_of(seen["blocks"])


def test_without_a_checkpoint_the_page_says_what_to_give(monkeypatch):
    seen = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: seen.append(self))
    monkeypatch.delenv("MEDMOE_MODEL", raising=False)
    monkeypatch.setattr(app, "packaged", lambda: None)
    app.launch()
    assert "No checkpoint was given" in texts_of(seen[0])
    monkeypatch.setenv("MEDMOE_MODEL", "/nowhere/at/all")
    with pytest.raises(OSError, match="/nowhere/at/all: there is no such folder"):
        app.launch()


def test_the_packaged_checkpoint_is_shown_where_none_is_named(monkeypatch):
    class Loaded(Exception):
        pass

    def load(name, *rest):
        raise Loaded(name)

    monkeypatch.delenv("MEDMOE_MODEL", raising=False)
    monkeypatch.setattr(app, "Checkpoint", load)
    with pytest.raises(Loaded, match=re.escape(medmoe_hf.pretrained("small"))):
        app.launch(isolate=False)


@pytest.fixture(scope="module")
def with_studies(folder):
    return app.Checkpoint(str(folder), load=app.study_loader())


@pytest.fixture
def tab(with_studies, tmp_path, monkeypatch):
    """The handlers of the tab for studies, with an example of three slices."""
    monkeypatch.setattr(examples, "_SLICES", 3)
    (tmp_path / "example").mkdir()
    examples.write_ct_series(tmp_path / "example")
    return study_tab._Tab(study_page.StudyPage(with_studies.predictor), [tmp_path / "example"], None)


PLAIN = ("axial", "usual", False)
OUTPUTS = ("place", "key", "number", "shown", "curve", "jump", "keys", "answer", "left_out")


def test_both_tabs_use_one_model(with_studies, checkpoint, file):
    assert with_studies.model is with_studies.predictor.encoder.model
    with_it, without = with_studies.read(str(file)), checkpoint.read(str(file))
    assert with_it.probabilities == pytest.approx(without.probabilities, abs=1e-6)
    assert with_studies.predictor.encoder.processor.image_processor.allow_urls is False
    found = [block.label for block in app.build(with_studies).blocks.values() if isinstance(block, gr.Tab)]
    assert found == ["Study", "Picture and model"]


def test_a_study_is_shown_from_its_first_key_slice_on(tab, with_studies, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "study"), "zip", tmp_path / "example")
    file, view, status, *rest = tab.upload([archive], None, "head\nchest", "", *PLAIN)
    (study,) = medmoe_hf.predict(
        tmp_path / "example", model=with_studies.predictor, labels=["head", "chest"], progress=False
    )
    best = study.series[0].labels[0]
    shown = dict(zip(OUTPUTS, rest, strict=True))
    assert file["value"] is None
    assert not Path(archive).exists()
    assert "Read 3 images in 1 series of 1 study." in status
    assert shown["place"]["visible"] is False
    assert shown["key"]["value"] == f"label:{best.label}"
    assert (shown["number"]["value"], shown["number"]["maximum"]) == (best.key_slices[0] + 1, 3)
    assert f"Slice {best.key_slices[0] + 1} of 3" in shown["shown"]
    assert study.series[0].expert_reason in shown["answer"]

    other = 3 - best.key_slices[0]
    picture, curve = tab.move(view, 0, f"label:{best.label}", other)
    assert picture == study_page.slice_html(view.series(0), other - 1, view.series(0).labels[0])
    assert f'class="medmoe-here" x1="{other - 1}"' in curve
    assert tab.jump(view, 0, None, 2)[0]["value"] == 2

    asked, _, *rest = tab.ask(view, 0, 1, f"label:{best.label}", "", "ventricle")
    shown = dict(zip(OUTPUTS, rest, strict=True))
    assert shown["key"]["value"] == "text:ventricle"
    assert shown["number"]["value"] == asked.series(0).texts[0].key_slices[0] + 1

    assert view.folder.is_dir()
    _, gone, status, *_ = tab.upload([], asked, "", "", *PLAIN)
    assert gone is None
    assert "Choose at least one file" in status
    assert not view.folder.exists()
    assert "There is no study" in tab.point(gone, 0, None)[0]


@pytest.mark.parametrize("name", ["large.png", "bomb.png"])
def test_a_picture_that_is_too_large_is_refused_before_it_is_decoded(checkpoint, tmp_path, monkeypatch, name):
    path = tmp_path / name
    side = {"large.png": 12_000, "bomb.png": 15_000}[name]
    Image.new("1", (side, side)).save(path)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("it was decoded"))
    picture, status, *_ = app.Page(checkpoint).load(str(path), app.AUTOMATIC, "", "")
    assert picture is None
    assert "it has more than 50 megapixels" in status
    assert not path.exists()


def test_the_checkpoints_own_code_has_the_same_limits(checkpoint):
    assert checkpoint.processor.image_processor.max_pixels == app.MAX_PIXELS
    assert checkpoint.processor.image_processor.allow_urls is False


@pytest.mark.parametrize("place", ["http://127.0.0.1:9/a.png", "https://example.org/a.png", "/dev/zero", "/"])
def test_what_is_no_file_is_not_read(checkpoint, place):
    with pytest.raises(FileNotFoundError, match="no such file"):
        checkpoint.read(place)


def test_an_address_in_a_request_is_not_fetched(checkpoint, monkeypatch):
    blocks = app.build(checkpoint)
    (file,) = (block for block in blocks.blocks.values() if isinstance(block, gr.File))
    fetched = []
    for name in ("save_url_to_cache", "ssrf_protected_download", "async_ssrf_protected_download"):
        monkeypatch.setattr(gr.processing_utils, name, lambda *args, **kwargs: fetched.append(args))
    sent = {"path": "http://127.0.0.1:9/a.png", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(gr.Error, match="Addresses are not fetched"):
        asyncio.run(gr.processing_utils.async_move_files_to_cache(sent, file, check_in_upload_folder=True))
    with pytest.raises(gr.Error, match="Addresses are not fetched"):
        gr.processing_utils.move_files_to_cache(sent, file)
    assert fetched == []


def test_labels_and_phrases_are_bounded(checkpoint, picture):
    page = app.Page(checkpoint)
    lines = [f"label {i}" for i in range(app.MAX_LABELS + 1)]
    status, probabilities = page.compare(picture, "ct", "\n".join(lines))
    assert "at most 100" in status
    assert probabilities is None
    assert len(page.compare(picture, "ct", "\n".join(lines[1:]))[1]) == app.MAX_LABELS
    assert page.compare(picture, "ct", "a\n" + "b" * 1001)[1] is None
    assert page.ground(picture, "ct", "c" * 5000)[1].count("c" * 1000) > 0
    assert "c" * 1001 not in page.ground(picture, "ct", "c" * 5000)[1]


def test_a_port_in_use_is_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(app, "Checkpoint", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"port {port} on 127.0.0.1 cannot be used .* `--port`, {port + 1} say"):
            app.launch("anything", port)
    app.check_port(port)


def test_the_start_says_what_it_is_doing(folder, monkeypatch, capsys):
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: None)
    app.launch(str(folder), isolate=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith("...")] == [
        f"Loading {folder.parent.name}/tiny ...",
        f"Encoding {sum(len(texts['reports']) for texts in app.TEXTS.values())} reports to search in ...",
        "Starting the page ...",
    ]


def test_code_and_weights_are_of_one_commit(folder, monkeypatch, tmp_path):
    """Without the package, also where somebody pushes between the loading of the model and of the processor."""
    asked, said = [], []

    def load(kind):
        def from_pretrained(name, **options):
            asked.append((name, options))
            hub.repo("you/medmoe").branches["main"] = "1" * 40
            return kind.from_pretrained(folder, trust_remote_code=True)

        return type("Auto", (), {"from_pretrained": staticmethod(from_pretrained)})

    monkeypatch.setattr(app, "AutoModel", load(app.AutoModel))
    monkeypatch.setattr(app, "AutoProcessor", load(app.AutoProcessor))
    with LoopbackHub() as hub:
        hub.accounts["hf_write"] = Account("you")
        hub.use(monkeypatch, tmp_path / "home", token="hf_write")
        first = hub.create("you/medmoe", files={"config.json": b"{}"}).branches["main"]
        app.Checkpoint("you/medmoe", said.append)
        pinned = {"trust_remote_code": True, "revision": first, "code_revision": first}
        assert asked == [("you/medmoe", pinned)] * 2
        assert f"Running the code of you/medmoe at {first}." in said
        asked.clear()
        app.Checkpoint("you/medmoe", revision=first)
        assert asked == [("you/medmoe", pinned)] * 2
        assert app.commit_of("you/other", None) is None  # which the loading explains
        assert app.commit_of("you/other", first) == first
    assert not Path("you/medmoe").exists()
    seen = []
    monkeypatch.setattr(app, "Checkpoint", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(app, "build", lambda checkpoint: types.SimpleNamespace(launch=lambda **options: None))
    monkeypatch.setenv("MEDMOE_REVISION", first)
    app.launch("you/medmoe", isolate=False)
    assert seen[0][-1] == first


def test_other_models_are_refused(tmp_path):
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="'bert'; the demo shows dual encoders"):
        app.Checkpoint(str(tmp_path))


def test_the_sentences_are_those_of_predictions():
    """The Space's folder has no package, so it has a copy; real scans are not described like phantoms."""
    asked = yaml.safe_load((ROOT / "medmoe_hf/inference/studies/default_labels.yaml").read_text())
    assert list(app.TEXTS) == list(asked) == list(MODALITIES)
    for modality, texts in app.TEXTS.items():
        assert texts["labels"] == [sentences[0] for sentences in asked[modality]["labels"].values()]
        assert texts["normal"][: len(asked[modality]["normal"])] == asked[modality]["normal"]
        assert len(set(texts["reports"])) == 10


def test_the_space_is_whole_and_stands_once():
    assert (ROOT / "examples" / "space").samefile(SPACE)
    front_matter = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert (front_matter["sdk"], front_matter["app_file"]) == ("gradio", "app.py")
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    known = {requirement.name: requirement for requirement in map(Requirement, ours)}
    assert known["gradio"].specifier.contains(front_matter["sdk_version"])
    for line in (SPACE / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            assert Requirement(line) == known[Requirement(line).name]
