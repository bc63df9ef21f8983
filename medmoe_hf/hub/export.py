"""Export of both towers as ONNX or `torch.export` files, with everything else that is needed to use them.

Routing is part of the image tower's graph: each image is computed only by its own expert.
"""

import copy
import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize
from transformers.tokenization_utils_base import LARGE_INTEGER

from medmoe_hf.common.files import atomic_dir, check_output
from medmoe_hf.common.loading import explain_loading
from medmoe_hf.data.checkpoint_names import find_checkpoint
from medmoe_hf.errors import ExportError, MissingPackageError
from medmoe_hf.model import MedMoEConfig, MedMoEModel, MedMoEProcessor, MedMoETokenizer

try:
    import onnxruntime
    import onnxruntime.quantization
    import onnxscript  # noqa: F401  torch.onnx needs it
except ImportError:  # only ONNX needs them
    onnxruntime = None

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}
"""Format -> suffix of its files."""

TOLERANCE = 1e-4
"""Largest allowed difference of an exported output, relative to its largest value if that is over 1."""

INT8_COSINE = 0.98
"""Smallest allowed cosine similarity between an embedding of the `int8` export and the model's."""

_SEED = 0
_ASCENT_STEPS, _ASCENT_STEP, _MARGIN = 60, 0.1, 0.01

_Run = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]


@dataclass
class ExportReport:
    """What was exported, and how well it agrees with the model.

    Attributes:
        format: One of `FORMATS`.
        sizes: File name -> size in bytes.
        differences: `tower.output` -> largest difference from the model, relative as in `TOLERANCE`; with `int8`,
            before quantisation.
        batch_sizes: Batch sizes that were compared; the graphs were traced with another one.
        experts: Modalities of the experts that the compared images were sent to.
        int8: `tower.output` -> smallest cosine similarity of the quantised tower's embeddings to the model's, for
            images that are sent to the same expert; empty without `int8`.
        int8_routed: Share of the compared images that are sent to the same expert, in [0, 1]. Their router
            probabilities are close by construction; for real images the share is higher.
    """

    format: str
    sizes: dict[str, int]
    differences: dict[str, float]
    batch_sizes: list[int]
    experts: list[str]
    int8: dict[str, float] = field(default_factory=dict)
    int8_routed: float = 1.0

    @property
    def largest_difference(self) -> float:
        """Largest of `differences`."""
        return max(self.differences.values())

    def __str__(self) -> str:
        files = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for name, size in self.sizes.items())
        return (
            f"{files}: differences from the model of at most {self.largest_difference:.1e}, in batches of "
            f"{' and '.join(map(str, self.batch_sizes))}, images of {', '.join(self.experts)}"
            + "".join(f"; in int8 {name} has a cosine of {value:.4f}" for name, value in self.int8.items())
            + (f", and {self.int8_routed:.0%} of the images their expert" if self.int8 else "")
        )


class _ImageTower(nn.Module):
    outputs: tuple[str, ...] = ("image_embeds", "local_embeds", "router_logits", "expert_ids", "scale_weights")

    def __init__(self, model: MedMoEModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        features = self.model.get_image_features(pixel_values)
        image_embeds = normalize(features.pooler_output, dim=-1)
        return image_embeds, *(getattr(features, name) for name in self.outputs[1:])


class _TextTower(nn.Module):
    def __init__(self, model: MedMoEModel) -> None:
        super().__init__()
        self.model = model
        self.outputs: tuple[str, ...] = ("text_embeds", "word_embeds", "word_mask")
        if model.report_router is not None:
            self.outputs += ("report_router_logits",)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, word_ids: Tensor) -> tuple[Tensor, ...]:
        text = self.model.text_model(input_ids, attention_mask=attention_mask, word_ids=word_ids)
        router = self.model.report_router
        # The router reads the text tower's own space, before any projection.
        routed = () if router is None else (router(text.pooler_output),)
        text = self.model._project_text(text)
        return normalize(text.pooler_output, dim=-1), text.word_embeds, text.word_mask, *routed


def export(
    folder: str | Path,
    out: str | Path,
    format: Literal["onnx", "torch-export"] = "onnx",
    force: bool = False,
    int8: bool = False,
) -> ExportReport:
    """Exports a dual encoder as a folder that needs neither this package nor transformers.

    `image_tower` takes `pixel_values` (B, 3, H, W) with the processor's H and W, and returns `image_embeds` (B, D) of
    length 1, `local_embeds` (B, D, h, w), `router_logits` (B, K), `expert_ids` (B,) and `scale_weights` (B, S, h, w).
    `text_tower` takes `input_ids`, `attention_mask` and `word_ids` (N, L), int64, and returns `text_embeds` (N, D) of
    length 1, `word_embeds` (N, L, D), `word_mask` (N, L) bool and, if there is a report router,
    `report_router_logits` (N, K). B, N and L >= 3 are variable. Floats are float32.

    The expert of an image is always the one that the image router selects. If a model scores images with the expert
    that each text selects (`config.router="report"`, and a similarity that depends on the expert), then
    `scale * image_embeds @ text_embeds.T` differs from its `logits_per_image`; it equals the same product of the
    outputs of `get_image_features` and `get_text_features`. If v_g comes from the backbone only, the two are equal.

    `tokenizer.json` truncates and pads; `word_ids` are those of its encodings, with -1 for `None`. `export.json` has
    the rest: inputs and outputs, the preprocessing of images, the modality of each expert, the inverse temperature.

    Args:
        folder: Folder or Hub id of a `MedMoEModel` and its processor.
        out: Folder to create.
        format: `"onnx"` (for ONNX Runtime) or `"torch-export"` (for `torch.export.load`).
        force: Whether to replace `out` if it exists.
        int8: Whether to quantise the matrix products of the ONNX files to 8 bits: weights per column, activations
            dynamically. Convolutions are not quantised, as ONNX Runtime is slower with quantised ones.

    Returns:
        The differences between the files, read back, and the model, on images that are sent to different experts.

    Raises:
        ExportError: If the differences exceed `TOLERANCE`, if routing or masks differ, if the cosine similarity with
            int8 is below `INT8_COSINE`, or for a folder of another model.
        FileExistsError: If `out` exists and `force` is `False`.
        ImportError: Without the packages of `pip install "medmoe_hf[export]"` (ONNX only).

    Example:
        ```python
        from medmoe_hf.hub.export import export

        print(export("runs/first", "models/onnx"))
        ```
    """
    if format not in FORMATS:
        raise ExportError(f'format must be one of {", ".join(FORMATS)}, got "{format}".')
    if format == "onnx" and onnxruntime is None:
        raise MissingPackageError(
            'ONNX needs the packages onnxscript and onnxruntime: pip install "medmoe_hf[export]"'
        )
    if int8 and format != "onnx":
        raise ExportError("int8 uses ONNX Runtime's quantisation: leave the format at onnx.")
    # Before minutes of work.
    check_output(out, force, "export.json", [folder])
    model, processor = _load(folder, format)
    size = processor.image_processor.size
    pixel_values = _images_for_every_expert(model, (size["height"], size["width"]))
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim.AUTO
    image_tower, text_tower = _ImageTower(model), _TextTower(model)
    modalities = [name for _, name in sorted(model.config.modalities.items())]
    with torch.no_grad():
        report = ExportReport(
            format,
            sizes={},
            differences={},
            batch_sizes=[len(pixel_values), 1],
            experts=[modalities[index] for index in image_tower(pixel_values)[3].unique().tolist()],
        )
    with atomic_dir(out, force) as partial, torch.no_grad():
        signatures = {
            "image_tower": _export_tower(
                partial / f"image_tower{FORMATS[format]}",
                image_tower,
                {0: batch},
                {"pixel_values": pixel_values[:2]},
                [{"pixel_values": pixel_values}, {"pixel_values": pixel_values[-1:]}],
                report,
                int8,
            ),
            "text_tower": _export_tower(
                partial / f"text_tower{FORMATS[format]}",
                text_tower,
                {0: batch, 1: length},
                _texts(model, 2, 6),
                [_texts(model, len(pixel_values), 9), _texts(model, 1, 4)],
                report,
                int8,
            ),
        }
        off = [f"{name} ({value:.1e})" for name, value in report.differences.items() if value > TOLERANCE]
        if off:
            raise ExportError(
                f"{folder} as {format} differs from the model by more than {TOLERANCE} in {', '.join(off)}."
            )
        far = [f"{name} ({value:.3f})" for name, value in report.int8.items() if value < INT8_COSINE]
        if far:
            raise ExportError(
                f"{folder} is not precise enough in int8: below a cosine of {INT8_COSINE} in {', '.join(far)}. "
                "Export it without."
            )
        _configured_tokenizer(processor.tokenizer).save(str(partial / "tokenizer.json"))
        facts = {
            **signatures,
            "images": _image_facts(processor.image_processor),
            "modalities": modalities,
            "similarity": {"kind": model.config.similarity, "scale": float(model.global_scale)},
            "checked": asdict(report),
        }
        (partial / "export.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return report


def _load(folder: str | Path, format: str) -> tuple[MedMoEModel, MedMoEProcessor]:
    folder = find_checkpoint(folder)
    kind = MedMoEConfig.get_config_dict(folder)[0].get("model_type")
    if kind != MedMoEConfig.model_type:
        raise ExportError(f'{folder} holds a model of type "{kind}"; export needs a dual encoder, "medmoe".')
    # torch.onnx has no operator for the mask of transformers' fused attention.
    attention = "eager" if format == "onnx" else None
    with explain_loading(folder):
        model, loading = MedMoEModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ExportError(
            f"{folder} holds no complete dual encoder: its weights lack {len(missing)} tensors, such as {missing[0]}."
        )
    with explain_loading(folder):
        processor = MedMoEProcessor.from_pretrained(folder)
    return model.eval().requires_grad_(False), processor


@torch.enable_grad()
def _images_for_every_expert(model: MedMoEModel, size: tuple[int, int]) -> Tensor:
    """Noise that is optimised until the image router sends image k to expert k, and the first image again.

    Images that are all sent to one expert would not show whether the graph routes at all. If the optimisation fails,
    an image is sent to another expert.

    Returns:
        (K + 1, 3, *size).
    """
    vision = model.vision_model
    generator = torch.Generator().manual_seed(_SEED)
    images = []
    for expert in range(model.config.vision_config.num_experts):
        image = torch.randn(1, 3, *size, generator=generator)
        for _ in range(_ASCENT_STEPS):
            image.requires_grad_()
            logits = vision.router(vision.encode(image).pooler_output)[0]
            others = torch.cat([logits[:expert], logits[expert + 1 :]])
            if not len(others) or logits[expert] - others.max() > _MARGIN * logits.abs().max():
                break
            (gradient,) = torch.autograd.grad(logits[expert] - others.logsumexp(dim=0), image)
            image = image.detach() + _ASCENT_STEP * gradient.sign()
        images.append(image.detach())
    return torch.cat([*images, images[0]])


def _texts(model: MedMoEModel, count: int, length: int) -> dict[str, Tensor]:
    """Inputs (count, length) of the text tower: random tokens of random words, padded; the last text has no word."""
    generator = torch.Generator().manual_seed(_SEED)
    shape = count, length
    positions = torch.arange(length)
    lengths = length - torch.arange(count).unsqueeze(1) % 3
    words = (torch.rand(shape, generator=generator) < 0.6).cumsum(dim=1)
    inside = (positions > 0) & (positions < lengths - 1)
    inside[-1] &= count == 1
    return {
        "input_ids": torch.randint(model.config.text_config.vocab_size, shape, generator=generator),
        "attention_mask": (positions < lengths).long(),
        "word_ids": torch.where(inside, words, -1),
    }


def _export_tower(
    file: Path,
    tower: _ImageTower | _TextTower,
    dimensions: Mapping[int, Any],
    example: Mapping[str, Tensor],
    compared: Sequence[Mapping[str, Tensor]],
    report: ExportReport,
    int8: bool,
) -> dict[str, Any]:
    """Writes one tower, reads it back and compares it; completes the report.

    Returns:
        The entry of `export.json`.
    """
    program = torch.export.export(
        tower, args=(), kwargs=dict(example), dynamic_shapes={name: dict(dimensions) for name in example}
    )
    if report.format == "onnx":
        run = _through_onnx(program, file, list(example), tower.outputs, ("batch", "length")[: len(dimensions)])
    else:
        run = _through_file(program, file)
    for inputs in compared:
        for output, found, right in zip(tower.outputs, run(inputs), tower(**inputs), strict=True):
            name = f"{file.stem}.{output}"
            report.differences[name] = max(report.differences.get(name, 0.0), _difference(found, right))
    if int8:
        _quantise(file)
        run = _onnx_run(file, tower.outputs)
        eight, whole = run(compared[0]), tower(**compared[0])
        # The first output of each tower is its embedding.
        cosines = cosine_similarity(eight[0], whole[0])
        if "expert_ids" in tower.outputs:
            ids = tower.outputs.index("expert_ids")
            alike = eight[ids] == whole[ids]
            report.int8_routed, cosines = alike.float().mean().item(), cosines[alike]
        # If no image is sent to the same expert, the check fails.
        report.int8[f"{file.stem}.{tower.outputs[0]}"] = cosines.min().item() if len(cosines) else 0.0
    report.sizes[file.name] = file.stat().st_size
    return {"file": file.name, "inputs": list(example), "outputs": list(tower.outputs)}


def _through_onnx(
    program: Any, file: Path, inputs: Sequence[str], outputs: Sequence[str], dimensions: Sequence[str]
) -> _Run:
    with warnings.catch_warnings():
        # The exporter warns about its own renaming of dimensions.
        warnings.filterwarnings("ignore", module=r"torch\.onnx")
        exported: Any = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            output_names=list(outputs),
            dynamic_shapes={name: dict(enumerate(dimensions)) for name in inputs},
        )
    exported.save(str(file))
    return _onnx_run(file, outputs)


def _onnx_run(file: Path, outputs: Sequence[str]) -> _Run:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(tensors: Mapping[str, Tensor]) -> list[Tensor]:
        found = session.run(list(outputs), {name: tensor.numpy() for name, tensor in tensors.items()})
        return [torch.from_numpy(array) for array in found]

    return run


def _quantise(file: Path) -> None:
    """Replaces an ONNX file by one with int8 matrix products."""
    quantised = file.with_suffix(".int8")
    # Hides a warning about preprocessing, which would change nothing.
    logging.disable(logging.WARNING)
    try:
        onnxruntime.quantization.quantize_dynamic(
            file,
            quantised,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=onnxruntime.quantization.QuantType.QInt8,
        )
    finally:
        logging.disable(logging.NOTSET)
    quantised.replace(file)


def _through_file(program: Any, file: Path) -> _Run:
    torch.export.save(program, file)
    module = torch.export.load(file).module()
    return lambda tensors: module(**tensors)


def _difference(found: Tensor, right: Tensor) -> float:
    """Difference as in `TOLERANCE`; infinite if dtypes, shapes or integers differ, or a value is not finite."""
    if found.dtype != right.dtype or found.shape != right.shape:
        return math.inf
    if not right.is_floating_point():
        return 0.0 if torch.equal(found, right) else math.inf
    difference = float((found - right).abs().max() / right.abs().max().clamp_min(1.0))
    return difference if math.isfinite(difference) else math.inf


def _configured_tokenizer(tokenizer: MedMoETokenizer) -> Any:
    """The `tokenizers.Tokenizer` inside, with the processor's padding and truncation."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    if tokenizer.model_max_length < LARGE_INTEGER:
        backend.enable_truncation(tokenizer.model_max_length, direction=tokenizer.truncation_side)
    backend.enable_padding(
        direction=tokenizer.padding_side, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token
    )
    return backend


def _image_facts(processor: Any) -> dict[str, Any]:
    """Preprocessing of an RGB image in 0..255: padding, resizing, scaling, normalisation."""
    return {
        "height": processor.size["height"],
        "width": processor.size["width"],
        "resample": Image.Resampling(processor.resample).name.lower(),
        "pad_to_square": bool(processor.pad_to_square),
        "rescale_factor": processor.rescale_factor,
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
    }
