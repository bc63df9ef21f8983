"""Benchmark of `official` against the authors' own code, with equal weights and inputs.

    git clone https://github.com/shivangchopra11/MedMoE authors
    python examples/experiments/benchmarks/authors.py authors [--parts step image after] [--batch 8]
        [--rounds 5] [--threads 1]

Compares a training step (forward and backward, text tower frozen, captions of up to 25 tokens), the image tower
without gradients, and what follows BERT: the sum of its layers and the pooling of subwords into words. The authors'
classes are imported from the clone, with random weights in place of downloads; a checkpoint in their layout is
converted by `medmoe_hf`, and the losses must agree. Either code runs in a process of its own, as its users run it:
ours keeps freed memory, as `medmoe train` does. The processes take turns. Times are CPU seconds of all threads, median
and range over rounds; ratios are medians of the ratios per round; memory is the peak increase of the process.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from training import peak
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BatchFeature,
    BertConfig,
    BertModel,
    SwinConfig,
    SwinModel,
)
from transformers.models.swin.modeling_swin import SwinDropPath

from medmoe_hf.common.memory import keep_freed_memory
from medmoe_hf.hub.convert import convert_official
from medmoe_hf.model import MedMoEModel, MedMoETokenizer
from medmoe_hf.training.optimizer import freeze, train_mode

LENGTH = 25  # of captions, in tokens
WORDS = 400
PARTS = {"step": "a training step", "image": "the image tower", "after": "after BERT"}


def words_only() -> MedMoETokenizer:
    """Return a tokenizer that knows some words; others are split into characters."""
    return MedMoETokenizer.from_words([f"word{number}" for number in range(WORDS)], max_length=LENGTH)


class Inputs:
    """Random images, a modality for each, and captions of 12 to 17 words, every third of which is split."""

    def __init__(self, batch: int) -> None:
        generator = torch.Generator().manual_seed(1)

        def below(limit: int) -> int:
            return int(torch.randint(limit, (), generator=generator))

        def caption() -> str:
            return " ".join(f"word{below(WORDS)}" + "s" * (i % 3 == 0) for i in range(12 + below(6)))

        settings = {"padding": "max_length", "max_length": LENGTH, "truncation": True, "return_tensors": "pt"}
        self.texts = words_only()([caption() for _ in range(batch)], **settings)
        self.pixels = torch.randn(batch, 3, 224, 224, generator=generator)
        self.labels = torch.arange(batch) % 6


def without_chance(tower: torch.nn.Module) -> None:
    """Switch off Swin's stochastic depth, so that the losses can be compared."""
    for module in tower.modules():
        if isinstance(module, SwinDropPath):
            module.drop_prob = 0.0


def in_place_of_downloads(bert: BertModel, tokenizer: object) -> list[Any]:
    """Return patches that give the authors' classes random towers, and images as they are."""
    objects = {
        SwinModel: SwinModel(SwinConfig()),
        AutoImageProcessor: lambda pixels, **_: BatchFeature({"pixel_values": pixels}),
        AutoModel: bert,
        AutoTokenizer: tokenizer,
    }
    return [mock.patch.object(kind, "from_pretrained", return_value=value) for kind, value in objects.items()]


@dataclass
class Part:
    """A timed call, and what is patched meanwhile."""

    work: Callable[[], object]
    patches: list[Any] = field(default_factory=list)
    repeats: int = 1  # so that the resolution of the clock does not matter


def authors(clone: Path, checkpoint: Path, batch: int) -> dict[str, Part]:
    """Return the parts of the authors' code after saving its weights."""
    sys.path.insert(0, str(clone))
    from src.losses import GLORIAGlobalContrastiveLoss, GLORIALocalContrastiveLoss
    from src.models.components.swin import SWIN
    from src.models.components.text_encoder import BertEncoder

    torch.manual_seed(0)
    tokenizer, given = words_only(), Inputs(batch)
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), output_hidden_states=True)).eval()
    settings = {"bert_type": "", "last_n_layers": 4, "aggregate_method": "sum", "norm": False, "embed_dim": 768}
    with ExitStack() as stack:
        for patch in in_place_of_downloads(bert, SimpleNamespace(get_vocab=tokenizer.get_vocab)):
            stack.enter_context(patch)
        image = SWIN()
        text = BertEncoder(SimpleNamespace(**settings, freeze_bert=True, agg_tokens=True))
    without_chance(image)
    towers = {"model.image_encoder.model.": image, "model.text_encoder.": text}
    weights = {prefix + name: value for prefix, tower in towers.items() for name, value in tower.state_dict().items()}
    torch.save({"state_dict": weights}, checkpoint)

    tokens = given.texts["input_ids"], given.texts["attention_mask"], torch.zeros_like(given.texts["input_ids"])
    global_loss, local_loss = GLORIAGlobalContrastiveLoss(), GLORIALocalContrastiveLoss()

    def step() -> float:
        image.zero_grad(set_to_none=True)
        word_embeds, report_embeds, words = text(*tokens)
        image_embeds, maps, probabilities = image(given.pixels)
        lengths = [sum(not word.startswith("[") for word in caption) + 1 for caption in words]
        local = local_loss(maps, word_embeds, lengths)
        loss = 0.5 * (local.loss0 + local.loss1) + 0.5 * global_loss(image_embeds, report_embeds)
        loss = loss + 2 * torch.nn.functional.cross_entropy(probabilities, given.labels)
        loss.backward()
        return loss.item()

    with torch.no_grad():
        states = bert(*tokens)
    after_bert = mock.patch.object(bert, "forward", return_value=tuple(states.values()))
    return {
        "step": Part(step),
        "image": Part(lambda: image(given.pixels)),
        "after": Part(lambda: text(*tokens), [after_bert], 20),
    }


def ours(checkpoint: Path, batch: int) -> dict[str, Part]:
    """Return the parts of `medmoe_hf` with the weights of the authors' code."""
    folder, given = checkpoint.parent, Inputs(batch)
    words_only().save_pretrained(folder / "tokenizer")
    convert_official(checkpoint, folder / "model", tokenizer=str(folder / "tokenizer"))
    model = MedMoEModel.from_pretrained(folder / "model")
    vision, text = model.vision_model, model.text_model
    freeze(model, ["text_model"])
    train_mode(model)
    without_chance(model)
    keep_freed_memory()

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(pixel_values=given.pixels, **given.texts, modality_labels=given.labels, return_loss=True).loss
        loss.backward()
        return loss.item()

    with torch.no_grad():
        states = text.encoder(given.texts["input_ids"], given.texts["attention_mask"], output_hidden_states=True)
    after_bert = [
        mock.patch.object(text.encoder, "forward", return_value=states),
        # Otherwise a text that occurs twice is encoded once, which does not belong to this part.
        mock.patch.object(text, "_encodes_once", return_value=False),
    ]
    return {
        "step": Part(step),
        "image": Part(lambda: vision(given.pixels)),
        "after": Part(lambda: text(**given.texts), after_bert, 20),
    }


def answer(parts: dict[str, Part]) -> None:
    """Run the parts that are named on standard input; write what they take, and the loss of the step."""
    print("{}", flush=True)  # ready
    results: list[object] = []
    for line in sys.stdin:
        name, what = line.split()
        part = parts[name]
        results.clear()
        with torch.set_grad_enabled(name == "step"), ExitStack() as stack:
            for patch in part.patches:
                stack.enter_context(patch)
            if what == "memory":
                taken = peak(lambda work=part.work: results.append(work()))
            else:
                start = time.process_time()
                results.extend(part.work() for _ in range(part.repeats))
                taken = (time.process_time() - start) / part.repeats
        print(json.dumps({"taken": taken, "loss": results[0] if name == "step" else None}), flush=True)


class Process:
    """A process that holds one of the two implementations."""

    def __init__(self, whose: str, arguments: argparse.Namespace, folder: str) -> None:
        command = [sys.executable, __file__, str(arguments.clone), "--batch", str(arguments.batch)]
        command += ["--threads", str(arguments.threads), "--worker", whose, folder]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._read()

    def __call__(self, part: str, what: str = "time") -> dict[str, Any]:
        self.process.stdin.write(f"{part} {what}\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("A worker ended: call this script with `--worker authors FOLDER` to see why.")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clone", type=Path, help="a clone of the authors' repository")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="what to compare")
    parser.add_argument("--batch", type=int, default=8, help="batch size")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    parser.add_argument("--threads", type=int, default=1, help="number of threads")
    parser.add_argument("--worker", nargs=2, metavar=("WHOSE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not (arguments.clone / "src" / "losses.py").is_file():
        raise SystemExit(f"{arguments.clone} has no src/losses.py; it should be a clone of the authors' repository.")
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    if arguments.worker:
        whose, folder = arguments.worker
        checkpoint = Path(folder) / "authors.ckpt"
        is_ours = whose == "ours"
        answer(ours(checkpoint, arguments.batch) if is_ours else authors(arguments.clone, checkpoint, arguments.batch))
        return
    with tempfile.TemporaryDirectory() as folder:
        both = [Process(whose, arguments, folder) for whose in ("authors", "ours")]
        print(
            f"Batch {arguments.batch}, threads: {arguments.threads}\n{'':20}{'authors':>26}{'ours':>26}{'speed':>18}"
        )
        for part in arguments.parts:
            warm = [process(part) for process in both]
            memory = [process(part, "memory")["taken"] for process in both]
            seconds = [[process(part)["taken"] for process in both] for _ in range(arguments.rounds)]
            ratios = [theirs / own for theirs, own in seconds]
            columns = [
                f"{statistics.median(times):.4f} s, {grown:.0f} MiB"
                for times, grown in zip(zip(*seconds, strict=True), memory, strict=True)
            ]
            speed = f"{statistics.median(ratios):.2f}x ({min(ratios):.1f}-{max(ratios):.1f})"
            print(f"{PARTS[part]:20}{columns[0]:>26}{columns[1]:>26}{speed:>18}", flush=True)
            if part == "step":
                losses = [one["loss"] for one in warm]
                print(f"    losses {losses[0]:.6f} and {losses[1]:.6f}")
                if not math.isclose(*losses, rel_tol=1e-5):
                    raise SystemExit("The losses differ: this is another version of the authors' code, or an error.")
        for process in both:
            process.process.stdin.close()
            process.process.wait()


if __name__ == "__main__":
    main()
