"""A model without its Python: both towers as ONNX or `torch.export` files, with all else that using them needs.

Routing is part of the image tower's graph: each image is computed by its own expert alone.
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

from medmoe_hf.common.files import atomic_dir
from medmoe_hf.common.loading import explain_loading
from medmoe_hf.data.checkpoint_names import refuse_missing_folder
from medmoe_hf.errors import ExportError, MissingPackageError, PathExistsError
from medmoe_hf.model import MedMoEConfig, MedMoEModel, MedMoEProcessor, MedMoETokenizer

try:
    import onnxruntime
    import onnxruntime.quantization
    import onnxscript  # noqa: F401  torch.onnx needs it
except ImportError:  # only ONNX needs them
    onnxruntime = None

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}
"""What `export` writes: the format and the ending of its files."""

TOLERANCE = 1e-4
"""By how much an exported output may differ from the model's; relative to its largest value where that is over 1."""

INT8_COSINE = 0.98
"""How near an image's or a report's embedding must stay to the model's with `int8`: the cosine between the two."""

_SEED = 0
_ASCENT_STEPS, _ASCENT_STEP, _MARGIN = 60, 0.1, 0.01

_Run = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]


@dataclass
class ExportReport:
    """What was exported, and how well it agrees with the model.

    Attributes:
        format: one of `FORMATS`.
        sizes: file -> bytes.
        differences: `tower.output` -> the largest difference from the model, relative as in `TOLERANCE`; with `int8`
            before that.
        batch_sizes: the batches that were compared; the graphs were made with another one.
        experts: the modalities whose experts the compared images were sent to.
        int8: `tower.output` -> the smallest cosine of the written, quantised tower's embeddings to the model's, of
            images that still go to the same expert; empty without `int8`.
        int8_routed: the share of the compared images that do. They were made so that their experts are hardly sure:
            of real images more do.
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
        return max(self.differences.values())

    def __str__(self) -> str:
        files = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for name, size in self.sizes.items())
        return (
            f"{files}: at most {self.largest_difference:.1e} away from the model, in batches of "
            f"{' and '.join(map(str, self.batch_sizes))}, images of {', '.join(self.experts)}"
            + "".join(f"; in int8 {name} keeps a cosine of {value:.4f}" for name, value in self.int8.items())
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

    `image_tower` takes `pixel_values` (B, 3, H, W), H and W as the processor gives them, and gives `image_embeds`
    (B, D) of length 1, `local_embeds` (B, D, h, w), `router_logits` (B, K), `expert_ids` (B,) and `scale_weights`
    (B, S, h, w). `text_tower` takes `input_ids`, `attention_mask` and `word_ids` (N, L), int64, and gives
    `text_embeds` (N, D) of length 1, `word_embeds` (N, L, D), `word_mask` (N, L) bool and, where there is a report
    router, `report_router_logits` (N, K). B, N and L >= 3 are free. Floats are float32.

    The expert of an image, in all of these outputs, is the one that the image router selects. Where a model scores
    images by the expert that each text selects (`config.router="report"`, and a similarity that experts have part in),
    `scale * image_embeds @ text_embeds.T` is therefore not its `logits_per_image`, but the same of what
    `get_image_features` and `get_text_features` give; where v_g comes from the backbone alone the two are one.

    `tokenizer.json` truncates and pads; `word_ids` are the encodings' own, -1 for None. `export.json` has the rest:
    inputs and outputs, how images become `pixel_values`, the modalities by expert, the inverse temperature.

    Args:
        folder: of a `MedMoEModel` and its processor, or a Hub id.
        out: the folder to make.
        format: `"onnx"` (for ONNX Runtime) or `"torch-export"` (for `torch.export.load`).
        force: replace `out`.
        int8: matrix products of the ONNX files in 8 bits: their weights by column, what they are multiplied with as it
            comes (dynamic quantisation). Convolutions stay as they are; ONNX Runtime is slower with theirs.

    Returns:
        how far the files, read back, are from the model, on images that are sent to different experts.

    Raises:
        ExportError: if they are further apart than `TOLERANCE`, or anything is routed or masked otherwise; if int8
            leaves less than `INT8_COSINE` of an embedding; or for a folder of another model.
        FileExistsError: if `out` exists and `force` is False.
        ImportError: without the packages of `pip install "medmoe_hf[export]"` (ONNX only).
    """
    if format not in FORMATS:
        raise ExportError(f'format must be one of {", ".join(FORMATS)}, got "{format}".')
    if format == "onnx" and onnxruntime is None:
        raise MissingPackageError(
            'ONNX needs the packages onnxscript and onnxruntime: pip install "medmoe_hf[export]"'
        )
    if int8 and format != "onnx":
        raise ExportError("int8 is made by ONNX Runtime's quantisation: leave the format at onnx.")
    # Before minutes of work, and not only when the folder is written.
    if Path(out).exists() and not force:
        raise PathExistsError(f"{out} exists already; choose another folder, or replace it by --force.")
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
            raise ExportError(f"{folder} as {format} is over {TOLERANCE} away from the model in {', '.join(off)}.")
        far = [f"{name} ({value:.3f})" for name, value in report.int8.items() if value < INT8_COSINE]
        if far:
            raise ExportError(
                f"{folder} does not bear int8: under a cosine of {INT8_COSINE} to the model's in {', '.join(far)}. "
                "Export it without."
            )
        _whole_tokenizer(processor.tokenizer).save(str(partial / "tokenizer.json"))
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
    refuse_missing_folder(folder)
    kind = MedMoEConfig.get_config_dict(folder)[0].get("model_type")
    if kind != MedMoEConfig.model_type:
        raise ExportError(f'{folder} holds a model of type "{kind}"; export takes the dual encoder, "medmoe".')
    # torch.onnx has no operator for the mask of transformers' fused attention.
    attention = "eager" if format == "onnx" else None
    with explain_loading(folder):
        model, loading = MedMoEModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
        )
        processor = MedMoEProcessor.from_pretrained(folder)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ExportError(
            f"{folder} holds no whole dual encoder: its weights lack {len(missing)} tensors, {missing[0]} among them."
        )
    return model.eval().requires_grad_(False), processor


@torch.enable_grad()
def _images_for_every_expert(model: MedMoEModel, size: tuple[int, int]) -> Tensor:
    """(K + 1, 3, *size): noise, moved until the image router sends image k to expert k, and the first of them again.

    Images that all go to one expert would not tell whether the graph routes at all. A router that cannot be moved
    leaves its image where it is.
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
    """Inputs of the text tower (count, length): random pieces of random words, padded; the last text has no word."""
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
    """Writes one tower, reads it back and compares; completes the report and gives the entry of `export.json`."""
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
        # Without any left to compare, nothing speaks for it.
        report.int8[f"{file.stem}.{tower.outputs[0]}"] = cosines.min().item() if len(cosines) else 0.0
    report.sizes[file.name] = file.stat().st_size
    return {"file": file.name, "inputs": list(example), "outputs": list(tower.outputs)}


def _through_onnx(
    program: Any, file: Path, inputs: Sequence[str], outputs: Sequence[str], dimensions: Sequence[str]
) -> _Run:
    with warnings.catch_warnings():
        # The exporter warns of its own renaming of dimensions.
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
    """Puts a file with int8 matrix products in the place of an ONNX file."""
    quantised = file.with_suffix(".int8")
    # It advises a preparation, without anything changing.
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
    """As `TOLERANCE` says; infinite where types, shapes or integers differ, or anything is not finite."""
    if found.dtype != right.dtype or found.shape != right.shape:
        return math.inf
    if not right.is_floating_point():
        return 0.0 if torch.equal(found, right) else math.inf
    difference = float((found - right).abs().max() / right.abs().max().clamp_min(1.0))
    return difference if math.isfinite(difference) else math.inf


def _whole_tokenizer(tokenizer: MedMoETokenizer) -> Any:
    """The `tokenizers.Tokenizer` inside, which pads and truncates as the processor does by default."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    if tokenizer.model_max_length < LARGE_INTEGER:
        backend.enable_truncation(tokenizer.model_max_length, direction=tokenizer.truncation_side)
    backend.enable_padding(
        direction=tokenizer.padding_side, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token
    )
    return backend


def _image_facts(processor: Any) -> dict[str, Any]:
    """How an RGB image in 0..255 becomes pixel values: padded or not, resized, scaled, normalised."""
    return {
        "height": processor.size["height"],
        "width": processor.size["width"],
        "resample": Image.Resampling(processor.resample).name.lower(),
        "pad_to_square": bool(processor.pad_to_square),
        "rescale_factor": processor.rescale_factor,
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
    }
