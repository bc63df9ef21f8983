"""What `medmoe demo --mcp` offers to assistants by the Model Context Protocol: four tools, which gradio serves.

Assistants read names, types and docstrings. gradio takes one line per parameter; answers are JSON in a string.
"""

import importlib.util
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from medmoe_hf.errors import ArgumentError, MissingPackageError
from medmoe_hf.hub.space.app import AUTOMATIC, MAX_CHARACTERS, MAX_LABELS, Checkpoint, Picture
from medmoe_hf.inference.batching import unit_length

GRID = 8  # rows and columns of the heat-map in an answer

_HOSTS = ["127.0.0.1", "localhost"]
_DIGITS = 6


def offer(folder: str | Path) -> Callable[[Any, Checkpoint], dict[str, Any]]:
    """Makes what `launch` extends the page by, so that assistants on this machine can use its checkpoint.

    Args:
        folder: Pictures in it may be read, and in folders in it; links that lead out of it are not followed.

    Returns:
        Function of the page and its checkpoint that adds the tools, and returns arguments of gradio's `launch`.

    Raises:
        ArgumentError: If there is no such folder, or the page is served to other machines.
        MissingPackageError: Without the package mcp.
    """
    if importlib.util.find_spec("mcp") is None:
        raise MissingPackageError('Tools for assistants need the package mcp: pip install "medmoe_hf[mcp]"')
    if not Path(folder).is_dir():
        raise ArgumentError(f"--images {folder}: there is no such folder.")
    host = os.environ.get("GRADIO_SERVER_NAME", _HOSTS[0])
    if host not in _HOSTS:
        raise ArgumentError(
            f"GRADIO_SERVER_NAME is {host}, so that other machines could ask about the pictures in {folder}: there is "
            "no password. Remove the variable to use --mcp."
        )

    def extend(page: Any, checkpoint: Checkpoint) -> dict[str, Any]:
        import gradio as gr  # after the app, which sets how it behaves
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        for event in page.fns.values():  # the controls of the page are no tools
            event.api_visibility = "private"
        with page:
            for tool in tools_of(checkpoint, folder):
                gr.api(tool, queue=False)
        # Pages of the internet could reach the server by a name of their own that leads to this machine.
        hosts = Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS)
        return {"mcp_server": True, "app_kwargs": {"middleware": [hosts]}}

    return extend


def tools_of(checkpoint: Checkpoint, folder: str | Path) -> list[Callable[..., str]]:
    """Makes the tools `route`, `classify`, `ground` and `search` of a checkpoint, for pictures in a folder."""
    root = Path(folder).resolve()
    experts = (AUTOMATIC, *checkpoint.modalities)
    turn = threading.Lock()

    @contextmanager
    def opened(image: str, expert: str = AUTOMATIC) -> Iterator[Picture]:
        """A picture; nothing else is computed at the same time."""
        path = (root / image).resolve()
        if not path.is_relative_to(root) or not path.is_file():
            raise _error(f"There is no file {image!r} in the folder of this server.")
        if expert not in experts:
            raise _error(f"There is no expert {expert!r}: {', '.join(experts)}.")
        with turn, torch.inference_mode():
            try:
                picture = checkpoint.read(str(path))
            except (OSError, ValueError, ImportError) as error:
                reason = str(error).replace(str(path), image).removeprefix("image 0 of the batch: ")
                raise _error(f"This file gives no picture: {reason}") from None
            yield picture

    def routing(picture: Picture, expert: str) -> dict[str, Any]:
        return {
            "expert": checkpoint.expert(picture, expert),
            "routing": {name: _rounded(value) for name, value in picture.probabilities.items()},
            "header": picture.told,
            "accepted": picture.accepted,
        }

    def route(image: str) -> str:
        """Says which imaging modality a medical picture is of, and whether the model knows pictures of this kind.
        Research software: never state an answer as a finding about a patient.

        Args:
            image: Path of a PNG, JPEG, TIFF, DICOM or NIfTI file in the folder of the server.

        Returns:
            JSON: expert (the most probable modality), routing (the probability of each), header (what a DICOM header says, or null), accepted (false: unlike all that the model knows, so that no answer about it can be relied on; null: not checked).
        """  # noqa: E501
        with opened(image) as picture:
            return json.dumps(routing(picture, AUTOMATIC))

    def classify(image: str, labels: list[str], expert: str = AUTOMATIC) -> str:
        """Compares a medical picture with labels (zero-shot classification).
        Research software: never state an answer as a finding about a patient.

        Args:
            image: Path of a PNG, JPEG, TIFF, DICOM or NIfTI file in the folder of the server.
            labels: Two or more sentences as in a report, such as "Chest radiograph showing an effusion."
            expert: Modality whose expert reads the picture; by default the one that the router selects.

        Returns:
            JSON: labels with their probabilities, the highest first, which compare them with each other and are no probabilities of a disease; and the answer of the tool route.
        """  # noqa: E501
        listed = _sentences(labels, least=2)
        with opened(image, expert) as picture:
            found = checkpoint.compare(picture, expert, listed)
            ranked = sorted(found.items(), key=lambda pair: -pair[1])
            return json.dumps(
                {"labels": {label: _rounded(value) for label, value in ranked}, **routing(picture, expert)}
            )

    def ground(image: str, phrase: str, expert: str = AUTOMATIC) -> str:
        """Says where in a medical picture a phrase is. There is always a warmest place, also where there is nothing.
        Research software: never state an answer as a finding about a patient.

        Args:
            image: Path of a PNG, JPEG, TIFF, DICOM or NIfTI file in the folder of the server.
            phrase: What to look for; a single word is often best, such as effusion.
            expert: Modality whose expert reads the picture; by default the one that the router selects.

        Returns:
            JSON: warmest (x from the left and y from the top, 0 to 1), highest and lowest value of the heat-map (how much more a place speaks for the phrase than for normal reports), its means in 8 rows of 8 cells from the top left, and the answer of the tool route.
        """  # noqa: E501
        (word,) = _sentences([phrase], least=1)
        with opened(image, expert) as picture:
            heat = torch.from_numpy(checkpoint.ground(picture, expert, word).copy())
            height, width = heat.shape
            row, column = divmod(int(heat.argmax()), width)
            cells = torch.nn.functional.adaptive_avg_pool2d(heat[None], GRID)[0].tolist()
            found = {
                "warmest": {"x": _rounded((column + 0.5) / width), "y": _rounded((row + 0.5) / height)},
                "highest": _rounded(heat.max()),
                "lowest": _rounded(heat.min()),
                "cells": [[_rounded(value) for value in values] for values in cells],
            }
            return json.dumps(found | routing(picture, expert))

    def search(image: str, texts: list[str] | None = None, count: int = 5, expert: str = AUTOMATIC) -> str:
        """Finds the texts that are nearest to a medical picture.
        Research software: never state an answer as a finding about a patient.

        Args:
            image: Path of a PNG, JPEG, TIFF, DICOM or NIfTI file in the folder of the server.
            texts: At most 100 texts to search, such as sentences of reports; by default sixty example sentences about six modalities.
            count: Number of texts in the answer.
            expert: Modality whose expert reads the picture; by default the one that the router selects.

        Returns:
            JSON: nearest (texts with their cosines, the nearest first), and the answer of the tool route.
        """  # noqa: E501
        listed = [text for _, text in checkpoint.reports] if texts is None else _sentences(texts, least=1)
        with opened(image, expert) as picture:
            known = checkpoint.report_embeds if texts is None else checkpoint.embed_texts(listed)
            cosines = known @ unit_length(checkpoint.embed_picture(picture, expert))[0]
            best = cosines.topk(min(max(count, 1), len(listed)))
            found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            nearest = [{"text": listed[at], "cosine": _rounded(cosine)} for at, cosine in found]
            return json.dumps({"nearest": nearest, **routing(picture, expert)})

    for tool in (classify, ground, search):
        tool.__annotations__["expert"] = Literal[experts]
    return [route, classify, ground, search]


def _error(text: str) -> Exception:
    """An error that the assistant reads, without a traceback in the log."""
    import gradio as gr

    error: Exception = gr.Error(text, print_exception=False)
    return error


def _sentences(texts: Sequence[str], least: int) -> list[str]:
    listed = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not least <= len(listed) <= MAX_LABELS or max(map(len, listed)) > MAX_CHARACTERS:
        raise _error(f"Give {least} to {MAX_LABELS} different texts, of at most {MAX_CHARACTERS} characters each.")
    return listed


def _rounded(value: Any) -> float:
    return round(float(value), _DIGITS)
