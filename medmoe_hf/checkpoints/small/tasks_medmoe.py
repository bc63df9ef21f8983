"""Tasks: classes with the sentences that describe them, and what turns similarities into probabilities and decisions.

A model keeps its tasks in `model.tasks`, and its folder keeps them in `tasks.json`:

    {"schema": 1, "tasks": {NAME: {the fields of `Task`, and of its `Calibration` below "calibration"}}}

The sentences are stored with their tokens, so that a model classifies without a tokenizer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_medmoe import attach_to_package
from .errors_medmoe import ArgumentError
from .losses_medmoe import cosine_logits
from .modalities_medmoe import UNKNOWN_MODALITY, modality_id
from .saving_medmoe import file_beside_weights

TASKS_FILE = "tasks.json"
SCHEMA = 1
KINDS = ("multi-class", "multi-label")
TASK_SCORES = ("global", "local", "mean")
TOKEN_FIELDS = ("input_ids", "word_ids", "token_type_ids")


@dataclass(frozen=True)
class Calibration:
    """What was fitted on labelled images: how scores become probabilities, and probabilities decisions.

    Args:
        temperature: Scores are divided by it, above 0.
        bias: Class -> number that is added to the divided score.
        thresholds: Class -> probability of 0..1 from which the class counts as present.
        quantiles: Class -> the largest `1 - probability` with which the class is in a prediction set.
        coverage: Share of images whose prediction set holds the right class, 0..1.
        conformal: `"class-conditional"` if each class has a quantile of its own, so that the coverage is that of each
            class; `"marginal"` if it is that of all images together.
        prior: Class -> share of the images that the calibration was fitted on, 0..1.
        prevalence: Class -> share where the model is used, which probabilities are corrected for; empty for `prior`.
        fitted_on: What the calibration was fitted on: `data`, `split`, `cases`, `subjects`, `cases_by_class`, `date`.
        measured: Name -> value and the ends of its 95 % interval, by cross-validation over subjects.
    """

    temperature: float
    bias: Mapping[str, float]
    thresholds: Mapping[str, float]
    quantiles: Mapping[str, float]
    coverage: float
    conformal: str
    prior: Mapping[str, float]
    prevalence: Mapping[str, float] = field(default_factory=dict)
    fitted_on: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Classes and the sentences that describe them.

    Args:
        name: Name by which the task is chosen.
        prompts: Class -> one or more sentences that describe it.
        negative_prompts: Class -> sentences that describe its absence (multi-label only); empty without.
        kind: `"multi-class"` (each image has one class; the probabilities sum to 1) or `"multi-label"` (each class has
            a probability of its own).
        score: The similarity: `"global"`, `"local"` or their `"mean"`.
        modality: Name of the modality of the images; None if they may have any.
        title: What the task is, in words.
        tokens: Sentence -> its `input_ids`, `word_ids` and, for tokenizers that have them, `token_type_ids`; as
            `MedMoEProcessor.tokenize_task` fills them in.
        calibration: None as long as nothing was fitted.

    Raises:
        ValueError: If a class has no sentences, or values do not fit together.

    Example:
        >>> import torch
        >>> from medmoe_hf.model.tasks_medmoe import Task
        >>> task = Task("chest", {"normal": ["Clear lungs."], "effusion": ["A pleural effusion."]})
        >>> task.probabilities(torch.tensor([[1.0, 1.0]])).tolist()
        [[0.5, 0.5]]
    """

    name: str
    prompts: Mapping[str, Sequence[str]]
    negative_prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    kind: str = "multi-class"
    score: str = "global"
    modality: str | None = None
    title: str = ""
    tokens: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise ArgumentError(f"A task needs a name, got {self.name!r}.")
        for table in (self.prompts, self.negative_prompts):
            if not isinstance(table, Mapping):
                raise self._error("`prompts` must be classes with lists of sentences")
            for name, sentences in table.items():
                listed = isinstance(sentences, Sequence) and not isinstance(sentences, str) and len(sentences)
                if not listed or not all(isinstance(one, str) and one.strip() for one in sentences):
                    raise self._error(f'the class "{name}" needs a list of sentences, none of them empty')
        for key, value, known in (("kind", self.kind, KINDS), ("score", self.score, TASK_SCORES)):
            if value not in known:
                raise self._error(f"`{key}` must be one of {', '.join(known)}, got {value!r}")
        multi_label = self.kind == "multi-label"
        if len(self.prompts) < (1 if multi_label else 2):
            raise self._error(f"a {self.kind} task needs {'one class' if multi_label else 'two classes'} or more")
        if self.negative_prompts and (not multi_label or list(self.negative_prompts) != list(self.prompts)):
            raise self._error("`negative_prompts` are for multi-label tasks, with the classes of `prompts` in order")
        for key, text in (("title", self.title), ("modality", self.modality or "")):
            if not isinstance(text, str):
                raise self._error(f"`{key}` must be text, got {text!r}")
        self._check_tokens()
        if self.calibration is not None:
            self._check_calibration(self.calibration)

    def _check_tokens(self) -> None:
        rows = list(self.tokens.values()) if isinstance(self.tokens, Mapping) else [None]
        for row in rows:
            if not isinstance(row, Mapping) or "input_ids" not in row or not set(row) <= set(TOKEN_FIELDS):
                raise self._error("`tokens` must be sentences with `input_ids` and the other outputs of a tokenizer")
            lists = [list(numbers) if isinstance(numbers, Sequence) else [None] for numbers in row.values()]
            if not all(isinstance(one, int) and abs(one) < 2**31 for numbers in lists for one in numbers):
                raise self._error("`tokens` must be lists of whole numbers")
            if len({len(numbers) for numbers in lists}) > 1 or set(row) != set(rows[0]):
                raise self._error("`tokens` must be equally long lists, the same ones for each sentence")

    def _error(self, problem: str) -> ArgumentError:
        return ArgumentError(f'Task "{self.name}": {problem}.')

    def _check_calibration(self, found: Calibration) -> None:
        for key in ("bias", "thresholds", "quantiles", "prior", "prevalence", "fitted_on", "measured"):
            if not isinstance(getattr(found, key), Mapping):
                raise self._error(f"`calibration.{key}` must be a mapping, got {getattr(found, key)!r}")
        for key in ("bias", "thresholds", "quantiles", "prior", *(("prevalence",) if found.prevalence else ())):
            if set(getattr(found, key)) != set(self.prompts):
                raise self._error(f"`calibration.{key}` must have a number for each class and no other")
            if not all(map(_is_finite, getattr(found, key).values())):
                raise self._error(f"`calibration.{key}` must be finite numbers")
        if not _is_finite(found.coverage) or not isinstance(found.conformal, str):
            raise self._error("`calibration.coverage` must be a number, and `calibration.conformal` text")
        if not all(isinstance(ends, Sequence) and all(map(_is_finite, ends)) for ends in found.measured.values()):
            raise self._error("`calibration.measured` must be lists of finite numbers")
        if not (_is_finite(found.temperature) and found.temperature > 1e-12):
            raise self._error(f"`calibration.temperature` must be above 0, got {found.temperature}")
        for key in ("thresholds", "prior", *(("prevalence",) if found.prevalence else ())):
            if not all(0 < value < 1 for value in getattr(found, key).values()):
                raise self._error(f"`calibration.{key}` must lie between 0 and 1")

    @property
    def classes(self) -> list[str]:
        """Names of the C classes, in order."""
        return list(self.prompts)

    @property
    def sentences(self) -> list[str]:
        """All sentences, without repetitions: those of the classes, then those of their absence."""
        tables = (self.prompts, self.negative_prompts)
        return list(dict.fromkeys(one for table in tables for sentences in table.values() for one in sentences))

    def uncalibrated(self) -> "Task":
        """Returns the task without its calibration, which only fits the weights that it was fitted to."""
        return replace(self, calibration=None)

    def probabilities(self, scores: Tensor, prevalence: Mapping[str, float] | None = None) -> Tensor:
        """Converts scores to probabilities.

        Args:
            scores: (B, C) similarities, see `task_scores`.
            prevalence: Class -> share where the model is used, for all classes of the task; None for that of the
                calibration.

        Returns:
            (B, C) float32, or float64 for such scores: a softmax over the classes of a multi-class task (rows sum to
            1), a sigmoid for each class of a multi-label task. Without a calibration they are those of the model's
            own scale.

        Raises:
            ValueError: For a prevalence without a calibration, of other classes, or outside of 0..1.
        """
        wanted = prevalence if prevalence is not None else (self.calibration and self.calibration.prevalence) or {}
        return _with_prior(self, self._logits(scores), wanted)

    def _logits(self, scores: Tensor) -> Tensor:
        scores = scores if scores.dtype == torch.float64 else scores.float()
        if self.calibration is None:
            return scores
        return scores / self.calibration.temperature + _row(self, self.calibration.bias, scores)

    def decide(self, scores: Tensor) -> tuple[list[list[str]], list[list[str]] | None]:
        """Selects classes by thresholds, and prediction sets.

        Both follow the probabilities before a correction for prevalence: neither a threshold's sensitivity nor the
        coverage of a class depends on how frequent the class is.

        Args:
            scores: (B, C) similarities.

        Returns:
            For each image the labels: the classes of a multi-label task whose probability reaches the threshold; the
            one class of a multi-class task whose probability is largest relative to its threshold. And for each image
            the classes in its prediction set, which may be empty; for a multi-label task, the classes that cannot be
            ruled out. Without a calibration thresholds are equal, and there are no sets.
        """
        probabilities = _with_prior(self, self._logits(scores), {})
        found = self.calibration
        limits = torch.full_like(probabilities[:1], 0.5) if found is None else _row(self, found.thresholds, scores)
        if self.kind == "multi-label":
            chosen = probabilities >= limits
        else:
            chosen = nn.functional.one_hot((probabilities / limits).argmax(dim=1), len(self.prompts)).bool()
        labels = self._names(chosen)
        if found is None:
            return labels, None
        return labels, self._names(1 - probabilities <= _row(self, found.quantiles, scores))

    def _names(self, chosen: Tensor) -> list[list[str]]:
        return [[name for name, one in zip(self.classes, row, strict=True) if one] for row in chosen.tolist()]

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry of `tasks.json`, without fields that have their default."""
        entry = asdict(self)
        entry.pop("name")
        defaults: dict[str, Any] = {"negative_prompts": {}, "modality": None, "title": "", "tokens": {}}
        kept = {key: value for key, value in entry.items() if key not in defaults or value != defaults[key]}
        return {key: value for key, value in kept.items() if value is not None}

    @classmethod
    def from_dict(cls, name: str, content: Any) -> "Task":
        """Reads an entry of `tasks.json`.

        Args:
            name: Name of the task.
            content: The entry.

        Returns:
            The task.

        Raises:
            ValueError: For unknown or missing keys, and as the class.
        """
        where = f'Task "{name}"'
        entry = _known(content, cls, where, without=("name",))
        if entry.get("calibration") is not None:
            below = f"{where}, calibration"
            entry["calibration"] = _built(Calibration, _known(entry["calibration"], Calibration, below), below)
        return _built(cls, {"name": name, **entry}, where)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TaskAnswer:
    """The answer of a model to a task, for B images and C classes.

    Args:
        task: Name of the task.
        classes: C names, in the order of the columns.
        scores: (B, C) similarities.
        probabilities: (B, C). They mean nothing for an image whose `fits` is False.
        labels: For each image the chosen classes (one, in a multi-class task), see `Task.decide`; None if it is of
            another modality than the task.
        sets: For each image the classes of its prediction set, or None as in `labels`; None without a calibration.
        calibrated: Whether the probabilities were fitted on labelled images.
        modality: For each image the name of the modality that it was read as: the caller's, or else the choice of the
            image router.
        fits: For each image whether this is the modality that the task is for; True for a task of any modality.
    """

    task: str
    classes: list[str]
    scores: Tensor
    probabilities: Tensor
    labels: list[list[str] | None]
    sets: list[list[str] | None] | None
    calibrated: bool
    modality: list[str]
    fits: list[bool]

    @property
    def warning(self) -> str:
        """What `fits` means for a reader, as a sentence; empty if the task suits all images."""
        return misfit_warning(
            self.task, [name for name, fits in zip(self.modality, self.fits, strict=True) if not fits]
        )


def suits(task: Task | None, modality: str) -> bool:
    """Returns whether a task is for images of a modality.

    Args:
        task: A task; one that states no modality is for all.
        modality: Name of the modality that the images are read as.
    """
    if task is None or not task.modality:
        return True
    try:
        return modality_id(task.modality, [modality]) != UNKNOWN_MODALITY
    except ArgumentError:
        return False


def misfit_warning(task: str, modalities: Sequence[str]) -> str:
    """Returns a sentence on images that are of another modality than a task; empty for none.

    Args:
        task: Name of the task.
        modalities: What each of these images was read as.
    """
    if not modalities:
        return ""
    count = len(modalities)
    return (
        f'The task "{task}" is for another modality than {count} image{"s" * (count > 1)}, read as '
        f"{', '.join(dict.fromkeys(modalities))}: unless that is wrong, the probabilities mean nothing, and nothing "
        "is decided."
    )


def _is_finite(value: Any) -> bool:
    """Whether a value is a number of a size that float32 can be computed with."""
    number: Any = value
    return isinstance(value, Real) and not isinstance(value, bool) and bool(-1e18 < number < 1e18)


def _row(task: Task, values: Mapping[str, float], like: Tensor) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.tensor([[values[name] for name in task.classes]], dtype=dtype, device=like.device)


def _with_prior(task: Task, logits: Tensor, prevalence: Mapping[str, float]) -> Tensor:
    """Probabilities where the classes have this prevalence instead of that of the images of the calibration."""
    multi_label = task.kind == "multi-label"
    if prevalence:
        if task.calibration is None:
            raise ArgumentError(
                f'Task "{task.name}" is not calibrated, so a prevalence cannot correct its probabilities.'
            )
        if set(prevalence) != set(task.prompts) or not all(0 < value < 1 for value in prevalence.values()):
            raise ArgumentError(
                f'Task "{task.name}": `prevalence` needs a number between 0 and 1 for each class: '
                f"{', '.join(task.classes)}."
            )
        if not multi_label and abs(sum(prevalence.values()) - 1) > 1e-3:
            raise ArgumentError(f'Task "{task.name}": the prevalences of a multi-class task must sum to 1.')
        new, old = _row(task, prevalence, logits), _row(task, task.calibration.prior, logits)
        logits = logits + (new.logit() - old.logit() if multi_label else new.log() - old.log())
    return logits.sigmoid() if multi_label else logits.softmax(dim=1)


def _known(content: Any, kind: Any, where: str, without: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise ArgumentError(f"{where} must be a mapping, got {type(content).__name__}.")
    names = [one.name for one in fields(kind) if one.name not in without]
    for key in content:
        if key not in names:
            near = get_close_matches(str(key), names, 1)
            hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(names)}."
            raise ArgumentError(f"{where}: unknown key `{key}`; {hint}")
    return dict(content)


def _built(kind: Any, values: dict[str, Any], where: str) -> Any:
    try:
        return kind(**values)
    except TypeError as error:  # a missing key, or a value of a wrong type
        raise ArgumentError(f"{where} cannot be used: {str(error).replace('__init__() ', '')}.") from error


def read_tasks(path: str | Path) -> dict[str, Task]:
    """Reads a `tasks.json`.

    Args:
        path: The file.

    Returns:
        Name -> task.

    Raises:
        ValueError: For a file that is no JSON, of a newer schema, or with a task that cannot be used.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        # What could not be written again: NaN, numbers beyond those of float64, halves of characters.
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{path} is no valid JSON: {error}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict):
        raise ArgumentError(f'{path} must hold {{"schema": {SCHEMA}, "tasks": {{...}}}}.')
    if content.get("schema") != SCHEMA:
        raise ArgumentError(
            f"{path} has the schema {content.get('schema')!r}, and this code reads {SCHEMA}: use a newer version."
        )
    try:
        return {name: Task.from_dict(name, entry) for name, entry in content["tasks"].items()}
    except ArgumentError as error:
        raise ArgumentError(f"{path}: {error}") from error


def write_tasks(path: str | Path, tasks: Mapping[str, Task]) -> None:
    """Writes a `tasks.json`.

    Args:
        path: The file.
        tasks: Name -> task.

    Raises:
        ValueError: If a task is kept under another name than its own.
    """
    for name, task in tasks.items():
        if name != task.name:
            raise ArgumentError(f'The task "{task.name}" is kept under the name "{name}"; the two must be the same.')
    content = {"schema": SCHEMA, "tasks": {name: task.to_dict() for name, task in tasks.items()}}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    # Lists of numbers in one line; texts hold no line breaks in JSON, so none of them is touched.
    text = re.sub(r"\[\n\s+(-?[\d.e+-]+(?:,\n\s+-?[\d.e+-]+)*)\n\s+\]", lambda found: f"[{_one_line(found[1])}]", text)
    Path(path).write_text(text + "\n", encoding="utf-8")


def _one_line(numbers: str) -> str:
    return ", ".join(number.strip() for number in numbers.split(","))


def load_tasks(name: Any, revision: str | None = None, arguments: Mapping[str, Any] | None = None) -> dict[str, Task]:
    """Reads the tasks of a folder or of a repository on the Hub.

    Args:
        name: Folder or Hub id, as `from_pretrained` takes it.
        revision: Branch, tag or commit.
        arguments: Those of `from_pretrained`, such as `cache_dir` and `token`.

    Returns:
        Name -> task; empty where there is no `tasks.json`.
    """
    found = file_beside_weights(name, TASKS_FILE, revision, arguments)
    return {} if found is None else read_tasks(found)


def task_tokens(task: Task, device: Any = None) -> dict[str, Tensor]:
    """Makes a padded batch of a task's sentences.

    Args:
        task: A task with tokens.
        device: Device of the tensors.

    Returns:
        `input_ids`, `attention_mask`, `word_ids` and, where the tokenizer has them, `token_type_ids`, (M, L) int64.

    Raises:
        ValueError: If a sentence has no tokens.
    """
    missing = [sentence for sentence in task.sentences if sentence not in task.tokens]
    if missing:
        raise ArgumentError(
            f'Task "{task.name}": "{missing[0]}" has no tokens. Tokenize the task first: '
            "model.tasks[NAME] = processor.tokenize_task(task)."
        )
    rows = [task.tokens[sentence] for sentence in task.sentences]
    kept = [name for name in TOKEN_FIELDS if name in rows[0]]
    batch = {name: _padded([row[name] for row in rows], -1 if name == "word_ids" else 0) for name in kept}
    batch["attention_mask"] = _padded([[1] * len(row["input_ids"]) for row in rows], 0)
    return {name: value.to(device) for name, value in batch.items()}


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    lists = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=value)


@dataclass(frozen=True)
class EncodedTask:
    """The sentences of a task in the space of a model; K classes, and absences of classes.

    Args:
        text: What `MedMoEModel.get_text_features` returns for the M sentences.
        report_logits: (M, experts) of the report router; None without.
        members: (M, K), the share of each sentence in its class: columns sum to 1.
        class_embeds: (K, D): means of the sentences of length 1, with length 1.
    """

    text: Any
    report_logits: Tensor | None
    members: Tensor
    class_embeds: Tensor


def encode_task(model: Any, task: Task) -> EncodedTask:
    """Encodes the sentences of a task.

    Args:
        model: A `MedMoEModel`.
        task: A task with tokens.

    Returns:
        The sentences and classes; gradients are kept if they are enabled.
    """
    raw = model._encode_text(**_text_inputs(model, task))
    report_logits = None if model.report_router is None else model.report_router(raw.pooler_output)
    text = model._project_text(raw)
    number = {sentence: row for row, sentence in enumerate(task.sentences)}
    groups = [*task.prompts.values(), *task.negative_prompts.values()]
    members = torch.zeros(len(number), len(groups), device=text.pooler_output.device)
    for column, sentences in enumerate(groups):
        for sentence in sentences:
            members[number[sentence], column] += 1 / len(sentences)
    single = nn.functional.normalize(text.pooler_output.float(), dim=-1)
    return EncodedTask(text, report_logits, members, nn.functional.normalize(members.t() @ single, dim=-1))


def _text_inputs(model: Any, task: Task) -> dict[str, Any]:
    names = ("input_ids", "attention_mask", "token_type_ids", "word_ids")
    tokens = task_tokens(task, model.device)
    return {name: tokens.get(name) for name in names}


def task_scores(
    model: Any, pixel_values: Tensor, task: Task, encoded: EncodedTask, modality: Any = None
) -> tuple[Tensor, Tensor]:
    """Scores images against the classes of a task.

    The global score is the cosine of the image and the mean of a class's sentences, times the model's scale; the local
    score is the mean similarity of the sentences to the image's regions. With negative prompts, the score of a class's
    absence is subtracted.

    Args:
        model: A `MedMoEModel`.
        pixel_values: (B, 3, H, W).
        task: The task.
        encoded: Of `encode_task`.
        modality: As in `MedMoEModel.get_image_features`.

    Returns:
        (B, C) float32, and (B,) the expert of each image: the caller's, or that of the image router.
    """
    local = task.score != "global"
    image = model.get_image_features(pixel_values, modality=modality, local=local, return_dict=True)
    parts = []
    if task.score != "local":
        parts.append(cosine_logits(image.pooler_output, encoded.class_embeds, model.global_scale).float())
    if local:
        if encoded.report_logits is not None and model.config.router == "report":
            vision = model.vision_model
            pair_ids = vision.select_experts(encoded.report_logits.expand(len(pixel_values), -1, -1), modality)
            scores = model.similarity_by_expert(vision.encode(pixel_values), [encoded.text], pair_ids, kind="local")[0]
        else:
            scores = model.similarity(image.pooler_output, image.local_embeds, encoded.text, "local")
        parts.append(scores.float() @ encoded.members)
    both = sum(parts[1:], parts[0]) / len(parts)
    count = len(task.prompts)
    return both[:, :count] - both[:, count:] if task.negative_prompts else both, image.expert_ids


attach_to_package(__name__)
