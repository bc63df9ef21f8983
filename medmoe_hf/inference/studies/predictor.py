"""Predictions for whole studies: one pass over the slices, in batches, with memory that does not grow with them.

Shapes: N slices, C labels, K experts, D the width of the shared space.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medmoe_hf.common.console import progress as progress_bar
from medmoe_hf.errors import ArgumentError, EncoderError, MissingPackageError
from medmoe_hf.inference.batching import unit_length
from medmoe_hf.inference.encoders import MedMoEEncoder, load_encoder
from medmoe_hf.inference.studies.grouping import study_labels
from medmoe_hf.inference.studies.misspelt import spelling_notes
from medmoe_hf.inference.studies.pictures import UNREADABLE, SeriesPictures
from medmoe_hf.inference.studies.pooling import POOLINGS, Pooling, key_slices, pool_slices, route_series
from medmoe_hf.inference.studies.predictions import (
    LabelPrediction,
    SeriesPrediction,
    SkippedFile,
    StudyPrediction,
    StudyPredictions,
    TextPrediction,
)
from medmoe_hf.inference.studies.tasks import (
    as_task,
    decided,
    default_labels,
    default_task,
    probabilities,
    task_of_labels,
)
from medmoe_hf.inference.texts import class_embeddings, flatten_prompts
from medmoe_hf.model import Task
from medmoe_hf.model.modalities_medmoe import UNKNOWN_MODALITY, modality_id
from medmoe_hf.model.studies_medmoe import Series, Study
from medmoe_hf.model.study_files_medmoe import Skipped
from medmoe_hf.model.tasks_medmoe import EncodedTask, encode_task, suits

BATCH_SIZE = 16


@dataclass(frozen=True)
class Question:
    """What all series are asked; see `predict`.

    Args:
        labels: Names of labels; None for those of the modality.
        task: A task, labels with sentences, a file of them, or the name of a task of the model; instead of `labels`.
        text: A phrase, or several, to be located.
        trust_header: Whether the modality in a header selects the expert.
        pooling: How scores of slices are pooled.

    Raises:
        ArgumentError: For labels and a task at once, or any of them that cannot be used.
    """

    labels: Sequence[str] | None = None
    task: Any = None
    text: str | Sequence[str] | None = None
    trust_header: bool = False
    pooling: Pooling = POOLINGS[0]

    def __post_init__(self) -> None:
        if self.labels is not None and self.task is not None:
            raise ArgumentError("Pass either `labels` or `task`, not both.")
        if self.pooling not in POOLINGS:
            raise ArgumentError(f'There is no pooling "{self.pooling}"; known: {", ".join(POOLINGS)}.')
        object.__setattr__(self, "task", as_task(self.task))
        if self.labels is not None:
            task_of_labels(self.labels, "")
        if any(not text.strip() for text in self.texts):
            raise ArgumentError("`text` is empty; write the phrase to look for.")

    @property
    def texts(self) -> list[str]:
        """The phrases, without repetitions."""
        listed = [] if self.text is None else [self.text] if isinstance(self.text, str) else list(self.text)
        return list(dict.fromkeys(listed))

    def task_for(self, modality: str) -> Task | None:
        """Returns the labels for a series of a modality; None if there are none."""
        if self.task is not None:
            task: Task = self.task
            return task
        return default_task(modality) if self.labels is None else task_of_labels(self.labels, modality)


@dataclass
class _Votes:
    """The router's log-probabilities of a series, slice by slice, and the expert that they select so far.

    `ood_scores` (N,) are those of a model with a rejector, NaN where not read yet.
    """

    log_probabilities: np.ndarray  # (N, K), NaN where not read yet
    header: int | None
    trusted: bool
    read_by: np.ndarray = field(init=False)  # (N,) expert that a slice was read with
    ood_scores: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.read_by = np.full(len(self.log_probabilities), -1)

    def probabilities(self) -> np.ndarray:
        return route_series(self.log_probabilities, self.header)

    def expert(self) -> int:
        if self.trusted and self.header is not None:
            return self.header
        return int(self.probabilities().argmax())


@dataclass
class _Encoded:
    """What the slices of a series are scored by; NaN where not read yet."""

    embeds: Tensor  # (N, D)
    local: Tensor | None  # (N, K) mean similarity of a class's sentences to the regions; None if not asked for


class StudyPredictor:
    """A loaded model that reads whole studies.

    Args:
        model: `small`, the checkpoint of the package; the folder or Hub id of a MedMoE; or an
            encoder that is already loaded.
        batch_size: Slices per batch.
        device: Device to run on; None selects a GPU if there is one.

    Attributes:
        encoder: The model and its processor.
        name: Name of the model in outputs, without its folder.

    Raises:
        EncoderError: If there is no such model, or it is not a MedMoE dual encoder.

    Example:
        ```python
        predictor = StudyPredictor("small")
        question = Question(labels=["no finding", "pneumonia"])
        for folder in ["exports/one", "exports/two"]:
            (study,) = predictor(read_studies([folder]), question)
        ```
    """

    def __init__(
        self, model: str | Path | MedMoEEncoder = "small", *, batch_size: int = BATCH_SIZE, device: str | None = None
    ) -> None:
        if batch_size < 1:
            raise ArgumentError(f"`batch_size` must be at least 1, got {batch_size}.")
        encoder = model if isinstance(model, MedMoEEncoder) else load_encoder(model, batch_size, device)
        if not isinstance(encoder, MedMoEEncoder):
            raise EncoderError(f"{model} is not a MedMoE: studies need its router and its heat-maps.")
        self.encoder, self.batch_size = encoder, batch_size
        # The last part of a folder only: what precedes it may name a person.
        local = Path(encoder.model.name_or_path).exists()
        self.name = Path(encoder.name).name if local else encoder.name
        self._vision = encoder.model.vision_model
        self._text_embeds: dict[tuple[str, ...], Tensor] = {}

    def __call__(
        self,
        studies: Sequence[Study],
        question: Question | None = None,
        *,
        show_progress: bool = True,
        check: Callable[[], None] | None = None,
    ) -> StudyPredictions:
        """Predicts studies that `read_studies` found.

        Args:
            studies: The studies; their slices are decoded one at a time.
            question: What they are asked.
            show_progress: Whether to show a progress bar.
            check: Called before each slice; an exception that it raises ends the prediction, after a time limit for
                example. It must not be one of those that slices raise: `MedMoEError`, `OSError`, `ValueError`.

        Returns:
            A prediction per study.

        Raises:
            ArgumentError: If no slice of any study can be read; the message says why.
        """
        question = self._known_task(question or Question())
        total = sum(len(series) for study in studies for series in study.series)
        found = []
        with progress_bar(None, "slices", unit="slice", total=total, disable=not show_progress) as bar:
            for number, study in enumerate(studies, start=1):
                skipped: list[SkippedFile] = []
                series: list[SeriesPrediction] = []
                for one in study.series:
                    predicted = self._predict_series(len(series) + 1, one, question, skipped, bar, check)
                    if predicted is not None:
                        series.append(predicted)
                listed = [_left_out(one) for one in study.left_out]
                # The reader lists the slices that it could not decode, once it has tried.
                listed += [_left_out(one, _number(one, many)) for many in study.series for one in many.skipped]
                found.append(
                    StudyPrediction(number, series, study_labels(series), listed + skipped, self.name, str(study.uid))
                )
        if not any(study.series for study in found):
            reasons = dict.fromkeys(skipped.reason for study in found for skipped in study.skipped)
            told = f" Left out: {'; '.join(list(reasons)[:5])}." if reasons else ""
            raise ArgumentError(f"There is no picture to predict in the given files.{told}")
        return StudyPredictions(found, [_left_out(one) for one in getattr(studies, "skipped", ())])

    def _known_task(self, question: Question) -> Question:
        """Replaces the name of a task that the model brings along by that task."""
        if not isinstance(question.task, str):
            return question
        own = self._own_tasks()
        if question.task not in own:
            known = f"it has {', '.join(own)}" if own else "it has none"
            raise ArgumentError(
                f'There is no file "{question.task}", and the model has no task of this name: {known}.'
            )
        return replace(question, task=own[question.task])

    def _own_tasks(self) -> dict[str, Task]:
        return getattr(self.encoder.model, "tasks", None) or {}

    def _spelling_notes(self, question: Question) -> list[str]:
        known = [label for task in self._own_tasks().values() for label in task.prompts]
        return spelling_notes(question.labels or (), [*known, *default_labels()])

    def _predict_series(
        self,
        number: int,
        series: Series,
        question: Question,
        skipped: list[SkippedFile],
        bar: Any,
        check: Callable[[], None] | None,
    ) -> SeriesPrediction | None:
        header = self._expert_of(series.header_modality)
        votes = _Votes(
            np.full((len(series), len(self.encoder.modalities)), np.nan), header, trusted=question.trust_header
        )
        encoded = self._encoded(question.task)
        read_slices = self._unread(series, encoded)
        for indices, pixels in self._batches(series, range(len(series)), skipped, bar, check):
            self._encode(pixels, indices, votes, read_slices, encoded)
        read = ~np.isnan(votes.log_probabilities).any(axis=1)
        if not read.any():
            return None
        expert = votes.expert()
        # Few or none: the expert that leads after the first batch nearly always stays. One that cannot be read again
        # keeps its embedding.
        needed = self._needs_expert or self._local_needs_expert(encoded)
        again = np.flatnonzero(read & (votes.read_by != expert)).tolist() if needed else []
        for indices, pixels in self._batches(series, again, skipped, None, check):
            self._encode(pixels, indices, votes, read_slices, encoded, expert)
        return self._answer(number, series, question, votes, expert, read_slices)

    def _answer(
        self,
        number: int,
        series: Series,
        question: Question,
        votes: _Votes,
        expert: int,
        read_slices: _Encoded,
    ) -> SeriesPrediction:
        modality = self.encoder.modalities[expert]
        task = question.task_for(modality)
        embeds = read_slices.embeds
        foreign = not suits(task, modality)
        labels = [] if task is None else self._labels(task, read_slices, question.pooling, decides=not foreign)
        texts = []
        for text in question.texts:
            cosines = (embeds @ self._texts((text,))[0]).numpy().astype(np.float64)
            # Pooled on the scale of labels: attention would hardly distinguish cosines.
            scale = float(self.encoder.logit_scale)
            pooled = float(pool_slices(scale * cosines[:, None], question.pooling)[0]) / scale
            texts.append(TextPrediction(text, pooled, key_slices(cosines), cosines))
        shown = SeriesPictures(self.encoder, series, modality, task, self.batch_size)
        asked: list[LabelPrediction | TextPrediction] = [*labels, *texts]
        keys = sorted({index for one in asked for index in one.key_slices})
        return SeriesPrediction(
            number=number,
            kind=series.kind,
            count=len(series),
            spacing=_floats(series.spacing),
            positions=_floats(series.positions),
            header_modality=series.header_modality,
            expert=modality,
            expert_reason=self._reason(votes, expert, series.header_modality),
            routing=dict(zip(self.encoder.modalities, votes.probabilities().tolist(), strict=True)),
            pooling=question.pooling,
            labels=labels,
            texts=texts,
            uid=str(series.uid),
            sources={index: _source(series.source(index)) for index in keys},
            notes=[*self._spelling_notes(question), *series.notes],
            foreign_task=foreign,
            affine=None if series.affine is None else np.asarray(series.affine, dtype=np.float64),
            slots=None if series.slots is None else [int(slot) for slot in series.slots],
            task=task,
            picture=shown.picture,
            heatmaps=shown.heatmaps,
            ask=lambda other: self._ask(number, series, other, votes, expert, embeds),
            ood_scores=votes.ood_scores,
        )

    def _ask(
        self, number: int, series: Series, question: Question, votes: _Votes, expert: int, embeds: Tensor
    ) -> SeriesPrediction:
        """Answers another question on slices that were read, and reads them again if it is on their regions."""
        question = self._known_task(question)
        encoded = self._encoded(question.task)
        read_slices = _Encoded(embeds, None)
        if encoded is not None:
            read_slices = self._unread(series, encoded)
            read = np.flatnonzero(~np.isnan(votes.log_probabilities).any(axis=1)).tolist()
            for indices, pixels in self._batches(series, read, [], None, None):
                self._encode(pixels, indices, votes, read_slices, encoded, expert)
        return self._answer(number, series, question, votes, expert, read_slices)

    def _unread(self, series: Series, encoded: EncodedTask | None) -> _Encoded:
        return _Encoded(
            torch.full((len(series), self._width()), torch.nan),
            None if encoded is None else torch.full((len(series), encoded.members.shape[1]), torch.nan),
        )

    def _labels(self, task: Task, read_slices: _Encoded, pooling: Pooling, decides: bool) -> list[LabelPrediction]:
        logits = self._logits(task.prompts, read_slices.embeds)
        if task.negative_prompts:
            logits = logits - self._logits(task.negative_prompts, read_slices.embeds)
        if read_slices.local is not None:
            local, count = read_slices.local.numpy().astype(np.float64), len(task.prompts)
            local = local[:, :count] - local[:, count:] if task.negative_prompts else local
            logits = local if task.score == "local" else (logits + local) / 2
        pooled = pool_slices(logits, pooling)
        by_slice, of_series = probabilities(task, logits), probabilities(task, pooled[None])[0]
        decisions = decided(task, pooled) if decides and len(logits) == 1 else {}
        found = [
            LabelPrediction(
                label,
                float(of_series[column]),
                float(pooled[column]),
                key_slices(by_slice[:, column]),
                logits[:, column],
                by_slice[:, column],
                *decisions.get(label, (None, None)),
            )
            for column, label in enumerate(task.prompts)
        ]
        return sorted(found, key=lambda label: -label.probability)

    def _logits(self, prompts: Any, embeds: Tensor) -> np.ndarray:
        sentences, class_ids = flatten_prompts(prompts)
        classes = class_embeddings(self._texts(tuple(sentences)), class_ids)
        return (self.encoder.logit_scale * embeds @ classes).numpy().astype(np.float64)

    def _texts(self, sentences: tuple[str, ...]) -> Tensor:
        if sentences not in self._text_embeds:
            if len(self._text_embeds) >= 64:  # a server is asked for ever new texts
                self._text_embeds.clear()
            self._text_embeds[sentences] = self.encoder.encode_texts(sentences)
        return self._text_embeds[sentences]

    def _batches(
        self,
        series: Series,
        indices: Sequence[int],
        skipped: list[SkippedFile],
        bar: Any,
        check: Callable[[], None] | None,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Decodes slices and yields them by batch; the series lists those that cannot be decoded."""
        pictures: list[Any] = []
        known: list[int] = []
        done = 0
        for index, picture in series.slices(checked(indices, check)):
            if bar is not None:
                bar.update(index + 1 - done)
                done = index + 1
            try:
                pictures.append(self.encoder.processor(images=picture, return_tensors="pt")["pixel_values"])
                known.append(index)
            except MissingPackageError:
                raise
            except UNREADABLE as error:
                path = series.source(index).path
                skipped.append(SkippedFile(path, f"slice {index + 1} cannot be used: {plain_reason(error, path)}"))
            if len(known) == self.batch_size:
                yield known, torch.cat(pictures)
                pictures, known = [], []
        if bar is not None:
            bar.update(len(indices) - done)
        if known:
            yield known, torch.cat(pictures)

    @torch.inference_mode()
    def _encode(
        self,
        pixels: Tensor,
        indices: list[int],
        votes: _Votes,
        read_slices: _Encoded,
        encoded: EncodedTask | None,
        expert: int | None = None,
    ) -> None:
        """Adds the votes of slices, and their embeddings and scores by an expert; by default the leading one."""
        vision, model = self._vision, self.encoder.model
        backbone = vision.encode(pixels.to(self.encoder.device))
        logits = vision.router(backbone.pooler_output)
        votes.log_probabilities[indices] = logits.float().log_softmax(dim=-1).cpu().numpy()
        # A checkpoint brings its own code, which may be older than rejectors.
        rejects = getattr(self.encoder.model, "ood_scores", None)
        scores = None if rejects is None else rejects(backbone, logits)
        if scores is not None:
            if votes.ood_scores is None:
                votes.ood_scores = np.full(len(votes.log_probabilities), np.nan)
            votes.ood_scores[indices] = scores.float().cpu().numpy()
        expert = votes.expert() if expert is None else expert
        votes.read_by[indices] = expert
        mixes = vision.config.mixture == "soft" and not (votes.trusted and votes.header is not None)
        modality = None if mixes else expert
        if encoded is None or read_slices.local is None:
            pooled = vision.pooled_features(backbone, modality=modality)
        else:
            mixture = vision.mixture_weights(logits, modality)
            regions, _ = vision.fuse(backbone.feature_maps, vision.select_experts(logits, modality), mixture)
            pooled = vision.global_embeds(backbone, regions)
            if model.local_projection is not None:
                regions = model.local_projection(regions.movedim(1, -1)).movedim(-1, 1)
            scores = model.similarity(pooled, regions, encoded.text, "local").float() @ encoded.members
            read_slices.local[indices] = scores.cpu()
        projection = model.visual_projection
        read_slices.embeds[indices] = unit_length(pooled if projection is None else projection(pooled)).cpu()

    def _encoded(self, task: Any) -> EncodedTask | None:
        """The sentences of a task whose score needs regions; None for the others."""
        if not isinstance(task, Task) or task.score == "global":
            return None
        if any(sentence not in task.tokens for sentence in task.sentences):
            task = self.encoder.processor.tokenize_task(task)
        with torch.inference_mode():
            return encode_task(self.encoder.model, task)

    def _local_needs_expert(self, encoded: EncodedTask | None) -> bool:
        config = self._vision.config
        return encoded is not None and config.mixture != "soft" and not config.shared_expert

    @property
    def _needs_expert(self) -> bool:
        """Whether embeddings depend on the expert that the series is sent to."""
        config = self._vision.config
        return bool(config.global_features != "backbone" and config.mixture != "soft")

    def _width(self) -> int:
        projection = self.encoder.model.visual_projection
        return int(self._vision.feature_size() if projection is None else projection.out_features)

    def _expert_of(self, modality: str | None) -> int | None:
        if modality is None:
            return None
        try:
            known = modality_id(modality, self.encoder.modalities)
        except ArgumentError:  # no expert for it
            return None
        return None if known == UNKNOWN_MODALITY else known

    def _reason(self, votes: _Votes, expert: int, header: str | None) -> str:
        """Says which of router and header decided."""
        names = self.encoder.modalities
        alone = route_series(votes.log_probabilities, None)
        voted = int(alone.argmax())
        slices = int((~np.isnan(votes.log_probabilities).any(axis=1)).sum())
        router = (
            f"{'the slice' if slices == 1 else f'the {slices} slices'} voted for {names[voted]} ({alone[voted]:.0%})"
        )
        if votes.header is None:
            none = "states no modality" if header is None else f"states {header}, for which there is no expert"
            return f"By the router: {router}. The header {none}."
        if votes.trusted:
            return f"By the header, which is trusted: it states {header}. The router was not asked; {router}."
        if expert == voted == votes.header:
            return f"Router and header agree: {router}."
        if expert == votes.header:
            return f"By the header, which states {header}; {router}, not clearly enough to overrule it."
        return f"By the router: {router}, clearly enough to overrule the header, which states {header}."


def checked(indices: Iterable[int], check: Callable[[], None] | None) -> Iterator[int]:
    """Calls a function before each slice is decoded, also before those that cannot be."""
    for index in indices:
        if check is not None:
            check()
        yield index


def plain_reason(reason: object, path: str | Path) -> str:
    """Removes a file's path and name from the reason why it cannot be used: both may name a person.

    Args:
        reason: An exception or text.
        path: The file.

    Returns:
        One line, of 300 characters at most.

    Example:
        >>> plain_reason("DOE^JOHN.dcm is damaged", "/exports/DOE^JOHN.dcm")
        'the file is damaged'
        >>> plain_reason("cannot read the image one.png: cut off", "one.png")
        'cannot read the image: cut off'
    """
    text = " ".join(str(reason).split()).removeprefix("image 0 of the batch: ")
    names = [str(path), Path(path).name, *(part for part in Path(path).parts[:-1] if len(part) > 2)]
    for name in sorted(filter(None, names), key=len, reverse=True):
        text = text.replace(name, "the file")
    return text.replace("the image the file", "the image")[:300]


def _left_out(one: Skipped, number: int | None = None) -> SkippedFile:
    reason = plain_reason(one.reason, one.path)
    return SkippedFile(one.path, reason if number is None else f"slice {number} cannot be read: {reason}")


def _number(one: Skipped, series: Series) -> int:
    """The number, from 1, of a slice that could not be decoded."""
    places = ((source.path, source.frame) for source in series.sources)
    return next((number for number, place in enumerate(places, 1) if place == (one.path, one.frame)), 1)


def _floats(values: Any) -> list[float] | None:
    return None if values is None else [float(value) for value in np.asarray(values).ravel()]


def _source(source: Any) -> dict[str, Any]:
    return {"file": source.path, "frame": source.frame, "sop_instance_uid": source.sop_instance_uid}
