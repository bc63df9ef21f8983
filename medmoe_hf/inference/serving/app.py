"""The HTTP service of `medmoe serve`: one model, one prediction at a time, uploads that are always removed."""

import asyncio
import contextlib
import logging
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from medmoe_hf import __version__
from medmoe_hf.errors import ArgumentError, ImageTooLargeError, MedMoEError, MissingPackageError
from medmoe_hf.inference.isolation import IsolatedReader
from medmoe_hf.inference.serving.archives import NEEDED, Limits, UploadError, hide_metadata, unpack
from medmoe_hf.inference.serving.uploads import Form, receive, upload_numbers
from medmoe_hf.inference.studies.predictions import predictions_dict
from medmoe_hf.inference.studies.predictor import Question, StudyPredictor, checked
from medmoe_hf.model.studies_medmoe import Series, Study, read_studies

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, RedirectResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise MissingPackageError(NEEDED) from error

logger = logging.getLogger(__name__)

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Addresses that only this machine reaches."""
_CLOSED = 499  # nobody reads it
_LOOK = 0.5  # seconds between two looks at whether the client is still there
_MOST = 256  # labels, and texts, of a request: each costs time, and answers have a number of each for each slice
_READING = ("plane", "window")
_FIELDS = {
    "labels": "Labels to compare, repeated or separated by commas; by default by modality.",
    "task": "Name of a task of the model, instead of labels.",
    "text": "Phrase to look for; may be repeated.",
    "trust_header": "true: the header's modality selects the expert, not the router.",
    "pooling": "How scores of slices are pooled: attention, top-k or mean.",
    "plane": "Plane of the slices of NIfTI volumes: axial, coronal or sagittal.",
    "window": "For CT and NIfTI: a name such as lung; CENTRE,WIDTH; or three names.",
}
_EMBED_FIELDS = {name: _FIELDS[name] for name in ("text", *_READING)}


class _Gone(Exception):
    """The client hung up, or the server stops."""


class _Service:
    """What the endpoints share."""

    def __init__(self, predictor: StudyPredictor, limits: Limits, reader: IsolatedReader | None) -> None:
        self.predictor, self.limits, self.reader = predictor, limits, reader
        self.lock = threading.Lock()  # the model, and the readers, whose warnings are switched off by process
        self.requests = 0
        hide_metadata()

    async def health(self) -> Any:
        """Tells whether the server answers, also while it predicts."""
        return {"status": "ok", "model": self.predictor.name, "version": __version__, "requests": self.requests}

    async def predict(self, request: Any) -> Any:
        """Predicts the studies in the uploaded files: what `prediction.json` of `medmoe predict` has.

        Send files of any number, or zip files of folders, in the field `files`. Answers hold no names and UIDs.
        Instead, `files` of each study lists the uploads that its files came from, those that were left out included,
        and `files` of each entry of `skipped` the upload that was left out: their numbers, from 0, in the order of the
        request. For files in a zip file it is the number of the zip file.
        """
        return await self._answer(request, _FIELDS, self._predict)

    async def embed(self, request: Any) -> Any:
        """Embeds the series in the uploaded files, and texts: vectors of length 1 in one space."""
        return await self._answer(request, _EMBED_FIELDS, self._embed)

    async def _answer(self, request: Any, known: dict[str, str], compute: Callable[..., dict[str, Any]]) -> Any:
        """Receives a request, computes its answer in a thread, and removes its files in any case."""
        if self.requests >= self.limits.requests:
            return _error(503, "Too many requests at a time; try again later.", {"Retry-After": "10"})
        self.requests += 1
        begun, form, folder = time.monotonic(), Form(), None
        try:
            with tempfile.TemporaryDirectory(prefix="medmoe-serve-", ignore_cleanup_errors=True) as folder:
                form = await self._receive(request, Path(folder))
                if unknown := sorted(form.fields.keys() - known.keys()):
                    raise UploadError(422, f'There is no field "{unknown[0][:40]}"; known: files, {", ".join(known)}.')
                answer = JSONResponse(await self._compute(request, form, Path(folder), compute))
        except UploadError as error:
            answer = _error(error.status, str(error))
        except MissingPackageError as error:
            answer = _error(501, str(error))
        except ImageTooLargeError as error:  # too many slices; single images that are too large are left out
            answer = _error(413, _without(str(error), folder))
        except MedMoEError as error:
            answer = _error(422, _without(str(error), folder))
        except (_Gone, ClientDisconnect):
            answer = _error(_CLOSED, "The client hung up.")
        except Exception as error:
            # Messages of parsers quote headers, so that only the places are logged.
            places = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s: %s at\n%s", request.url.path, type(error).__name__, places)
            answer = _error(500, "The server failed at this request; its log says where.")
        finally:
            self.requests -= 1
        logger.info(
            "%s: %d, %d files, %.1f MB, %.1f s",
            request.url.path,
            answer.status_code,
            len(form.files),
            form.size / 1e6,
            time.monotonic() - begun,
        )
        return answer

    async def _receive(self, request: Any, folder: Path) -> Form:
        stated = request.headers.get("content-length", "")
        if stated.isdigit() and int(stated) > self.limits.bytes:
            raise self.limits.too_large()
        upload = receive(request.stream(), request.headers.get("content-type", ""), folder, self.limits)
        try:
            return await asyncio.wait_for(upload, self.limits.seconds)
        except asyncio.TimeoutError:
            raise UploadError(408, f"The upload took longer than {self.limits.seconds} s.") from None

    async def _compute(
        self, request: Any, form: Form, folder: Path, compute: Callable[..., dict[str, Any]]
    ) -> dict[str, Any]:
        gone = threading.Event()

        async def watch() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(_LOOK)
            gone.set()

        watcher = asyncio.create_task(watch())
        work = asyncio.create_task(asyncio.to_thread(self._in_turn, form, folder, compute, gone))
        try:
            return await asyncio.shield(work)
        finally:
            watcher.cancel()
            gone.set()
            if not work.done():  # the server stops: the thread must not write into a folder that is removed
                with contextlib.suppress(Exception):
                    await work

    def _in_turn(
        self, form: Form, folder: Path, compute: Callable[..., dict[str, Any]], gone: threading.Event
    ) -> dict[str, Any]:
        def still_there() -> None:
            if gone.is_set():
                raise _Gone

        while not self.lock.acquire(timeout=_LOOK):
            still_there()
        try:
            end = time.monotonic() + self.limits.seconds

            def check() -> None:
                still_there()
                if time.monotonic() > end:
                    raise UploadError(413, f"The prediction took longer than {self.limits.seconds} s; send less.")

            unpack(form.files, self.limits, check)
            return compute(form.fields, folder, bool(form.files), check)
        finally:
            if self.reader is not None:
                self.reader.release()  # nothing of this request is there at the next one
            self.lock.release()

    def _studies(self, fields: dict[str, list[str]], folder: Path, check: Callable[[], None]) -> Sequence[Study]:
        asked: dict[str, Any] = {
            "plane": _single(fields, "plane"),
            "window": _window(fields),
            "max_slices": self.limits.files,
        }
        if self.reader is None:
            return read_studies(folder, **asked)
        return self.reader.read_studies(folder, **asked, check=check)

    def _predict(
        self, fields: dict[str, list[str]], folder: Path, files: bool, check: Callable[[], None]
    ) -> dict[str, Any]:
        question = self._question(fields)
        if not files:
            raise UploadError(422, 'There are no files: send at least one in the field "files".')
        studies = self._studies(fields, folder, check)
        predictions = self.predictor(studies, question, show_progress=False, check=check)
        answer = predictions_dict(predictions)
        left_out = list(zip(answer["skipped"], predictions.skipped, strict=True))
        for entry, study, prediction in zip(answer["studies"], studies, predictions, strict=True):
            read = [source.path for series in study.series for source in series.sources]
            entry["files"] = upload_numbers([*read, *(one.path for one in study.left_out)], folder)
            left_out += zip(entry["skipped"], prediction.skipped, strict=True)
        for entry, skipped in left_out:
            entry["files"] = upload_numbers([skipped.path], folder)
        return answer

    def _question(self, fields: dict[str, list[str]]) -> Question:
        trusted = (_single(fields, "trust_header") or "false").lower()
        if trusted not in ("true", "false"):
            raise UploadError(422, "`trust_header` is true or false.")
        task = _single(fields, "task")
        own = getattr(self.predictor.encoder.model, "tasks", None) or {}
        # Not passed on as a text: it might name a file of the server.
        if task is not None and task not in own:
            raise UploadError(422, f"The model has no such task; it has {', '.join(own) or 'none'}.")
        pooling: Any = _single(fields, "pooling")
        return Question(
            labels=_few(_listed(fields, "labels"), "labels"),
            task=None if task is None else own[task],
            text=_few([text for text in fields.get("text", []) if text.strip()], "text") or None,
            trust_header=trusted == "true",
            **({} if pooling is None else {"pooling": pooling}),
        )

    def _embed(
        self, fields: dict[str, list[str]], folder: Path, files: bool, check: Callable[[], None]
    ) -> dict[str, Any]:
        texts = _few([text for text in fields.get("text", []) if text.strip()], "text") or []
        if not files and not texts:
            raise UploadError(422, 'There is nothing to embed: send "files", "text" or both.')
        series: list[dict[str, Any]] = []
        if files:
            for number, study in enumerate(self._studies(fields, folder, check), start=1):
                for place, one in enumerate(study.series, start=1):
                    check()
                    found = self._embed_series(one, check)
                    if found is not None:
                        series.append({"study": number, "series": place, "kind": one.kind, **found})
            if not series:
                raise ArgumentError("No slice of the given files can be read.")
        encoder = self.predictor.encoder
        vectors = encoder.encode_texts(texts).tolist() if texts else []
        return {
            "model": self.predictor.name,
            "series": series,
            "texts": [{"text": text, "embedding": row} for text, row in zip(texts, vectors, strict=True)],
        }

    @torch.inference_mode()
    def _embed_series(self, series: Series, check: Callable[[], None]) -> dict[str, Any] | None:
        """Mean of the slices of a series; None if none can be read."""
        encoder = self.predictor.encoder

        def batches() -> Iterator[torch.Tensor]:
            pictures: list[torch.Tensor] = []
            for _, picture in series.slices(checked(range(len(series)), check)):
                try:
                    pictures.append(encoder.processor(images=picture, return_tensors="pt")["pixel_values"])
                except MissingPackageError:
                    raise
                except (OSError, ValueError):  # of an image that cannot be used
                    continue
                if len(pictures) == self.predictor.batch_size:
                    yield torch.cat(pictures)
                    pictures = []
            if pictures:
                yield torch.cat(pictures)

        made = batches()
        first = next(made, None)
        if first is None:
            return None

        def all_batches() -> Iterator[torch.Tensor]:
            yield first
            yield from made

        output = encoder.model.get_study_features(all_batches())
        return {
            "slices": len(output.slice_embeds),
            "modality": encoder.modalities[int(output.votes[0].argmax())],
            "embedding": output.pooler_output[0].tolist(),
        }


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Any:
    return JSONResponse({"detail": message}, status_code=status, headers=headers)


def _without(message: str, folder: str | None) -> str:
    """A message without the name of the temporary folder."""
    return message.replace(repr(folder), "the upload").replace(str(folder), "the upload")


def _single(fields: dict[str, list[str]], name: str) -> str | None:
    """The value of a field that may not be repeated; None without one, and where a form left it empty."""
    values = [value.strip() for value in fields.get(name, []) if value.strip()]
    if len(values) > 1:
        raise UploadError(422, f"`{name}` has one value.")
    return values[0] if values else None


def _listed(fields: dict[str, list[str]], name: str) -> list[str] | None:
    """The values of a field that may be repeated, or has several values separated by commas."""
    values = [value for value in fields.get(name, []) if value.strip()]
    return [part.strip() for value in values for part in value.split(",")] if values else None


def _few(values: list[str] | None, name: str) -> list[str] | None:
    if values and len(values) > _MOST:
        raise UploadError(413, f"`{name}` has {len(values)} values; {_MOST} are answered at most.")
    return values


def _window(fields: dict[str, list[str]]) -> Any:
    parts = _listed(fields, "window")
    if parts is None or len(parts) > 2:
        return parts
    if len(parts) == 1:
        return parts[0]
    try:
        return float(parts[0]), float(parts[1])
    except ValueError:
        raise UploadError(422, "`window` is a name, CENTRE,WIDTH, or three names.") from None


def _body(fields: dict[str, str], required: bool) -> dict[str, Any]:
    """The description of a request for OpenAPI: it is read by `receive`, of which FastAPI knows nothing."""
    files = {
        "type": "array",
        "items": {"type": "string", "format": "binary"},
        "description": "DICOM, NIfTI and pictures, or zip files of folders with them.",
    }
    texts: dict[str, Any] = {name: {"type": "string", "description": told} for name, told in fields.items()}
    texts["text"] = {"type": "array", "items": {"type": "string"}, "description": fields["text"]}
    schema = {"type": "object", "properties": {"files": files, **texts}, "required": ["files"] if required else []}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"description": "Malformed body."},
    408: {"description": "The upload took too long."},
    413: {"description": "Too large, too many files or slices, or a prediction that took too long."},
    415: {"description": "The body is not multipart/form-data."},
    422: {"description": "A field or file that cannot be used; `detail` says why."},
    501: {"description": "The server lacks the package that reads the format."},
    503: {"description": "Too many requests at a time."},
}


def create_app(
    predictor: StudyPredictor,
    limits: Limits | None = None,
    hosts: Sequence[str] = LOCAL,
    reader: IsolatedReader | None = None,
) -> Any:
    """Makes the service: `/predict`, `/embed`, `/health`, and its description at `/docs` and `/openapi.json`.

    `/` leads to `/docs`.

    Args:
        predictor: The model.
        limits: What a request may cost.
        hosts: Names that clients may call the server by; others are refused, so that web pages that a user visits
            cannot reach it by a name of their own. `["*"]` allows all.
        reader: What decodes files in processes of their own; None to decode them in this one.

    Returns:
        A FastAPI application.

    Example:
        ```python
        import uvicorn
        from medmoe_hf.inference.isolation import IsolatedReader
        from medmoe_hf.inference.serving import Limits, create_app
        from medmoe_hf.inference.studies import StudyPredictor

        with IsolatedReader() as reader:
            app = create_app(StudyPredictor("small"), Limits(megabytes=200), reader=reader)
            uvicorn.run(app, access_log=False)
        ```
    """
    service = _Service(predictor, limits or Limits(), reader)
    app = FastAPI(
        title="MedMoE",
        version=__version__,
        description="Predictions for whole studies. Research software, not a medical device.",
    )
    allowed = [f"[{host}]" if ":" in host else host for host in hosts]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=allowed)

    async def predict(request: Request) -> Any:
        return await service.predict(request)

    async def embed(request: Request) -> Any:
        return await service.embed(request)

    async def home() -> Any:
        return RedirectResponse("/docs")

    app.add_api_route("/", home, methods=["GET"], include_in_schema=False)
    app.add_api_route("/health", service.health, methods=["GET"], summary="State")
    for path, endpoint, told, fields in (
        ("/predict", predict, service.predict, _FIELDS),
        ("/embed", embed, service.embed, _EMBED_FIELDS),
    ):
        app.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            summary=path[1:].capitalize(),
            description="\n".join(line.strip() for line in (told.__doc__ or "").splitlines()),
            responses=_RESPONSES,
            openapi_extra=_body(fields, required=path == "/predict"),
        )
    return app


def serve(
    predictor: StudyPredictor,
    host: str = LOCAL[0],
    port: int = 8000,
    limits: Limits | None = None,
    reader: IsolatedReader | None = None,
) -> None:
    """Serves a model until it is interrupted. Log messages hold no addresses, names of files or contents.

    Args:
        predictor: The model.
        host: Address to listen on. Whoever reaches it may use the server: there are no passwords.
        port: Port to listen on.
        limits: What a request may cost.
        reader: As for `create_app`.
    """
    if host not in LOCAL:
        logger.warning("Whoever reaches %s may use the server: there is neither a password nor encryption.", host)
    warnings.simplefilter("ignore")  # readers of files quote headers in their warnings
    logger.info("http://%s:%d/docs describes the service; Ctrl-C ends it.", f"[{host}]" if ":" in host else host, port)
    app = create_app(predictor, limits, LOCAL if host in LOCAL else ["*"], reader)
    uvicorn.run(app, host=host, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=10)
