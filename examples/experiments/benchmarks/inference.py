"""Benchmark of the image towers: time and memory compared with their backbones and with matrix products.

    python examples/experiments/benchmarks/inference.py [--only presets halves precision scaling]
        [--batches 1 8] [--rounds 5] [--compile]

`presets`: `paper`, `plus` and `official` with the selected expert, with all six, and without local maps; a direct
implementation of what the authors' code computes, with the same output as `official`; the Swin-T of transformers and
timm alone, and CLIP's ViT-B/16 and RN50. `halves`: `paper` and `official` beside their Swin-T, in float32 and in
bfloat16. `precision`: `paper` in other memory formats, in bfloat16, in int8, compiled, and exported. `scaling`: more
experts, and larger images. Weights are random. The modalities of the images alternate, except in `precision`, where
the router selects the experts.

Variants take turns, so that other load affects all alike. Times are CPU milliseconds per image over all threads,
median and range over rounds; ratios, and shares of the rate of large matrix products of the same type, are medians
over rounds; memory is the peak increase of the process. `precision` needs `pip install "medmoe_hf[export]"`, and
torchao for int8 without ONNX Runtime.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training import AllExperts, AuthorsExperts, peak
from transformers import SwinConfig, SwinModel

from medmoe_hf import MedMoEConfig, MedMoEModel
from medmoe_hf.hub.export import export
from medmoe_hf.model import MedMoEImageProcessor, MedMoEProcessor, MedMoETokenizer, MedMoEVisionModel

GEMM_SIDE = 1024
PARTS = ("presets", "halves", "precision", "scaling")


@dataclass
class Variant:
    """A row of a table: the timed call, its operations (None if not counted) and the type of its products."""

    work: Callable[[], object]
    operations: float | None = None
    dtype: torch.dtype = torch.float32


def operations(work: Callable[[], object]) -> float:
    """Count the multiplications and additions of matrix products and convolutions."""
    # The counter does not support fused attention on CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def counted(work: Callable[[], object]) -> Variant:
    return Variant(work, operations(work))


def products(dtype: torch.dtype) -> Callable[[], object]:
    left, right = torch.randn(2, GEMM_SIDE, GEMM_SIDE).to(dtype)
    out = torch.empty_like(left)
    # Several products, so that the resolution of the clock does not matter.
    return lambda: [torch.mm(left, right, out=out) for _ in range(4)]


def compare(title: str, variants: dict[str, Variant], images: int, rounds: int, reference: str) -> dict[str, float]:
    """Print a line per variant; returns the median ratios of their times to that of `reference`."""
    gemm = {variant.dtype: products(variant.dtype) for variant in variants.values()}
    for work in [*(variant.work for variant in variants.values()), *gemm.values()]:
        work()
    grown = {name: peak(variant.work) for name, variant in variants.items()}
    seconds: dict[str | torch.dtype, list[float]] = {name: [] for name in [*variants, *gemm]}
    for _ in range(rounds):
        for name, work in [*gemm.items(), *((name, variant.work) for name, variant in variants.items())]:
            start = time.process_time()
            work()
            seconds[name].append(time.process_time() - start)

    print(f"\n{title}; ratios to {reference}")
    print(f"{'':38}{'CPU ms per image':>26}{'ratio':>8}{'of GEMM':>9}{'peak MiB':>10}")
    ratios = {}
    for name, variant in variants.items():
        times = [1000 * value / images for value in seconds[name]]
        ratios[name] = statistics.median(
            own / other for own, other in zip(seconds[name], seconds[reference], strict=True)
        )
        spread = f"{statistics.median(times):.1f} ({min(times):.1f}-{max(times):.1f})"
        share = ""
        if variant.operations is not None:
            least = variant.operations / (4 * 2 * GEMM_SIDE**3)
            pairs = zip(seconds[variant.dtype], seconds[name], strict=True)
            share = f"{statistics.median(least * one / own for one, own in pairs):.0%}"
        print(f"{name:38}{spread:>26}{ratios[name]:>8.2f}{share:>9}{grown[name]:>10.0f}", flush=True)
    for dtype in gemm:
        rate = 4 * 2 * GEMM_SIDE**3 / statistics.median(seconds[dtype]) / 1e9
        print(f"    GEMM of {GEMM_SIDE}, {str(dtype).removeprefix('torch.')}: {rate:.0f} GFLOP per CPU second")
    return ratios


def image_tower(preset: str, **vision: object) -> MedMoEVisionModel:
    torch.manual_seed(0)
    return MedMoEVisionModel(MedMoEConfig.from_preset(preset, vision_config=vision).vision_config).eval()


def in_turn(model: MedMoEVisionModel, batch: int) -> list[int]:
    return [index % model.config.num_experts for index in range(batch)]


class Bare(nn.Module):
    """The Swin-T of transformers with mean pooling, without unused layers."""

    def __init__(self) -> None:
        super().__init__()
        self.swin = SwinModel(SwinConfig(), add_pooling_layer=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.swin(pixel_values).last_hidden_state.mean(dim=1)


def reference_official(
    tower: MedMoEVisionModel, pixel_values: Tensor, expert_ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Compute what the authors' code does: all experts, with scores from up-sampled tokens, and then a selection.

    Returns:
        Local maps (B, D, H/4, W/4) and their means (B, D).
    """
    local, _ = AuthorsExperts(tower)(tower.backbone(pixel_values).feature_maps, torch.tensor(expert_ids))
    return local, local.mean(dim=(2, 3))


def presets(batch: int, rounds: int) -> None:
    pixels = torch.randn(batch, 3, 224, 224)
    torch.manual_seed(0)
    set_fused_attn(True, experimental=True)  # timm's Swin does not use fused attention by default
    bare: dict[str, nn.Module] = {
        "Swin-T, transformers": Bare(),
        "Swin-T, timm": timm.create_model("swin_tiny_patch4_window7_224", num_classes=0),
        "CLIP ViT-B/16": timm.create_model("vit_base_patch16_clip_224", num_classes=0),
        "CLIP RN50": timm.create_model("resnet50_clip", num_classes=0),
    }
    variants = {}
    for name, model in bare.items():
        model.eval()
        variants[name] = counted(lambda model=model: model(pixels))
    for preset in ("paper", "plus", "official"):
        tower, every = image_tower(preset), image_tower(preset)
        every.fuse = AllExperts(every)
        ids = in_turn(tower, batch)
        variants[preset] = counted(lambda tower=tower, ids=ids: tower(pixels, modality=ids))
        if preset != "official":
            variants[f"{preset}, global only"] = counted(
                lambda tower=tower, ids=ids: tower(pixels, modality=ids, local=False)
            )
        variants[f"{preset}, all experts"] = counted(lambda tower=every, ids=ids: tower(pixels, modality=ids))
    variants["official, direct implementation"] = counted(lambda: reference_official(tower, pixels, ids))
    ratios = compare(f"Presets, batch {batch}, float32", variants, batch, rounds, "Swin-T, transformers")

    output = tower(pixels, modality=ids)
    expected = reference_official(tower, pixels, ids)
    for found, reference in zip((output.local_embeds, output.pooler_output), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5)
    speed = ratios["official, direct implementation"] / ratios["official"]
    print(f"    `official` is {speed:.1f} times as fast as its direct implementation, with equal output (1e-5)")


def halves(batch: int, rounds: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        pixels, bare = torch.randn(batch, 3, 224, 224).to(dtype), Bare().eval().to(dtype)
        variants = {"Swin-T, transformers": Variant(lambda bare=bare, pixels=pixels: bare(pixels), None, dtype)}
        for preset in ("paper", "official"):
            tower = image_tower(preset).to(dtype)
            calls = {preset: {}} | ({f"{preset}, global only": {"local": False}} if preset == "paper" else {})
            for name, given in calls.items():
                call = functools.partial(tower, pixels, modality=in_turn(tower, batch), **given)
                variants[name] = Variant(call, None, dtype)
        title = f"Beside the backbone, batch {batch}, {str(dtype).removeprefix('torch.')}"
        compare(title, variants, batch, rounds, "Swin-T, transformers")


def exported_towers(preset: str, folder: Path) -> tuple[Path, Path]:
    """Export the image tower as ONNX in float32 and int8, as part of a dual encoder with a minimal text tower."""
    torch.manual_seed(0)
    tokenizer = MedMoETokenizer.from_words(["image"], max_length=16)
    text = {"num_hidden_layers": 1, "vocab_size": len(tokenizer)}
    model = MedMoEModel(MedMoEConfig.from_preset(preset, text_config=text, num_summed_layers=1)).eval()
    model.vision_model.load_state_dict(image_tower(preset).state_dict())
    model.save_pretrained(folder / "model")
    MedMoEProcessor(MedMoEImageProcessor(), tokenizer).save_pretrained(folder / "model")
    print(export(folder / "model", folder / "float32"))
    print(export(folder / "model", folder / "int8", int8=True))
    return folder / "float32" / "image_tower.onnx", folder / "int8" / "image_tower.onnx"


def onnx_runner(file: Path, pixels: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # The CPU time of spinning threads would be counted.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    inputs, outputs = {"pixel_values": pixels.numpy()}, ["image_embeds", "local_embeds"]
    return lambda: tuple(map(torch.from_numpy, session.run(outputs, inputs)))


def both(tower: nn.Module, pixels: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    def work() -> tuple[Tensor, Tensor]:
        output = tower(pixels)
        return output.pooler_output, output.local_embeds

    return work


def precision(batch: int, rounds: int, compiled: bool) -> None:
    pixels = torch.randn(batch, 3, 224, 224)
    tower = image_tower("paper")
    needed = operations(both(tower, pixels))
    torch.manual_seed(0)
    bare, bare16 = Bare().eval(), Bare().eval().bfloat16()
    pixels16, wide = pixels.bfloat16(), pixels.to(memory_format=torch.channels_last)
    rows: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], torch.dtype]] = {}

    def row(name: str, work: Callable[[], tuple[Tensor, Tensor]], dtype: torch.dtype = torch.float32) -> None:
        rows[name] = work, dtype

    row("paper, float32", both(tower, pixels))
    row("paper, channels last", both(image_tower("paper").to(memory_format=torch.channels_last), wide))
    row("paper, bfloat16 weights", both(image_tower("paper").bfloat16(), pixels16), torch.bfloat16)

    def autocast() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return both(tower, pixels)()

    row("paper, bfloat16 by autocast", autocast, torch.bfloat16)
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        print("\ntorchao is not installed, so its row is skipped: pip install torchao")
    else:
        small = image_tower("paper")
        quantize_(small, Int8DynamicActivationInt8WeightConfig())
        row("paper, int8 by torchao", both(small, pixels))
    if compiled:
        row("paper, compiled", both(torch.compile(tower, fullgraph=True, dynamic=False), pixels))
        row(
            "paper, bfloat16 weights, compiled",
            both(torch.compile(image_tower("paper").bfloat16(), fullgraph=True, dynamic=False), pixels16),
            torch.bfloat16,
        )
    with tempfile.TemporaryDirectory() as temporary:
        float32, int8 = exported_towers("paper", Path(temporary))
        row("paper, ONNX Runtime", onnx_runner(float32, pixels))
        row("paper, ONNX Runtime, int8", onnx_runner(int8, pixels))
        variants = {
            "Swin-T, transformers": counted(lambda: bare(pixels)),
            "Swin-T, bfloat16 weights": Variant(lambda: bare16(pixels16), None, torch.bfloat16),
        }
        variants |= {name: Variant(work, needed, dtype) for name, (work, dtype) in rows.items()}
        compare(f"Formats and precision, batch {batch}", variants, batch, rounds, "Swin-T, transformers")
    reference = both(tower, pixels)()
    print(f"    {'smallest cosine to float32':34}{'global':>10}{'local':>10}")
    for name, (work, _) in list(rows.items())[1:]:
        cosines = [
            torch.cosine_similarity(found.float(), one, dim=1).min().item()
            for found, one in zip(work(), reference, strict=True)
        ]
        print(f"    {name:34}{cosines[0]:>10.5f}{cosines[1]:>10.5f}")


def scaling(rounds: int, batch: int = 4) -> None:
    def rows(towers: Iterable[tuple[str, MedMoEVisionModel, int]]) -> dict[str, Variant]:
        variants = {}
        for name, tower, side in towers:
            pixels = torch.randn(batch, 3, side, side)
            variants[name] = counted(lambda tower=tower, pixels=pixels: tower(pixels, modality=in_turn(tower, batch)))
        return variants

    # Every image goes to another expert, except with K = 1.
    counts = [
        (count, image_tower("paper", modalities=[f"kind {index}" for index in range(count)]))
        for count in (1, 4, 6, 12, 24)
    ]
    compare(
        f"Experts, `paper`, batch {batch}, 224 pixels",
        rows((f"K = {count}", tower, 224) for count, tower in counts),
        batch,
        rounds,
        "K = 6",
    )
    paper = image_tower("paper")
    sides = (224, 320, 384, 448)
    ratios = compare(
        f"Image size, `paper`, batch {batch}",
        rows((f"{side} pixels", paper, side) for side in sides),
        batch,
        rounds,
        "224 pixels",
    )
    for side in sides[1:]:
        pixels = (side / sides[0]) ** 2
        print(f"    {side}: {pixels:.2f} times the pixels, {ratios[f'{side} pixels']:.2f} times the time")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of threads")
    parser.add_argument("--compile", action="store_true", help="include torch.compile (a minute per row)")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.set_num_threads(arguments.threads)
    for batch in arguments.batches:
        if "presets" in arguments.only:
            presets(batch, arguments.rounds)
        if "halves" in arguments.only:
            halves(batch, arguments.rounds)
        if "precision" in arguments.only:
            precision(batch, arguments.rounds, arguments.compile)
    if "scaling" in arguments.only:
        scaling(arguments.rounds)


if __name__ == "__main__":
    main()
