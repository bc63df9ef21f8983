"""Check the package on a GPU: numerics, the local loss, the towers and the input path, in at most 8 minutes.

    python examples/experiments/gpu/check.py --out gpu.json
    python examples/experiments/gpu/check.py --device cpu --out cpu.json      # dry run: small shapes, interpreter

Every block runs in a process of its own with a time limit, and writes a row as soon as it has one, so that a block
that is stopped or crashes leaves what it has. Needs no network and no data: weights and inputs are random. The exit
status is 1 if a row of `numerics` misses its limit or a block failed.
"""

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LIMITS = {"numerics": 130, "local_loss": 160, "towers": 140, "input": 50}  # seconds
WORDS = 25
TEMPS = 4.0, 5.0, 10.0
Row = dict[str, Any]


class Bench:
    """Times and memory of a device."""

    def __init__(self, device: str, rounds: int) -> None:
        import torch

        self.torch, self.device, self.rounds = torch, device, rounds
        self.small = device == "cpu"

    def wait(self) -> None:
        if self.device != "cpu":
            self.torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the median wall time of a call, after one that compiles and tunes."""
        work()
        times = []
        for _ in range(self.rounds):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def peak_gib(self, work: Callable[[], object]) -> float | None:
        """Return the peak of memory beyond what is allocated before; None on a CPU."""
        if self.device == "cpu":
            return None
        self.wait()
        before = self.torch.cuda.memory_allocated()
        self.torch.cuda.reset_peak_memory_stats()
        work()
        self.wait()
        return (self.torch.cuda.max_memory_allocated() - before) / 2**30

    def gemm_rate(self, dtype: Any) -> float:
        """Return the rate of a large matrix product, in operations per second."""
        side = 256 if self.small else 8192
        left, right = (self.torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
        return float(2 * side**3 / self.seconds(lambda: left @ right))


def plain_similarity(regions: Any, caption: Any, dtype: Any) -> Any:
    """Similarity of all images (B, D, M) with one caption (W, D), as GLoRIA defines it; sums in float32 or wider."""
    import torch

    exact = torch.promote_types(regions.dtype, torch.float32)
    maps, words = regions.to(dtype), caption.to(dtype)
    scores = (words @ maps).to(exact)
    attention = (TEMPS[0] * scores.softmax(dim=1)).softmax(dim=2)
    contexts = (attention.to(dtype) @ maps.transpose(1, 2)).to(exact)
    cosines = torch.nn.functional.cosine_similarity(contexts, caption.to(exact), dim=-1)
    return TEMPS[2] * (TEMPS[1] * cosines).logsumexp(dim=-1)


def plain_logits(local: Any, words: Any, mask: Any, dtype: Any, one: Callable[..., Any] = plain_similarity) -> Any:
    """One caption after the other, each computed again in the backward pass: otherwise it needs tens of GB."""
    import torch
    from torch.utils.checkpoint import checkpoint

    regions, columns = local.flatten(2), []
    for caption, present in zip(words, mask, strict=True):
        if present.any():
            columns.append(checkpoint(one, regions, caption[present], dtype, use_reentrant=False))
        else:
            columns.append(0 * regions.float().sum(dim=(1, 2)))
    return torch.stack(columns, dim=1)


def off(found: Any, exact: Any) -> float:
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm().clamp_min(1e-30))


def both_passes(logits: Callable[..., Any], local: Any, words: Any, mask: Any, upstream: Any) -> tuple[Any, ...]:
    import torch

    leaves = [tensor.detach().requires_grad_() for tensor in (local, words)]
    value = logits(*leaves, mask)
    return value.detach(), *torch.autograd.grad((value * upstream.to(value.dtype)).sum(), leaves)


def kernel_logits(dtype: Any, tune: bool = True) -> Callable[..., Any]:
    from medmoe_hf.model.local_loss_kernel_medmoe import fused_gloria_logits

    return lambda local, words, mask: fused_gloria_logits(local, words, mask, *TEMPS, matmul_dtype=dtype, tune=tune)


def numerics(bench: Bench) -> Iterator[Row]:
    torch, device = bench.torch, bench.device
    torch.manual_seed(0)
    large = (
        [(2, 24, 5, (5, 1, 0, 3))] if bench.small else [(4, 768, 56, (25,) * 16), (8, 512, 19, (1, 0, 200, 37, 60))]
    )
    for images, width, side, sizes in large if bench.small else [(3, 40, 3, (4, 0, 9)), *large]:
        mask = (torch.arange(max(sizes)) < torch.tensor(sizes).unsqueeze(1)).to(device)
        local = torch.randn(images, width, side, side, device=device)
        words = torch.randn(len(sizes), max(sizes), width, device=device) * 3 / width**0.5
        upstream = torch.randn(images, len(sizes), device=device)
        exact = both_passes(
            lambda *inputs: plain_logits(*inputs, torch.float64), local.double(), words.double(), mask, upstream
        )
        for name, precision, dtype, limit in (
            ("float32", "highest", torch.float32, 1e-5),
            ("tf32", "high", torch.float32, 1e-2),
            ("bfloat16", "highest", torch.bfloat16, 1e-2),
            ("float16", "highest", torch.float16, 1e-2),
        ):
            torch.set_float32_matmul_precision(precision)
            found = both_passes(kernel_logits(dtype, tune=False), local, words, mask, upstream)
            errors = [off(near, right) for near, right in zip(found, exact, strict=True)]
            row: Row = {"what": f"local loss {images}x{width}x{side}x{side}, {len(sizes)} captions, {name}"}
            row |= dict(zip(("values", "gradient of regions", "gradient of words"), errors, strict=True))
            again = both_passes(kernel_logits(dtype, tune=False), local, words, mask, upstream)
            row["equal bits"] = all(torch.equal(*pair) for pair in zip(found, again, strict=True))
            yield row | {"limit": limit, "passed": max(errors) <= limit and row["equal bits"]}
        torch.set_float32_matmul_precision("highest")
    for check in (golden_files, model_parity, compiled_parts, exported_tower, resumed_training):
        yield from attempted(check, bench)


def attempted(check: Callable[[Bench], Iterator[Row]], bench: Bench) -> Iterator[Row]:
    """The rows of a check; what breaks it off is a row that fails, and the next check goes on."""
    try:
        yield from check(bench)
    except Exception as error:
        yield {"what": check.__name__, "error": f"{type(error).__name__}: {error}"[:500], "passed": False}


def within(what: str, errors: dict[str, float], limit: float) -> Row:
    return {"what": what} | errors | {"limit": limit, "passed": max(errors.values()) <= limit}


def golden_files(bench: Bench) -> Iterator[Row]:
    """The packaged checkpoint on the device, against the outputs that are recorded in it."""
    from safetensors.torch import load_file

    from medmoe_hf import pretrained
    from medmoe_hf.hub.golden import open_folder, relative_differences

    folder = Path(pretrained("small"))
    recorded = load_file(folder / "golden.safetensors")
    model = open_folder(folder)[0].to(bench.device).eval()
    inputs = {name[6:]: value.to(bench.device) for name, value in recorded.items() if name.startswith("input.")}
    with bench.torch.inference_mode():
        outputs = model(**inputs)
    expected = {name[7:]: value for name, value in recorded.items() if name.startswith("output.")}
    # Of a rejector, which is a call of its own.
    expected.pop("ood_score", None)
    found = {name: outputs[name].cpu() for name in expected}
    yield within("small, recorded outputs", relative_differences(expected, found), 1e-3)


def compiled_parts(bench: Bench) -> Iterator[Row]:
    """Backbone and an expert with gradients, and the tower without, each as one graph, against the same uncompiled."""
    from medmoe_hf import MedMoEConfig, MedMoEModel

    torch = bench.torch
    backend = "aot_eager" if bench.small else "inductor"
    config = MedMoEConfig.from_preset("tiny" if bench.small else "small", router="image")
    torch.manual_seed(0)
    tower = MedMoEModel(config).to(bench.device).eval().vision_model
    side = config.vision_config.image_size
    pixels = torch.randn(4, 3, side, side, device=bench.device)
    with torch.no_grad():
        maps = tower.encode(pixels).feature_maps
    parts = {
        "backbone": (tower.backbone, lambda part: part(pixels).pooler_output),
        "expert": (tower.experts[0], lambda part: part(maps, tower.map_size(maps))[0]),
    }
    for name, (part, run) in parts.items():
        found = []
        for module in (part, torch.compile(part, backend=backend, fullgraph=True)):
            part.zero_grad(set_to_none=True)
            value = run(module)
            value.square().sum().backward()
            gradients = [weight.grad.flatten() for weight in part.parameters() if weight.grad is not None]
            found.append((value, torch.cat(gradients)))
        (value, gradient), (own_value, own_gradient) = found
        errors = {"values": off(own_value, value), "gradient": off(own_gradient, gradient)}
        yield within(f"compiled {name} as one graph, against the same uncompiled", errors, 1e-3)
    with torch.no_grad():
        expected = tower(pixels).pooler_output
        found = torch.compile(tower, backend=backend, fullgraph=True)(pixels).pooler_output
    yield within("compiled tower with its routing as one graph", {"values": off(found, expected)}, 1e-3)


def exported_tower(bench: Bench) -> Iterator[Row]:
    """The image tower through torch.export and a file, on the device, against the model."""
    from medmoe_hf import MedMoEConfig, MedMoEModel

    torch = bench.torch
    torch.manual_seed(0)
    tower = MedMoEModel(MedMoEConfig.from_preset("tiny", router="image")).eval().vision_model.to(bench.device)
    pixels = torch.randn(3, 3, 64, 64, device=bench.device)
    with torch.no_grad():
        program = torch.export.export(tower, (pixels,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        with tempfile.TemporaryDirectory() as folder:
            torch.export.save(program, Path(folder) / "tower.pt2")
            loaded = torch.export.load(Path(folder) / "tower.pt2").module()
        more = torch.randn(5, 3, 64, 64, device=bench.device)
        found, expected = loaded(more), tower(more)
        errors = {name: off(found[name], expected[name]) for name in ("pooler_output", "local_embeds")}
    yield within("exported tower, read from its file, another batch size", errors, 1e-3)


def resumed_training(bench: Bench) -> Iterator[Row]:
    """A run that is stopped after two of four steps and resumed, against one that is not."""
    import signal

    from safetensors.torch import load_file

    from medmoe_hf.errors import Interrupted
    from medmoe_hf.training import TrainConfig, train
    from medmoe_hf.training.loop import TrainingRun

    with tempfile.TemporaryDirectory() as folder:

        def run_of(name: str) -> Any:
            return TrainConfig.from_dict(
                {
                    "output_dir": f"{folder}/{name}",
                    "model": {"preset": "tiny"},
                    "data": {"train": {"kind": "phantom", "image_size": 64}, "num_workers": 0},
                    "max_steps": 4,
                    "batch_size": 4,
                    "learning_rate": 1e-3,
                    "warmup_steps": 1,
                    "mixed_precision": "no" if bench.small else "fp16",
                    "trackers": [],
                }
            )

        train(run_of("straight"))
        part = TrainingRun(run_of("stopped"))
        step = part.step

        def and_stop(batches: Any) -> None:
            step(batches)
            if part.record.steps == 2:
                part._signal = signal.SIGTERM

        part.step = and_stop  # type: ignore[method-assign]
        try:
            part.train()
        except Interrupted:
            train(run_of("stopped"), "auto")
        straight, resumed = (load_file(f"{folder}/{name}/model.safetensors") for name in ("straight", "stopped"))
    errors = {"weights": max(off(resumed[name].float(), value.float()) for name, value in straight.items())}
    yield within("weights of a resumed run against an uninterrupted one", errors, 0.0 if bench.small else 1e-2)


def model_parity(bench: Bench) -> Iterator[Row]:
    """The model on the device against the CPU: losses, outputs and gradients; and in bfloat16."""
    from medmoe_hf import MedMoEConfig, MedMoEModel

    torch = bench.torch
    torch.backends.cudnn.allow_tf32 = False
    for preset in ("tiny",) if bench.small else ("tiny", "small", "plus"):
        torch.manual_seed(0)
        model = MedMoEModel(MedMoEConfig.from_preset(preset)).eval()
        size = model.config.vision_config.image_size
        ids = torch.randint(5, 900, (4, 12))
        inputs = {"pixel_values": torch.randn(4, 3, size, size), "input_ids": ids, "modality_labels": torch.arange(4)}
        # Given modalities: otherwise rounding could make a router of random weights select another expert.
        inputs |= {"word_ids": torch.arange(12).expand(4, -1), "modality": torch.arange(4)}

        def outputs(where: str, model: Any = model, inputs: Row = inputs) -> tuple[Any, dict[str, Any]]:
            model.to(where).zero_grad(set_to_none=True)
            found = model(**{name: value.to(where) for name, value in inputs.items()}, return_loss=True)
            found.loss.backward()
            return found, {
                name: value.grad.cpu() for name, value in model.named_parameters() if value.grad is not None
            }

        (cpu, cpu_grads), (own, own_grads) = outputs("cpu"), outputs(bench.device)
        errors = {name: off(own[name].cpu(), cpu[name]) for name in ("loss", "image_embeds", "text_embeds")}
        squares = [(own_grads[name] - right, right) for name, right in cpu_grads.items()]
        errors["gradient"] = float(
            (sum(delta.double().square().sum() for delta, _ in squares)
             / sum(right.double().square().sum() for _, right in squares)) ** 0.5
        )  # fmt: skip
        yield (
            {"what": f"{preset}, float32, {bench.device} against cpu"}
            | errors
            | {
                "limit": 1e-3,
                "passed": max(errors.values()) <= 1e-3,
            }
        )
        images = {
            "pixel_values": inputs["pixel_values"].to(bench.device),
            "modality": torch.arange(4, device=bench.device),
        }
        with torch.no_grad():
            exact = model.get_image_features(**images).pooler_output
            with torch.autocast(bench.device, dtype=torch.bfloat16):
                half = model.get_image_features(**images).pooler_output
        cosines = torch.nn.functional.cosine_similarity(half.float(), exact, dim=-1)
        yield {
            "what": f"{preset}, image embeddings in bfloat16 against float32",
            "smallest cosine": float(cosines.min()),
            "limit": 0.99,
            "passed": float(cosines.min()) >= 0.99,
        }


def local_loss(bench: Bench) -> Iterator[Row]:
    """Forward and backward at maps of 56x56x768; compiled last, since it takes longest to start."""
    from medmoe_hf.model.local_loss_kernel_medmoe import kernel_bytes
    from medmoe_hf.model.losses_medmoe import contrastive_loss
    from medmoe_hf.model.word_regions_medmoe import gloria_logits

    torch, device = bench.torch, bench.device
    width, side = (24, 3) if bench.small else (768, 56)
    length = 3 if bench.small else WORDS
    rates = {dtype: bench.gemm_rate(dtype) for dtype in (torch.bfloat16, torch.float32)}
    compiled = torch.compile(plain_similarity, dynamic=False)
    variants: dict[str, tuple[Any, Callable[..., Any]]] = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        variants[f"kernels, {name}"] = dtype, kernel_logits(dtype)
        variants[f"without kernels, {name}"] = (
            dtype,
            lambda local, words, mask, dtype=dtype: gloria_logits(local, words, mask, *TEMPS, dtype),
        )
    variants["plain, bfloat16"] = torch.bfloat16, lambda *inputs: plain_logits(*inputs, torch.bfloat16)
    if not bench.small:
        variants["plain, torch.compile, bfloat16"] = (
            torch.bfloat16,
            lambda *inputs: plain_logits(*inputs, torch.bfloat16, compiled),
        )
    for batch in (2,) if bench.small else (256, 128, 64, 32):
        torch.manual_seed(0)
        local = torch.randn(batch, width, side, side, device=device)
        words = torch.randn(batch, length, width, device=device) * 3 / width**0.5
        mask = torch.ones(batch, length, dtype=torch.bool, device=device)
        products = 2 * batch * batch * length * width * side * side
        for name, (dtype, logits) in variants.items():
            leaves = [tensor.detach().requires_grad_() for tensor in (local, words)]

            def work(logits: Callable[..., Any] = logits, leaves: Any = leaves, mask: Any = mask) -> None:
                torch.autograd.grad(contrastive_loss(logits(*leaves, mask)), leaves)

            row: Row = {"what": name, "batch": batch}
            try:
                row["seconds"] = bench.seconds(work)
                row["peak GiB beyond the inputs"] = bench.peak_gib(work)
                # Two products forward and four backward are the least; what is computed again does not count.
                row["share of GEMM rate"] = 6 * products / row["seconds"] / rates[dtype]
                if name.startswith("kernels"):
                    stated = kernel_bytes(batch, side * side, width, [length] * batch, dtype)
                    row["stated GiB"] = stated / 2**30
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:500]
            yield row


def towers(bench: Bench) -> Iterator[Row]:
    """Images per second of encoding and of training steps, beside bare backbones."""
    import timm
    from transformers import SwinConfig, SwinModel

    from medmoe_hf import MedMoEConfig, MedMoEModel

    torch, device = bench.torch, bench.device
    batch = 2 if bench.small else 128

    def rate(what: str, size: int, forward: Callable[..., Any], train: Callable[..., Any] | None = None) -> Row:
        pixels = torch.randn(batch, 3, size, size, device=device)
        row: Row = {"what": what, "batch": batch}
        try:
            with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
                row["encoded images/s"] = batch / bench.seconds(lambda: forward(pixels))
            if train is not None:
                row["trained images/s"] = batch / bench.seconds(lambda: train(pixels))
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        return row

    for preset in ("tiny",) if bench.small else ("small", "plus", "paper"):
        model = MedMoEModel(MedMoEConfig.from_preset(preset)).to(device)
        ids = torch.randint(5, 900, (batch, WORDS + 2), device=device)
        word_ids = torch.arange(WORDS + 2, device=device).expand(batch, -1)

        def step(pixels: Any, model: Any = model, ids: Any = ids, word_ids: Any = word_ids) -> None:
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = model(pixel_values=pixels, input_ids=ids, word_ids=word_ids, return_loss=True).loss
            loss.backward()
            model.zero_grad(set_to_none=True)

        size = model.config.vision_config.image_size
        yield rate(f"{preset}, bfloat16", size, model.get_image_features, step)
        named = [index % 6 for index in range(batch)]

        def by_name(pixels: Any, model: Any = model, named: list[int] = named) -> Any:
            return model.get_image_features(pixels, modality=named)

        # Neither waits for the GPU to group images by expert; as one graph the tower runs other products.
        yield rate(f"{preset}, bfloat16, experts named by the caller", size, by_name)
        tower = model.vision_model.eval()
        if not bench.small:
            graph = torch.compile(tower, mode="reduce-overhead")
            yield rate(f"{preset}, bfloat16, compiled, CUDA graphs", size, graph)
    yield from formats(bench, batch)
    yield from scaled_step(bench)
    bare = {"tiny ResNet": timm.create_model("test_resnet")} if bench.small else {
        "bare Swin-T": SwinModel(SwinConfig()),
        "CLIP ViT-B/16": timm.create_model("vit_base_patch16_clip_224"),
        "RN50": timm.create_model("resnet50"),
    }  # fmt: skip
    for name, backbone in bare.items():
        yield rate(f"{name}, bfloat16", 224, backbone.to(device).eval())


def formats(bench: Bench, batch: int) -> Iterator[Row]:
    """A convolutional backbone in both memory formats, and Swin with both attentions."""
    import timm
    from transformers import SwinConfig, SwinModel

    torch, device = bench.torch, bench.device
    network = timm.create_model("test_resnet" if bench.small else "resnet50").to(device).eval()
    pixels = torch.randn(batch, 3, 224, 224, device=device)
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        for name in ("contiguous_format", "channels_last"):
            images = pixels.contiguous(memory_format=getattr(torch, name))
            seconds = bench.seconds(lambda images=images: network(images))
            yield {"what": f"convolutional backbone, {name}", "batch": batch, "encoded images/s": batch / seconds}
        for name in ("eager", "sdpa"):
            small = {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2]} if bench.small else {}
            swin = SwinModel(SwinConfig(**small, attn_implementation=name)).to(device).eval()
            seconds = bench.seconds(lambda swin=swin: swin(pixels))
            yield {"what": f"Swin, attention by {name}", "batch": batch, "encoded images/s": batch / seconds}


def scaled_step(bench: Bench) -> Iterator[Row]:
    """A step in float16 with a scaler, which only a GPU has: no overflow after the first few."""
    if bench.small:
        return
    from medmoe_hf import MedMoEConfig, MedMoEModel

    torch = bench.torch
    model = MedMoEModel(MedMoEConfig.from_preset("small")).to(bench.device).train()
    side = model.config.vision_config.image_size
    scaler, optimizer = torch.amp.GradScaler(), torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(5, 900, (16, WORDS + 2), device=bench.device)
    inputs = {"pixel_values": torch.randn(16, 3, side, side, device=bench.device), "input_ids": ids}
    inputs |= {"word_ids": torch.arange(WORDS + 2, device=bench.device).expand(16, -1)}
    for _ in range(8):
        with torch.autocast(bench.device, dtype=torch.float16):
            loss = model(**inputs, return_loss=True).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    found = {"loss": float(loss), "scale": scaler.get_scale()}
    yield {"what": "small, steps in float16 with a scaler"} | found | {"passed": found["scale"] >= 1024}


def input_path(bench: Bench) -> Iterator[Row]:
    """Decoding of JPEG files of 512 pixels, and copies to the device."""
    import numpy as np
    from PIL import Image
    from torchvision.io import ImageReadMode, decode_jpeg

    torch = bench.torch
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((512, 512)).save(buffer, "JPEG", quality=90)
    number = 4 if bench.small else 256
    files = [torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)] * number
    yield {
        "what": "Pillow, one core",
        "images/s": number
        / bench.seconds(lambda: [np.asarray(Image.open(io.BytesIO(buffer.getvalue()))) for _ in files]),
    }
    if bench.device != "cpu":
        work = lambda: decode_jpeg(files, mode=ImageReadMode.RGB, device=bench.device)  # noqa: E731
        yield {"what": "torchvision on the GPU", "images/s": number / bench.seconds(work)}
        for pinned in (False, True):
            pixels = torch.empty(256, 3, 224, 224)
            pixels = pixels.pin_memory() if pinned else pixels
            seconds = bench.seconds(lambda pixels=pixels: pixels.to(bench.device, non_blocking=True))
            yield {
                "what": f"copy of {'pinned' if pinned else 'pageable'} float32 images of 224 pixels",
                "images/s": 256 / seconds,
            }


BLOCKS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "numerics": numerics,
    "local_loss": local_loss,
    "towers": towers,
    "input": input_path,
}


def run_block(name: str, device: str, rounds: int, rows: Path) -> None:
    with rows.open("a", encoding="utf-8") as file:
        for row in BLOCKS[name](Bench(device, rounds)):
            file.write(json.dumps(row) + "\n")
            file.flush()


def environment(device: str) -> Row:
    import torch

    found: Row = {"python": platform.python_version(), "torch": torch.__version__, "device": device}
    for package in ("triton", "transformers", "timm"):
        try:
            found[package] = __import__(package).__version__
        except ImportError:
            found[package] = None
    if device != "cpu":
        found["card"] = torch.cuda.get_device_name()
        found["memory GiB"] = torch.cuda.get_device_properties(0).total_memory / 2**30
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="file for the results")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run with small shapes")
    parser.add_argument("--only", nargs="*", choices=list(BLOCKS), default=list(BLOCKS), help="blocks to run")
    parser.add_argument("--rounds", type=int, help="timed calls of each variant (5; 1 on a CPU)")
    parser.add_argument("--limit-factor", type=float, default=1.0, help="multiplies the time limits of blocks")
    parser.add_argument("--block", choices=list(BLOCKS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rounds = arguments.rounds or (1 if arguments.device == "cpu" else 5)
    if arguments.block:
        run_block(arguments.block, arguments.device, rounds, arguments.out)
        return
    variables = os.environ | {"HF_HUB_OFFLINE": "1"}
    if arguments.device == "cpu":
        variables["TRITON_INTERPRET"] = "1"
    result: Row = {"environment": None, "blocks": {}}
    failed = False
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            command = [sys.executable, __file__, "--block", name, "--device", arguments.device, "--out", str(rows)]
            start, limit, state = time.perf_counter(), LIMITS[name] * arguments.limit_factor, "complete"
            try:
                done = subprocess.run([*command, "--rounds", str(rounds)], env=variables, timeout=limit)
                state = state if done.returncode == 0 else f"failed with exit status {done.returncode}"
            except subprocess.TimeoutExpired:
                state = f"stopped after {limit:g} s"
            lines = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
        found = [json.loads(line) for line in lines]
        failed |= state.startswith("failed") or any(row.get("passed") is False for row in found)
        result["blocks"][name] = {"state": state, "seconds": time.perf_counter() - start, "rows": found}
        print(f"{name}: {state}", *(json.dumps(row) for row in found), sep="\n    ", flush=True)
        arguments.out.write_text(json.dumps(result, indent=2), encoding="utf-8")
    result["environment"] = environment(arguments.device)
    arguments.out.write_text(json.dumps(result, indent=2), encoding="utf-8")
    sys.exit(failed)


if __name__ == "__main__":
    main()
