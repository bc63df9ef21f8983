"""Serves a checkpoint on Inference Endpoints, which look for an `EndpointHandler` in a file of this name.

It is saved in every checkpoint and runs without medmoe_hf: the model's code is read from the checkpoint itself.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoProcessor

BATCH_SIZE = 16
MOST = 256
"""Largest number of images, and of texts, in a request."""
_KINDS = {"MedMoEModel": AutoModel, "MedMoEForImageClassification": AutoModelForImageClassification}
_PARAMETERS = ("candidate_labels", "hypothesis_template", "task", "modality")


class EndpointHandler:
    """Answers requests for one checkpoint: a dual encoder or a classifier.

    Args:
        path: Folder of the checkpoint, with its processor. Its Python files are run.

    Raises:
        ValueError: The folder holds another kind of model.

    Example:
        ```python
        handler = EndpointHandler("path/to/checkpoint")
        image = base64.b64encode(open("scan.png", "rb").read()).decode()
        handler({"inputs": image, "parameters": {"candidate_labels": ["normal chest", "pleural effusion"]}})
        # [{"label": "pleural effusion", "score": 0.8}, {"label": "normal chest", "score": 0.2}]
        ```
    """

    def __init__(self, path: str = "") -> None:
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        kind = (config.architectures or [""])[0]
        if kind not in _KINDS:
            raise ValueError(f"handler.py serves {' and '.join(_KINDS)}; this checkpoint is {kind or 'of no kind'}")
        self.classifies = kind == "MedMoEForImageClassification"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = _KINDS[kind].from_pretrained(path, trust_remote_code=True).eval().to(self.device)
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)

    def __call__(self, data: Mapping[str, Any]) -> Any:
        """Answers a request.

        Args:
            data: `inputs` is an image, a list of images, or `{"images": [...], "texts": [...]}`. An image is the bytes
                of a file, the same in base64 (also as a `data:` URI), or a PIL image; addresses are not fetched.
                `parameters` may have `candidate_labels` with `hypothesis_template` (`"{}"` by default), `task` (a task
                of the checkpoint) and `modality` (the expert; by default the router selects it).

        Returns:
            With `candidate_labels` or `task`, and for classifiers: for each image a list of `label` and `score`, the
            highest first; a single list if `inputs` is one image. Otherwise a dictionary of `image_embeds` and
            `modality`, `text_embeds`, and with both `logits_per_image`.

        Raises:
            ValueError: The request cannot be answered; the message says what to change.
        """
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise ValueError("`parameters` must be an object")
        if unknown := sorted(parameters.keys() - set(_PARAMETERS)):
            raise ValueError(f"unknown parameters {', '.join(unknown)}; known: {', '.join(_PARAMETERS)}")
        images, texts, single = _read_inputs(data.get("inputs"))
        labels, task = parameters.get("candidate_labels"), parameters.get("task")
        if self.classifies and (texts or labels is not None or task is not None):
            raise ValueError("this checkpoint is a classifier with labels of its own: send images only")
        if labels is not None and task is not None:
            raise ValueError("pass `candidate_labels` or `task`, not both")
        modality = parameters.get("modality")
        if not self.classifies and labels is None and task is None:
            return self._embed(images, texts, modality)
        if not images or texts:
            raise ValueError("labels are for images: `inputs` must have images, and no texts")
        if labels is not None:
            names, scores = self._zero_shot(images, labels, parameters.get("hypothesis_template") or "{}", modality)
            facts: list[dict[str, Any]] = [{}] * len(images)
        else:
            names, scores, facts = self._classify(images, task, modality)
        ranked = [_ranked(names, row, own) for row, own in zip(scores.tolist(), facts, strict=True)]
        return ranked[0] if single else ranked

    @torch.inference_mode()
    def _run(self, images: Sequence[Any], texts: Sequence[str], **options: Any) -> list[Any]:
        """Outputs of the model for batches of images, each with all texts."""
        batches: list[Any] = [list(images[start : start + BATCH_SIZE]) for start in range(0, len(images), BATCH_SIZE)]
        outputs = []
        for batch in batches or [None]:
            inputs = self.processor(images=batch, text=list(texts) or None, return_tensors="pt").to(self.device)
            outputs.append(self.model(**inputs, **(options if batch else {})))
        return outputs

    def _zero_shot(self, images: Sequence[Any], labels: Any, template: Any, modality: Any) -> tuple[list[str], Any]:
        names = [part.strip() for part in labels.split(",")] if isinstance(labels, str) else labels
        names = _texts(names, "candidate_labels")
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError("`candidate_labels` needs at least two labels, all different: they are compared")
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError("`hypothesis_template` is a text with {} where the label goes")
        sentences = [template.replace("{}", name) for name in names]
        logits = [output.logits_per_image for output in self._run(images, sentences, modality=modality)]
        return names, torch.cat(logits).float().softmax(dim=-1)

    @torch.inference_mode()
    def _classify(
        self, images: Sequence[Any], task: Any, modality: Any
    ) -> tuple[list[str], Any, list[dict[str, Any]]]:
        """Labels, probabilities, and for each image what a task says about its modality."""
        if self.classifies:
            logits = torch.cat([output.logits for output in self._run(images, [], modality=modality)]).float()
            independent = self.model.config.problem_type == "multi_label_classification"
            names = self.model.config.id2label
            found = logits.sigmoid() if independent else logits.softmax(dim=-1)
            return [names[index] for index in range(logits.shape[1])], found, [{}] * len(images)
        answers = []
        for start in range(0, len(images), BATCH_SIZE):
            pixels = self.processor(images=list(images[start : start + BATCH_SIZE]), return_tensors="pt")
            answers.append(self.model.classify(pixels["pixel_values"].to(self.device), task, modality))
        facts = [
            {"modality": name, "fits": fits}
            for answer in answers
            for name, fits in zip(answer.modality, answer.fits, strict=True)
        ]
        return answers[0].classes, torch.cat([answer.probabilities for answer in answers]), facts

    def _embed(self, images: Sequence[Any], texts: Sequence[str], modality: Any) -> dict[str, Any]:
        outputs = self._run(images, texts, modality=modality)
        found: dict[str, Any] = {}
        if images and texts:
            found["logits_per_image"] = _rows([output.logits_per_image for output in outputs])
            found["text_embeds"] = _rows([outputs[0].text_embeds])
            found["image_embeds"] = _rows([output.image_embeds for output in outputs])
        else:
            embeds = [torch.nn.functional.normalize(output.pooler_output.float(), dim=-1) for output in outputs]
            found["image_embeds" if images else "text_embeds"] = _rows(embeds)
        if images:
            experts = list(self.model.config.modalities.values())
            found["modality"] = [experts[index] for output in outputs for index in output.expert_ids.tolist()]
        return found


def _rows(tensors: Sequence[torch.Tensor]) -> list[list[float]]:
    rows: list[list[float]] = torch.cat(list(tensors)).float().tolist()
    return rows


def _ranked(names: Sequence[str], scores: Sequence[float], facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = [{"label": name, "score": score, **facts} for name, score in zip(names, scores, strict=True)]
    return sorted(found, key=lambda entry: -float(str(entry["score"])))


def _read_inputs(inputs: Any) -> tuple[list[Any], list[str], bool]:
    """Images, texts, and whether there is one image that is not in a list."""
    if isinstance(inputs, Mapping):
        if not inputs or inputs.keys() - {"images", "texts"}:
            raise ValueError("`inputs` has `images`, `texts` or both, and nothing else")
        listed, texts = inputs.get("images") or [], inputs.get("texts") or []
        single = False
    else:
        single = not isinstance(inputs, list | tuple)
        listed, texts = inputs, []
    if not isinstance(listed, list | tuple):
        listed = [listed]
    texts = _texts([texts] if isinstance(texts, str) else texts, "texts")
    if not listed and not texts:
        raise ValueError("`inputs` is empty: send an image, a list of images, or images and texts")
    if len(listed) > MOST:
        raise ValueError(f"a request has {MOST} images at most, got {len(listed)}")
    return [_image(one, number) for number, one in enumerate(listed, start=1)], texts, single


def _texts(values: Any, name: str) -> list[str]:
    if not isinstance(values, list | tuple) or not all(isinstance(one, str) and one.strip() for one in values):
        raise ValueError(f"`{name}` is a list of texts, of which none is empty")
    if len(values) > MOST:
        raise ValueError(f"`{name}` has {MOST} entries at most, got {len(values)}")
    return list(values)


def _image(value: Any, number: int) -> Any:
    """What the processor reads; never a path or an address: those are the server's."""
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if not isinstance(value, str):
        raise ValueError(f"image {number} must be the bytes of a file or base64, got {type(value).__name__}")
    if value.startswith("data:"):
        value = value.partition(",")[2]
    try:
        content = base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"image {number} is not base64; paths and addresses are not read") from None
    if not content:
        raise ValueError(f"image {number} is empty")
    return content
