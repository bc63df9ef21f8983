"""`report.html` in headless Chromium: nothing is requested, everything fits, and pictures are shown.

MEDMOE_SCREENSHOTS names a folder for screenshots.
"""

import os
from pathlib import Path

import pytest
from browsers import CHROMIUM
from synthetic_studies import synthetic_studies

from medmoe_hf.inference.studies.report import report_html

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]

OUTSIDE = """width => [...document.querySelectorAll('body *')]
    .filter(e => e.checkVisibility())
    .map(e => [e.getBoundingClientRect(), e])
    .filter(([box]) => box.left < 0 || box.right > width)
    .map(([box, e]) => `${e.tagName} ${box.left}..${box.right} ${e.textContent.slice(0, 60)}`)"""
CUT = """() => [...document.querySelectorAll('body *')]
    .filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != 'inline' && e.tagName != 'svg')
    .map(e => `${e.tagName} ${e.scrollWidth} in ${e.clientWidth}`)"""
SMALL_TEXT = """() => [...document.querySelectorAll('body *')]
    .filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()) && e.checkVisibility())
    .filter(e => parseFloat(getComputedStyle(e).fontSize) < 12)
    .map(e => e.textContent)"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    studies = synthetic_studies(unreadable=[3])
    studies[0].series[0].texts[0].text = "pneumonoultramicroscopicsilicovolcanoconiosis" * 4  # it cannot be broken
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report_html(studies), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "columns"), [(1280, 2), (390, 1), (320, 1)])
def test_the_report_fits_and_requests_nothing(chromium, report, width, columns):
    page = chromium.new_page(viewport={"width": width, "height": 844})
    asked, told = [], []
    page.on("request", lambda request: asked.append(request.url))
    # What the page's policy blocks is told on the console.
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.goto(report.as_uri())
    page.wait_for_load_state("networkidle")
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert told == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OUTSIDE, width) == []
    assert page.evaluate(CUT) == []
    assert page.evaluate(SMALL_TEXT) == []
    pictures = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(pictures) >= 20
    assert min(pictures) > 0
    boxes = [page.locator("h4", has_text=text).first.bounding_box() for text in ("What it shows", "Which expert")]
    assert (boxes[1]["x"] > boxes[0]["x"] + 200) == (columns == 2)
    heat = page.locator(".heat").first
    over, under = heat.bounding_box(), page.locator(".stack img").first.bounding_box()
    assert over == pytest.approx(under, abs=0.5)
    folder = os.environ.get("MEDMOE_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/report-{width}.png", full_page=True)
    page.focus("#heat")
    page.keyboard.press("Space")
    assert not heat.is_visible()
    page.close()
