"""Draw the figure of the architecture in docs/pages/concepts.md.

    python docs/draw_architecture.py [--output docs/pages/architecture.svg]

The output may be an SVG or a PNG file.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

from medmoe_hf.data import MODALITIES, phantom_sample

INK, FAINT = "#263238", "#90a4ae"
IMAGE, TEXT, ROUTER, EXPERT, LOSS = "#d6e6f5", "#e3efd9", "#fbe6c8", "#f5d5d5", "#eceff1"
SELECTED = "#c0392b"
SAMPLE = phantom_sample(0, 19, image_size=96, modalities=["xray"])
SCALES = ("#1f5f99", "#3f8cc9", "#7db4df", "#b5d4ec")  # of the levels of the pyramid, finest first


def box(
    axes: Axes, left: float, bottom: float, width: float, height: float, text: str, colour: str, size: float = 9
) -> None:
    """Draw a labelled box, in the units of the figure (160 x 84)."""
    shape = FancyBboxPatch(
        (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=1", facecolor=colour, edgecolor=INK, lw=0.9
    )
    axes.add_patch(shape)
    axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", size=size, color=INK)


def arrow(axes: Axes, *points: tuple[float, float], colour: str = INK, dashed: bool = False) -> None:
    """Draw a line through points, with an arrowhead at the last one."""
    style: dict[str, Any] = {"color": colour, "lw": 1.2, "linestyle": (0, (4, 2)) if dashed else "-"}
    if len(points) > 2:
        axes.plot(*zip(*points[:-1], strict=True), solid_joinstyle="round", solid_capstyle="butt", **style)
    axes.add_patch(FancyArrowPatch(*points[-2:], arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0, **style))


def note(axes: Axes, x: float, y: float, text: str, size: float = 8, colour: str = INK, align: str = "center") -> None:
    axes.text(x, y, text, ha=align, va="center", size=size, color=colour)


def draw_image_tower(axes: Axes) -> None:
    axes.imshow(SAMPLE["image"].convert("L"), cmap="gray", extent=(2, 18, 54, 70), interpolation="nearest", zorder=2)
    axes.add_patch(Rectangle((2, 54), 16, 16, fill=False, edgecolor=INK, lw=0.9, zorder=3))
    note(axes, 10, 72.5, "image")
    arrow(axes, (18, 62), (23, 62))

    box(axes, 23, 52, 15, 20, "Swin\nTransformer\n(or a timm\nmodel)", IMAGE)
    arrow(axes, (38, 62), (42.5, 62))
    note(axes, 47.5, 79, "feature pyramid")
    for level, (side, colour) in enumerate(zip((56, 28, 14, 7), SCALES, strict=True)):
        width, top = 10 - 2 * level, 76 - 7.4 * level
        axes.add_patch(Rectangle((43, top - 5.4), width, 5.4, facecolor=colour, edgecolor=INK, lw=0.8))
        note(axes, 44 + width, top - 2.7, f"{side}²", 7.5, align="left")


def draw_experts(axes: Axes) -> None:
    arrow(axes, (59, 62), (64, 62))
    note(axes, 80, 81.5, "one expert per modality; only the selected one is computed")
    selected = "xray"
    for index, name in enumerate(MODALITIES):
        on, bottom = name == selected, 73.5 - 4.7 * index
        axes.add_patch(
            FancyBboxPatch(
                (64, bottom),
                16,
                3.9,
                boxstyle="round,pad=0,rounding_size=0.6",
                facecolor=EXPERT if on else "white",
                edgecolor=SELECTED if on else FAINT,
                lw=1.6 if on else 0.8,
            )
        )
        note(axes, 72, bottom + 1.95, name, 8, SELECTED if on else FAINT)
    # The inside of the selected expert.
    axes.add_patch(
        FancyBboxPatch(
            (86, 50), 31, 28, boxstyle="round,pad=0,rounding_size=1", facecolor="#fdf3f3", edgecolor=SELECTED, lw=1.2
        )
    )
    axes.plot((80, 86), (77.4, 78), color=SELECTED, lw=0.7)
    axes.plot((80, 86), (73.5, 50), color=SELECTED, lw=0.7)
    for level, colour in enumerate(SCALES):
        bottom = 71.6 - 5.2 * level
        axes.add_patch(Rectangle((88, bottom), 13, 4, facecolor="white", edgecolor=INK, lw=0.7))
        note(axes, 94.5, bottom + 2, "3 convolutions", 6.3)
        axes.add_patch(Rectangle((104, bottom), 4, 4, facecolor=colour, edgecolor=INK, lw=0.7))
        arrow(axes, (101, bottom + 2), (104, bottom + 2))
        axes.plot((108, 111), (bottom + 2, 66), color=INK, lw=0.8)
    note(axes, 112.8, 66, "Σ β", 9.5)
    note(axes, 101.5, 53.1, "sum weighted by a softmax β over\nthe scales, at each position", 6.8)
    arrow(axes, (115.3, 66), (122, 66))

    # The mask of the finding, as an illustration of a local map.
    cells = np.asarray(SAMPLE["mask"].convert("L").resize((8, 8), Image.Resampling.BOX)) / 255
    axes.pcolormesh(
        np.linspace(122, 136, 9),
        np.linspace(73, 59, 9),
        0.08 + 0.55 * cells,
        cmap="Reds",
        vmin=0,
        vmax=1,
        edgecolor="white",
        lw=0.5,
    )
    note(axes, 129, 75.5, "local map $V$, 56²")


def draw_text_tower(axes: Axes) -> None:
    box(axes, 2, 5, 16, 17, '"Frontal chest\nradiograph with\na small pleural\neffusion ..."', "white", 7.6)
    note(axes, 10, 24.5, "report")
    arrow(axes, (18, 13.5), (23, 13.5))
    box(axes, 23, 5, 15, 17, "BERT\n(any BERT-like\nencoder)", TEXT)
    arrow(axes, (38, 9), (112, 9))
    for index, word in enumerate(("small", "pleural", "effusion")):
        box(axes, 112 + 9.2 * index, 6.8, 8.6, 4.4, word, TEXT, 7.4)
    note(axes, 125.5, 4.2, "words $t_i$: subwords pooled to words")
    arrow(axes, (38, 18.5), (112, 18.5))
    box(axes, 112, 16, 27, 5, "report embedding $t_g$", TEXT, 8.5)


def draw_routers(axes: Axes) -> None:
    box(axes, 46, 26, 18, 6, "report router", ROUTER)
    box(axes, 46, 37, 18, 6, "image router", ROUTER)
    # The image router reads the backbone, below the image tower in the figure.
    arrow(axes, (30.5, 52), (30.5, 40), (46, 40))
    note(axes, 31.5, 47, "mean", 7.5, align="left")
    arrow(axes, (55, 18.5), (55, 26))
    box(axes, 69.5, 31.5, 13, 6, "arg max", ROUTER, 8.5)
    arrow(axes, (64, 40), (67, 40), (67, 35.6), (69.5, 35.6))
    arrow(axes, (64, 29), (67, 29), (67, 33.4), (69.5, 33.4))
    arrow(axes, (72, 37.5), (72, 49.6), colour=SELECTED)
    note(axes, 73.2, 44, "expert $k^*$", 8, SELECTED, "left")
    note(axes, 88.5, 34.5, "a given modality\noverrides both", 7.5, align="left")
    arrow(axes, (88, 34.5), (82.5, 34.5), dashed=True)
    box(axes, 111, 37, 29, 6, "image embedding $v_g$", IMAGE)
    arrow(axes, (101.5, 50), (101.5, 40), (111, 40))
    note(axes, 103, 46.6, "mean of $V$, of the Swin's\ntokens, or both (by preset)", 7.5, align="left")


def draw_losses(axes: Axes) -> None:
    arrow(axes, (140, 40), (143, 40), (143, 33))
    arrow(axes, (139, 18.5), (143, 18.5), (143, 25))
    box(axes, 137, 25, 20, 8, "global loss:\nimage and report", LOSS, 8)
    arrow(axes, (136, 66), (150, 66), (150, 57))
    box(axes, 143, 47.5, 15, 9.5, "local loss:\nwords and\nregions", LOSS, 8)
    arrow(axes, (139.2, 9), (159, 9), (159, 43.5), (150, 43.5), (150, 47.5))
    box(axes, 84, 23.6, 22, 7, "modality loss\nof both routers", LOSS, 7.8)
    arrow(axes, (64, 27.2), (84, 27.2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parent / "pages" / "architecture.svg"
    parser.add_argument("--output", type=Path, default=default, help="SVG or PNG file")
    output = parser.parse_args().output
    matplotlib.use("Agg")
    # Makes the output reproducible.
    plt.rcParams.update({"svg.hashsalt": "medmoe", "mathtext.fontset": "dejavusans"})
    figure, axes = plt.subplots(figsize=(11, 5.78))
    for draw in (draw_image_tower, draw_experts, draw_text_tower, draw_routers, draw_losses):
        draw(axes)
    axes.set(xlim=(0, 160), ylim=(0, 84), aspect="equal")
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    figure.savefig(output, facecolor="white", dpi=130, metadata={"Date": None} if output.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
