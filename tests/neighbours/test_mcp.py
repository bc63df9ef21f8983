"""The tools of a demo in a process of its own, asked by the unmodified client of the Model Context Protocol."""

import asyncio
import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("gradio", reason='pip install "medmoe_hf[mcp]"')
pytest.importorskip("mcp", reason='pip install "medmoe_hf[mcp]"')
pytest.importorskip("pydicom")

from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from PIL import Image
from processes import free_port
from pydicom.data import get_testdata_file
from servers import running

import medmoe_hf
from medmoe_hf.cli import app
from medmoe_hf.model import MedMoEModel, MedMoEProcessor

SCAN = "scans/CT_small.dcm"  # a real CT, of pydicom's package
LABELS = ["CT scan of the chest.", "Chest radiograph.", "MRI of the brain."]
EXPERTS = ["xray", "ct", "mri", "ultrasound", "histopathology", "fundus"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    images = tmp_path_factory.mktemp("images")
    (images / "scans").mkdir()
    shutil.copy(get_testdata_file("CT_small.dcm"), images / SCAN)
    Image.new("L", (40, 30), 7).save(images.parent / "outside.png")
    (images / "link.png").symlink_to(images.parent / "outside.png")
    (images / "broken.png").write_bytes(b"no picture")
    return images


@pytest.fixture(scope="module")
def server(images, tmp_path_factory):
    """The port of `medmoe demo --mcp` with the checkpoint of the package; in its log is no traceback."""
    port = free_port()
    log = tmp_path_factory.mktemp("log") / "log"
    command = [sys.executable, "-m", "medmoe_hf.cli", "demo", "--port", str(port), "--mcp", "--images", str(images)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_PROXY": "*", "GRADIO_TEMP_DIR": str(log.parent)}
    environment.pop("MEDMOE_MODEL", None)  # names another checkpoint for the tests in a browser
    with running(command, port, log, env=environment):
        yield port


@pytest.fixture(scope="module")
def ask(server):
    """Function that runs requests in a session: `await request(session)`."""

    def ask(request):
        async def run():
            address = f"http://127.0.0.1:{server}/gradio_api/mcp/"
            async with (
                streamable_http_client(address) as (read, write, _),
                ClientSession(read, write, read_timeout_seconds=timedelta(seconds=60)) as session,
            ):
                await session.initialize()
                return await request(session)

        return asyncio.run(run())

    return ask


@pytest.fixture(scope="module")
def call(ask):
    def call(name, **arguments):
        result = ask(lambda session: session.call_tool(name, arguments))
        (content,) = result.content
        if result.isError:
            raise LookupError(content.text)
        return json.loads(content.text)

    return call


@pytest.fixture(scope="module")
def ours(images):
    """The packaged model by its own API, and the pixels of the scan."""
    folder = medmoe_hf.pretrained("small")
    processor = MedMoEProcessor.from_pretrained(folder)
    pixels = processor(images=str(images / SCAN), return_tensors="pt")["pixel_values"]
    return MedMoEModel.from_pretrained(folder).eval(), processor, pixels


def test_the_tools_say_what_they_need_and_answer(ask):
    tools = {tool.name: tool for tool in ask(lambda session: session.list_tools()).tools}
    assert list(tools) == ["route", "classify", "ground", "search"]
    required = {
        "route": ["image"],
        "classify": ["image", "labels"],
        "ground": ["image", "phrase"],
        "search": ["image"],
    }
    for name, tool in tools.items():
        assert "never state an answer as a finding about a patient" in tool.description
        assert "Returns: JSON: " in tool.description
        properties = tool.inputSchema["properties"]
        assert tool.inputSchema["required"] == required[name]
        assert all(one["description"] for one in properties.values())
        assert properties["image"]["type"] == "string"
        if name != "route":
            assert properties["expert"]["enum"] == ["automatic", *EXPERTS]
    assert tools["classify"].inputSchema["properties"]["labels"]["items"] == {"type": "string"}
    assert tools["search"].inputSchema["properties"]["count"]["type"] == "integer"
    assert "sixty example sentences" in tools["search"].inputSchema["properties"]["texts"]["description"]


@torch.no_grad()
def test_route_is_our_router(call, ours):
    model, _, pixels = ours
    routed = model.route(pixels)
    answer = call("route", image=SCAN)
    assert (answer["expert"], answer["header"]) == (routed.modality[0], "ct")
    assert answer["accepted"] is bool(routed.accepted[0])
    assert list(answer["routing"]) == EXPERTS
    np.testing.assert_allclose(list(answer["routing"].values()), routed.probabilities[0].numpy(), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("expert", ["automatic", "mri"])
def test_classify_is_our_softmax(call, ours, expert):
    model, processor, pixels = ours
    modality = model.route(pixels).modality[0] if expert == "automatic" else expert
    tokens = processor(text=LABELS, return_tensors="pt")
    expected = model(**tokens, pixel_values=pixels, modality=modality).logits_per_image[0].softmax(dim=0)
    answer = call("classify", image=SCAN, labels=LABELS, expert=expert)
    assert answer["expert"] == modality
    assert [answer["labels"][label] for label in LABELS] == pytest.approx(expected.tolist(), abs=1e-5)
    assert list(answer["labels"].values()) == sorted(answer["labels"].values(), reverse=True)


def app_texts():
    """The sentences that the demo compares a phrase with."""
    return json.loads((Path(medmoe_hf.__file__).parent / "hub" / "space" / "reports.json").read_text())


@torch.no_grad()
def test_ground_is_our_heat_map(call, ours):
    model, processor, pixels = ours
    tokens = processor(text="nodule", return_tensors="pt")
    normal = processor(text=app_texts()["ct"]["normal"], return_tensors="pt")
    grounding = model.ground(**tokens, pixel_values=pixels, modality="ct", reference=normal)
    heat = processor.post_process_grounding(grounding, target_sizes=[(128, 128)], sigma=1.5)[0].mean(dim=0).numpy()
    answer = call("ground", image=SCAN, phrase="nodule", expert="ct")
    np.testing.assert_allclose(answer["cells"], heat.reshape(8, 16, 8, 16).mean(axis=(1, 3)), rtol=1e-5)
    assert (answer["lowest"], answer["highest"]) == pytest.approx((heat.min(), heat.max()), rel=1e-5)
    row, column = int(answer["warmest"]["y"] * 128), int(answer["warmest"]["x"] * 128)
    assert heat[row, column] == pytest.approx(heat.max(), rel=1e-5)


@torch.no_grad()
def test_search_ranks_by_our_cosines(call, ours):
    model, processor, pixels = ours
    image = model.get_image_features(pixels, modality="ct").pooler_output
    texts = model.get_text_features(**processor(text=LABELS, return_tensors="pt")).pooler_output
    cosines = dict(zip(LABELS, torch.nn.functional.cosine_similarity(image, texts).tolist(), strict=True))
    nearest = call("search", image=SCAN, texts=LABELS, count=2, expert="ct")["nearest"]
    best = sorted(LABELS, key=cosines.__getitem__, reverse=True)[:2]
    assert [one["text"] for one in nearest] == best
    assert [one["cosine"] for one in nearest] == pytest.approx([cosines[text] for text in best], abs=1e-5)
    known = call("search", image=SCAN, expert="ct")["nearest"]
    texts = [one["text"] for one in known]
    embeds = model.get_text_features(**processor(text=texts, return_tensors="pt")).pooler_output
    expected = torch.nn.functional.cosine_similarity(image, embeds).tolist()
    assert len(set(texts)) == 5
    assert [one["cosine"] for one in known] == pytest.approx(expected, abs=1e-5)
    assert expected == sorted(expected, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": "../outside.png"}, "There is no file '../outside.png' in the folder of this server"),
        ({"image": "link.png"}, "There is no file 'link.png'"),
        ({"image": "/etc/passwd"}, "There is no file '/etc/passwd'"),
        ({"image": "http://127.0.0.1:9/a.png"}, "There is no file"),
        ({"image": "broken.png"}, "This file gives no picture: "),
        ({"image": SCAN, "labels": ["one"]}, "Give 2 to 100 different texts"),
        ({"image": SCAN, "expert": "pet"}, "'pet' is not one of"),
        ({"labels": LABELS}, "'image' is a required property"),
    ],
)
def test_what_cannot_be_answered_is_said(call, images, arguments, message):
    with pytest.raises(LookupError, match=message) as raised:
        call("classify", **{"labels": LABELS} | arguments)
    assert str(images) not in str(raised.value)


def test_other_names_of_this_machine_are_refused(server):
    request = urllib.request.Request(f"http://127.0.0.1:{server}/gradio_api/mcp/", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request, timeout=10)
    assert raised.value.code == 400


@pytest.mark.usefixtures("logging_as_before")
def test_what_the_command_needs(monkeypatch, tmp_path):
    def said(*options):
        result = CliRunner().invoke(app, ["demo", "--mcp", *options])
        assert result.exit_code == 1
        return str(result.exception)

    assert "--images" in said("--images", str(tmp_path / "none"))
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    assert "there is no password" in said()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "medmoe_hf[mcp]"' in said()
