"""Draws which rooms of the package import which, and checks that every import points down.

    python docs/draw_imports.py [--output docs/pages/imports.svg]

A room is a folder or a file directly in `medmoe_hf/`. `LAYERS` lists them from the ground up; a room may import from
lower layers only. Inside a room, files may import each other as long as they form no circle. Imports inside functions
and for type checkers count too.
"""

import argparse
import ast
from collections import defaultdict
from html import escape
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "medmoe_hf"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("model",),
    ("errors",),
    ("common",),
    ("data",),
    ("inference",),
    ("evaluation", "search"),
    ("training",),
    ("hub",),
    ("cli",),
)
PURPOSE = {
    "model": "travels to the Hub with every checkpoint",
    "errors": "what a user can mend",
    "common": "files, YAML, logging",
    "data": "any source to a stream of image, caption, modality",
    "inference": "images and texts to embeddings",
    "evaluation": "protocols and recipes",
    "search": "bulk encoding and index",
    "training": "the Accelerate loop, negatives, checkpoints",
    "hub": "convert, publish, model card, demo page",
    "cli": "the medmoe command: parsing only",
}
FACES = ("__init__", "__main__")  # they hand on what rooms define


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name or "__init__"] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("medmoe_hf.") for alias in node.names if alias.name.startswith("medmoe_hf.")
            }
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *(node.module or "").split(".")]).strip(
                    "."
                )
            elif (node.module or "").split(".")[0] == "medmoe_hf":
                base = (node.module or "").removeprefix("medmoe_hf").strip(".")
            else:
                continue
            for alias in node.names:
                full = f"{base}.{alias.name}".strip(".")
                found.add(full if full in known else base)
    return {target for target in found if target in known and target not in ("", name)}


def graph() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(edges[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            start = stack.index(node)
            group = stack[start:]
            del stack[start:]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def rooms(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Room -> rooms that it imports from."""
    result: dict[str, set[str]] = defaultdict(set)
    for name, targets in edges.items():
        room = name.split(".")[0]
        result[room] |= {target.split(".")[0] for target in targets} - {room}
    return dict(result)


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports that do not point to a lower layer, as `module -> module`."""
    floor = {room: number for number, layer in enumerate(LAYERS) for room in layer}
    wrong = []
    for name, targets in sorted(edges.items()):
        room = name.split(".")[0]
        if room in FACES:
            continue
        for target in sorted(targets):
            other = target.split(".")[0]
            if other != room and (other in FACES or floor[other] >= floor[room]):
                wrong.append(f"{name} -> {target}")
    return wrong


def draw(edges: dict[str, set[str]]) -> str:
    """The rooms as an SVG, a layer per row, an arrow per import."""
    lines = {room: 0 for layer in LAYERS for room in layer}
    for name, path in modules().items():
        if name.split(".")[0] in lines:
            lines[name.split(".")[0]] += len(path.read_text(encoding="utf-8").splitlines())
    width, row, box_height = 760, 92, 52
    top = len(LAYERS)
    box: dict[str, tuple[float, float, float]] = {}
    for number, layer in enumerate(LAYERS):
        box_width = 330 if len(layer) > 1 else 400
        gap = 24
        start = (width - len(layer) * box_width - (len(layer) - 1) * gap) / 2
        for place, room in enumerate(layer):
            box[room] = (start + place * (box_width + gap), 12 + (top - 1 - number) * row, box_width)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top * row + 8}" font-family="sans-serif">',
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#5b6b8c"/></marker></defs>',
        f'<rect width="{width}" height="{top * row + 8}" fill="#ffffff"/>',
    ]
    for room, targets in sorted(rooms(edges).items()):
        if room not in box:
            continue
        ordered = sorted((target for target in targets if target in box), key=lambda target: box[target][1])
        for count, target in enumerate(ordered):
            x, y, w = box[room]
            x1 = x + w * (count + 1) / (len(ordered) + 1)
            y1 = y + box_height
            tx, ty, tw = box[target]
            # Each importing room has a place of its own along the upper edge of the room it imports.
            importers = [name for name in box if target in rooms(edges).get(name, set())]
            x2 = tx + tw * (importers.index(room) + 1) / (len(importers) + 1)
            bend = (ty - y1) / 2
            parts.append(
                f'<path d="M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {ty - bend:.0f} {x2:.0f} {ty - 2:.0f}"'
                ' fill="none" stroke="#5b6b8c" stroke-opacity="0.55" stroke-width="1.3" marker-end="url(#a)"/>'
            )
    for room, (x, y, w) in box.items():
        parts += [
            f'<rect x="{x:.0f}" y="{y}" width="{w}" height="{box_height}" rx="7" fill="#eef2fb" stroke="#3f51b5"/>',
            f'<text x="{x + 14:.0f}" y="{y + 22}" font-size="15" font-weight="bold" fill="#1a237e">{room}</text>',
            f'<text x="{x + w - 14:.0f}" y="{y + 22}" font-size="12" fill="#5b6b8c" text-anchor="end">'
            f"{lines[room]:,} lines</text>",
            f'<text x="{x + 14:.0f}" y="{y + 41}" font-size="12.5" fill="#333">{escape(PURPOSE[room])}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "pages" / "imports.svg")
    arguments = parser.parse_args()
    edges = graph()
    arguments.output.write_text(draw(edges), encoding="utf-8")
    print(f"Wrote {arguments.output.name}: {len(edges)} modules, {sum(map(len, edges.values()))} imports.")
    problems = [f"points up: {one}" for one in upward(edges)]
    problems += [f"circle: {', '.join(group)}" for group in circles(edges)]
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
