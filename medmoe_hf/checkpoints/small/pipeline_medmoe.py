"""The zero-shot pipeline of a checkpoint, which answers by its tasks where they are asked for.

`config.json` names it under `custom_pipelines`, so that `pipeline("zero-shot-image-classification", model=...,
trust_remote_code=True)` uses it. The stock pipeline makes sentences of labels by one template and takes a softmax: it
has no place for prompts, a temperature, or biases of a task.
"""

# mypy: allow-subclassing-any
# transformers is untyped.

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from transformers import ZeroShotImageClassificationPipeline
from transformers.image_utils import load_image
from transformers.utils import logging

from .configuration_medmoe import attach_to_package
from .errors_medmoe import ArgumentError
from .saving_medmoe import CUSTOM_PIPELINES
from .tasks_medmoe import misfit_warning

logger = logging.get_logger(__name__)


class MedMoEZeroShotPipeline(ZeroShotImageClassificationPipeline):
    """Zero-shot classification as transformers has it, and by the tasks of the checkpoint.

    Called with `task="glaucoma"`, or with the classes of a task as `candidate_labels` and no `hypothesis_template`, it
    answers as `MedMoEModel.classify`: by the task's prompts, score, temperature and biases. All other labels are
    completed by the template, as by the stock pipeline. If several tasks have these classes, none of them is chosen,
    and a warning names them.

    Returns:
        For each image a list of `{"score": probability, "label": class}`, the most probable first. By a task, each has
        also its name, `task`; `modality`, what the image was read as; and `fits`, whether the task is for that: if
        not, the probabilities mean nothing. One warning counts these images, except for data sets and generators.

    Raises:
        ValueError: There is no such task, or it does not have the given labels.

    Example:
        ```python
        from transformers import pipeline

        classify = pipeline("zero-shot-image-classification", model="you/medmoe-small", trust_remote_code=True)
        classify("eye.png", candidate_labels=["no glaucoma", "glaucoma"])
        classify("eye.png", task="glaucoma")
        ```
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # `pipeline` has replaced names by classes, which the configuration cannot be saved or shown with.
        self.model.config.custom_pipelines = deepcopy(CUSTOM_PIPELINES)

    def __call__(self, image: Any = None, candidate_labels: Any = None, **kwargs: Any) -> Any:
        """Classifies images.

        Args:
            image: A path, an address, a PIL image, or a list of these.
            candidate_labels: Labels; None for the classes of `task`.
            **kwargs: `task`, the name of a task of the checkpoint; and those of the stock pipeline, such as
                `hypothesis_template` and `batch_size`.

        Returns:
            As the class says.
        """
        if candidate_labels is not None:
            kwargs["candidate_labels"] = candidate_labels
        image = kwargs.pop("images", image)
        if image is None:
            raise ArgumentError("The pipeline needs an image, or a list of images.")
        # Not the parent's, which needs labels.
        found = super(ZeroShotImageClassificationPipeline, self).__call__(image, **kwargs)
        if isinstance(found, list):
            tops = [rows[0] for rows in ([found] if found and isinstance(found[0], dict) else found)]
            warning = misfit_warning(
                next((row["task"] for row in tops if "task" in row), ""),
                [row["modality"] for row in tops if not row.get("fits", True)],
            )
            if warning:
                logger.warning(warning)
        return found

    def _sanitize_parameters(self, task: str | None = None, **kwargs: Any) -> tuple[Any, Any, Any]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        labels = kwargs.get("candidate_labels")
        if task is not None or labels is not None:
            if isinstance(labels, str):
                labels = preprocess["candidate_labels"] = [one.strip() for one in labels.split(",")]
            tasks = getattr(self.model, "tasks", {})
            name = chosen_task(tasks, labels, task, "hypothesis_template" in kwargs)
            preprocess["task"] = forward["task"] = name
            if name is not None:
                # In the order of the task, and written as by the caller.
                written = {_folded(label): label for label in labels or tasks[name].classes}
                preprocess["candidate_labels"] = [written[_folded(own)] for own in tasks[name].classes]
        return preprocess, forward, postprocess

    def preprocess(self, image: Any, candidate_labels: Any = None, task: str | None = None, **kwargs: Any) -> Any:
        if candidate_labels is None:
            raise ArgumentError("Pass `candidate_labels`, or the name of a task of the checkpoint as `task`.")
        if task is None:
            return super().preprocess(image, candidate_labels, **kwargs)
        inputs = self.image_processor(images=[load_image(image, timeout=kwargs.get("timeout"))], return_tensors="pt")
        inputs = inputs.to(self.dtype)
        inputs["candidate_labels"] = candidate_labels
        return inputs

    def _forward(self, model_inputs: Any, task: str | None = None) -> Any:
        if task is None:
            return super()._forward(model_inputs)
        labels = model_inputs.pop("candidate_labels")
        # Without a warning for each batch.
        answer = self.model._answer_task(model_inputs["pixel_values"], task)
        return {
            "candidate_labels": labels,
            "probabilities": answer.probabilities,
            "task": [task] * len(answer.fits),
            "modality": answer.modality,
            "fits": answer.fits,
        }

    def postprocess(self, model_outputs: Any) -> list[dict[str, Any]]:
        if "probabilities" not in model_outputs:
            return super().postprocess(model_outputs)  # type: ignore[no-any-return]
        labels, found = model_outputs["candidate_labels"], model_outputs["probabilities"][0].tolist()
        # transformers takes batches of several apart, and leaves those of one as they are.
        facts = {
            name: model_outputs[name][0] if isinstance(model_outputs[name], list) else model_outputs[name]
            for name in ("task", "modality", "fits")
        }
        return sorted(
            ({"score": score, "label": label, **facts} for score, label in zip(found, labels, strict=True)),
            key=lambda row: -row["score"],
        )


def chosen_task(
    tasks: Mapping[str, Any], labels: Sequence[str] | None, name: str | None = None, template: bool = False
) -> str | None:
    """Finds the task of a checkpoint that labels belong to.

    Args:
        tasks: Name -> task.
        labels: Labels, in any order; case and spaces do not count. None for all classes of the named task.
        name: Name of the task; None if the labels decide.
        template: Whether the caller makes sentences of the labels, so that none is chosen by labels.

    Returns:
        The name; None if no task, or more than one, has exactly these classes.

    Raises:
        ValueError: There is no task of this name, or it has other classes.
    """
    wanted = None if labels is None else sorted(map(_folded, labels))
    if name is not None:
        if name not in tasks:
            known = f"it has {', '.join(tasks)}" if tasks else "it has none"
            raise ArgumentError(f'The checkpoint has no task "{name}": {known}.')
        if wanted is not None and wanted != sorted(map(_folded, tasks[name].classes)):
            raise ArgumentError(f'The task "{name}" has the classes {", ".join(tasks[name].classes)}.')
        return name
    if template:
        return None
    found = [key for key, task in tasks.items() if sorted(map(_folded, task.classes)) == wanted]
    if len(found) > 1:
        logger.warning(
            "The tasks %s of this checkpoint all have these labels, so none was used; choose one by `task`.",
            " and ".join(found),
        )
    return found[0] if len(found) == 1 else None


def _folded(label: str) -> str:
    return " ".join(str(label).split()).casefold()


attach_to_package(__name__)
