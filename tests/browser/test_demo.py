"""The demo in headless Chromium: a copy of the Space's folder, where `medmoe_hf` cannot be imported, and the command.

MEDMOE_MODEL names the checkpoint, by default an untrained one; MEDMOE_SCREENSHOTS a folder for screenshots.
"""

import importlib.util
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
from browsers import CHROMIUM
from PIL import Image
from processes import free_port
from servers import running

from medmoe_hf.data import phantom_sample
from medmoe_hf.hub import init_model
from medmoe_hf.hub.study_demo.examples import write_ct_series

pytest.importorskip("gradio", reason='the demo needs gradio: pip install "medmoe_hf[demo]"')
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]

SPACE = Path(__file__).parents[2] / "examples" / "space"
TEXTS = json.loads((SPACE / "reports.json").read_text())
WITHOUT_THE_PACKAGE = """
import runpy, sys
sys.modules["medmoe_hf"] = None
sys.argv = ["app.py", "--port", sys.argv[1]]
runpy.run_path("app.py", run_name="__main__")
"""
ANSWER = 30_000  # milliseconds for an answer of the page
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a running demo, and the folder in which it may leave files."""
    here = tmp_path_factory.mktemp("demo")
    shutil.copytree(SPACE, here / "space")
    model = os.environ.get("MEDMOE_MODEL")
    if not model:
        model = here / "a_checkpoint_with_a_rather_long_name"
        init_model(model, "tiny")
    port = free_port()
    environment = os.environ | {
        "MEDMOE_MODEL": str(Path(model).resolve()),
        "GRADIO_TEMP_DIR": str(here / "temporary"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(port)]
    with running(command, port, here / "log", cwd=here / "space", env=environment):
        yield f"http://127.0.0.1:{port}", here / "temporary"


@pytest.fixture
def open_page(server, chromium):
    """Opens the demo in a window of a size; afterwards no request has left this machine."""
    pages = []

    def open_one(size):
        page = chromium.new_page(viewport=size)
        page.set_default_timeout(ANSWER)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server[0])
        pages.append(page)
        page.wait_for_selector("#file button")
        # Gradio's parts are there before they listen: the last one, and then a moment with nothing to do.
        page.wait_for_selector("#nearest", state="attached")
        settle(page)
        return page

    asked = []
    yield open_one
    for page in pages:
        page.close()
    assert [url for url in asked if not url.startswith((server[0], "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    path = tmp_path_factory.mktemp("drawing") / "chest.png"
    phantom_sample(9, 1, modalities=["xray"])["image"].save(path)
    return path


def upload(page, path):
    page.set_input_files("#file input[type=file]", str(path))


def settle(page):
    """Waits until the page has had nothing to do for a while: fades have ended, late parts are there."""
    for _ in range(3):
        page.evaluate("new Promise(done => requestIdleCallback(() => setTimeout(done, 300)))")


def look(page):
    """The picture as it is seen, (H, W, 3)."""
    settle(page)
    shot = page.locator(".medmoe-stack").first.screenshot()
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"), dtype=float)


def status(page, words):
    page.wait_for_function("words => document.querySelector('#status').innerText.includes(words)", arg=words)
    return page.inner_text("#status")


def screenshot(page, name):
    folder = os.environ.get("MEDMOE_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def left_over(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


def test_upload_route_overrule_heatmap_opacity(open_page, server, drawing):
    page = open_page(DESKTOP)
    screenshot(page, "desktop-empty")
    upload(page, drawing)
    chosen = status(page, "The router chose").split("chose the ")[1].split(" expert")[0]
    modalities = {"xray", "ct", "mri", "ultrasound", "histopathology", "fundus"}
    assert chosen in modalities
    bars = page.inner_text("#router")
    assert all(modality in bars for modality in modalities)
    assert bars.count("%") == 6
    asked = page.input_value("#labels textarea").splitlines()
    assert asked == TEXTS[chosen]["labels"]
    answers = page.inner_text("#zero-shot")
    assert all(label in answers for label in asked)
    assert answers.count("%") == len(asked)
    assert page.locator("#nearest li").count() == 5
    assert page.locator("#dominating img").count() == 1

    other = "fundus" if chosen != "fundus" else "ct"
    before = page.inner_text("#zero-shot")
    page.click("#expert input")
    page.click(f"#expert [role=option]:has-text('{other}')")
    status(page, f"You overruled it: the {other} expert was asked.")
    page.wait_for_function("before => document.querySelector('#zero-shot').innerText != before", arg=before)

    assert page.locator(".medmoe-heat").count() == 0
    bare = look(page)
    page.fill("#phrase input, #phrase textarea", "effusion")
    page.click("#find")
    page.wait_for_selector(".medmoe-heat")
    assert "“effusion” is warmest" in page.inner_text("#picture")
    pictures = {}
    for opacity in ("0", "0.5", "1"):
        page.fill("#opacity input[type=number]", opacity)
        page.keyboard.press("Tab")
        page.wait_for_function(
            "wanted => getComputedStyle(document.querySelector('.medmoe-heat')).opacity == wanted", arg=opacity
        )
        pictures[opacity] = look(page)
    # In levels of 255; the picture may have moved by a part of a pixel.
    differences = [np.abs(pictures[opacity] - bare).mean() for opacity in ("0", "0.5", "1")]
    assert differences[0] < 1
    assert differences[0] + 1 < differences[1] < differences[2]
    page.fill("#opacity input[type=number]", "0.6")
    page.keyboard.press("Tab")
    screenshot(page, "desktop")
    assert left_over(server[1]) == []


def test_a_file_may_be_dropped(open_page, drawing):
    page = open_page(DESKTOP)
    dropped = page.evaluate_handle(
        """bytes => {
            const carried = new DataTransfer();
            carried.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
            return carried;
        }""",
        list(drawing.read_bytes()),
    )
    page.dispatch_event("#file button", "drop", {"dataTransfer": dropped})
    status(page, "The router chose")


def test_labels_are_edited(open_page, drawing):
    page = open_page(DESKTOP)
    upload(page, drawing)
    status(page, "The router chose")
    page.fill("#labels textarea", "normal chest film\nchest film with an effusion\n")
    page.click("#ask")
    page.wait_for_function("document.querySelector('#zero-shot').innerText.includes('normal chest film')")
    assert page.inner_text("#zero-shot").count("%") == 2
    page.fill("#labels textarea", "only one")
    page.click("#ask")
    status(page, "two or more")


def test_a_dicom_file_without_an_ending(open_page, server, tmp_path):
    path = tmp_path / "IM0001"
    shutil.copyfile(pydicom.data.get_testdata_file("CT_small.dcm"), path)
    page = open_page(DESKTOP)
    upload(page, path)
    assert "header says ct" in status(page, "The router chose")
    assert page.evaluate("document.querySelector('#picture img').naturalWidth") == 128
    assert left_over(server[1]) == []


def test_a_broken_file_gets_a_message_and_the_next_one_works(open_page, server, drawing, tmp_path):
    page = open_page(PHONE)
    for name in ("broken.png", "broken.dcm"):
        (tmp_path / name).write_bytes(drawing.read_bytes()[:200] if name.endswith("png") else b"no picture at all")
        upload(page, tmp_path / name)
        message = status(page, name)
        assert "This file gives no picture" in message
        assert "Traceback" not in page.content()
        assert str(server[1]) not in message
        assert page.locator("#status [role=alert]").is_visible()
        screenshot(page, f"phone-{name.replace('.', '-')}")
        page.click("#file button[aria-label=Clear]")
        page.wait_for_selector("#file button:has-text('Upload')")
    upload(page, drawing)
    status(page, "The router chose")
    assert left_over(server[1]) == []


def tab_to(page, selector):
    """Presses Tab until the focus is inside an element, which then shows it."""
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.closest(selector) !== null", selector):
            assert page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
            return
    raise AssertionError(f"Tab does not come to {selector}")


def test_everything_by_keyboard(open_page, drawing):
    page = open_page(DESKTOP)
    # Listens from the beginning: what opens while Playwright is still getting ready to listen would be lost.
    choosers: list[playwright.FileChooser] = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    page.wait_for_timeout(1000)
    tab_to(page, "#file")
    page.keyboard.press("Enter")
    for _ in range(100):
        page.wait_for_timeout(ANSWER / 100)
        if choosers:
            break
    assert choosers, "Enter on the upload button opens nothing"
    choosers[0].set_files(str(drawing))
    chosen = status(page, "The router chose")
    tab_to(page, "#phrase")
    page.keyboard.type("effusion")
    page.keyboard.press("Enter")
    page.wait_for_selector(".medmoe-heat")
    tab_to(page, "#opacity input[type=range]")
    before = look(page)
    page.keyboard.press("End")
    page.wait_for_function("getComputedStyle(document.querySelector('.medmoe-heat')).opacity == '1'")
    assert np.abs(look(page) - before).mean() > 1
    screenshot(page, "keyboard")
    tab_to(page, "#expert")
    # From "automatic" past as many experts as needed for one that the router did not choose.
    page.wait_for_selector("#expert [role=option]")
    for _ in range(2 if "chose the xray" in chosen else 1):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    asked = status(page, "You overruled it")
    tab_to(page, "#labels")
    page.keyboard.press("Control+A")
    page.keyboard.type("one\ntwo")
    tab_to(page, "#ask")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#zero-shot').innerText.includes('two')")
    assert status(page, "You overruled it") == asked


SMALL_TEXT = """() => [...document.querySelectorAll('.gradio-container *')]
    .filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()) && e.checkVisibility())
    .map(e => [parseFloat(getComputedStyle(e).fontSize), e.innerText])
    .filter(([size]) => size < 12)"""


@pytest.mark.parametrize(("width", "columns"), [(320, 1), (390, 1), (699, 1), (1280, 2)])
def test_it_can_be_read_at_any_width(open_page, drawing, width, columns):
    page = open_page({"width": width, "height": 844})
    if width == PHONE["width"]:
        screenshot(page, "phone-empty")
    upload(page, drawing)
    status(page, "The router chose")
    page.fill("#phrase input, #phrase textarea", "effusion")
    page.click("#find")
    page.wait_for_selector(".medmoe-heat")
    if width == PHONE["width"]:
        screenshot(page, "phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for part in ("#file", "#router", ".medmoe-stack", "#labels", "#zero-shot", "#dominating img", "#nearest ol"):
        box = page.locator(part).first.bounding_box()
        assert box["x"] >= 0, part
        assert box["x"] + box["width"] <= width, part
    beside = page.locator("#router").bounding_box()["x"] > page.locator("#picture").bounding_box()["x"] + 100
    assert beside == (columns == 2)
    assert page.evaluate(SMALL_TEXT) == []


def study_status(page, words):
    page.wait_for_function("words => document.querySelector('#study-status').innerText.includes(words)", arg=words)
    settle(page)


def test_the_command_shows_whole_studies(chromium, tmp_path):
    model = os.environ.get("MEDMOE_MODEL")
    if not model:
        model = tmp_path / "model"
        init_model(model, "tiny")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    (tmp_path / "series").mkdir()
    write_ct_series(tmp_path / "series")
    for path in sorted((tmp_path / "series").iterdir())[5:]:
        path.unlink()
    archive = shutil.make_archive(str(tmp_path / "study"), "zip", tmp_path / "series")
    (tmp_path / "broken.zip").write_bytes(Path(archive).read_bytes()[:500])
    port = free_port()
    command = [sys.executable, "-m", "medmoe_hf.cli", "demo", str(model), "--port", str(port)]
    if importlib.util.find_spec("mcp") is not None:  # the page is the same with the tools for assistants
        command.append("--mcp")
    asked = []
    with running(command, port, tmp_path / "log", env=os.environ | {"TMPDIR": str(temporary)}):
        for width, size in ((1280, DESKTOP), (390, PHONE)):
            page = chromium.new_page(viewport=size)
            page.set_default_timeout(4 * ANSWER)
            page.on("request", lambda request: asked.append(request.url))
            page.goto(f"http://127.0.0.1:{port}")
            page.wait_for_selector("#study-ask")
            settle(page)
            screenshot(page, f"study-{width}-empty")
            page.click("#study-examples button:has-text('CT of a body')")
            study_status(page, "Read 32 images in 1 series of 1 study.")
            assert "voted for" in page.inner_text("#study-answer")
            assert page.locator("#study-keys figure").count() >= 1
            screenshot(page, f"study-{width}")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(SMALL_TEXT) == []

            page.fill("#study-slider input[type=number]", "9")
            page.keyboard.press("Tab")
            page.wait_for_function("document.querySelector('#study-slice').innerText.includes('Slice 9 of 32')")
            page.wait_for_selector(".medmoe-curve .medmoe-here[x1='8']", state="attached")
            box = page.locator("#study-slice .medmoe-stack").bounding_box()
            assert box["width"] == pytest.approx(box["height"], rel=0.02)

            page.fill("#study-phrase input, #study-phrase textarea", "lung")
            page.click("#study-ask")
            page.wait_for_function("document.querySelector('#study-curve').innerText.includes('“lung”')")
            page.set_input_files("#study-files input[type=file]", str(tmp_path / "broken.zip"))
            study_status(page, "A zip file is damaged")
            assert page.locator("#study-status [role=alert]").is_visible()
            assert not page.locator("#study-slider").is_visible()
            screenshot(page, f"study-{width}-broken")
            page.set_input_files("#study-files input[type=file]", archive)
            study_status(page, "Read 5 images in 1 series of 1 study.")
            assert "“lung”" in page.inner_text("#study-curve")
            page.close()
        # Of uploads only those that are shown are left, without their names.
        kept = [path for path in temporary.glob("medmoe-demo-*/**/*") if path.is_file()]
        assert len(kept) <= 10
        assert not list(temporary.rglob("study*.zip"))
        assert not [path for path in (temporary / "gradio").rglob("*") if path.is_file() and path.stat().st_size]
    local = (f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}", "data:", "blob:")
    assert [url for url in asked if not url.startswith(local)] == []
