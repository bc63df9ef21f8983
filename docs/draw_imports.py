"""Draw the imports between the subpackages of `medmoe_hf`, and check that they follow the layers.

    python docs/draw_imports.py [--output docs/pages/imports.svg]

`LAYERS` lists the subpackages (folders and files directly in `medmoe_hf/`) from the lowest to the highest. A
subpackage may import from lower layers only, and files may not import each other in a cycle. Imports inside functions
and imports for type checkers count too. The exit status is 1 if an import breaks these rules.
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
    "model": "Model, losses, configuration and processing; its files travel with every checkpoint",
    "errors": "The error classes of the package",
    "common": "Files, YAML, logging and progress bars",
    "data": "Sources, streaming, captions, held-out data, phantoms",
    "inference": "Encoders: images and texts to embeddings",
    "search": "Bulk encoding, index and search",
    "evaluation": "Protocols, recipes, metrics and reports",
    "training": "Training loop, negatives, checkpoints, adapters",
    "hub": "Conversion, publishing, model cards, export, demo",
    "cli": "The medmoe command",
}
COLOURS = [
    "#5c6bc0",
    "#00897b",
    "#e65100",
    "#8e24aa",
    "#1565c0",
    "#c2185b",
    "#558b2f",
    "#6d4c41",
    "#455a64",
    "#f9a825",
]
ENTRY_POINTS = ("__init__", "__main__")  # they only expose what subpackages define


def modules() -> dict[str, Path]:
    """Return the file of each module, by its dotted name below the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == "checkpoints":
            continue  # copies of the code in `model`
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name or "__init__"] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules of the package that a module imports.

    Args:
        name: Dotted name of the module below the package.
        path: File of the module.
        known: All modules of the package.
    """
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
    """Return the modules of the package that each module imports."""
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return groups of modules that import each other (Tarjan's strongly connected components)."""
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


def subpackage(module: str) -> str:
    return module.split(".")[0]


def subpackage_imports(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the subpackages that each subpackage imports from."""
    result: dict[str, set[str]] = defaultdict(set)
    for name, targets in edges.items():
        result[subpackage(name)] |= {subpackage(target) for target in targets} - {subpackage(name)}
    return dict(result)


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Return the imports that do not point to a lower layer, as `module -> module`."""
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    found = []
    for name, targets in sorted(edges.items()):
        importer = subpackage(name)
        if importer in ENTRY_POINTS:
            continue
        for target in sorted(targets):
            imported = subpackage(target)
            if imported != importer and (imported in ENTRY_POINTS or level[imported] >= level[importer]):
                found.append(f"{name} -> {target}")
    return found


def draw(edges: dict[str, set[str]]) -> str:
    """Return an SVG: a box per subpackage, and a line per importer with a dot at everything that it imports."""
    left, width, height, row, lane = 12, 560, 50, 64, 30
    order = [name for layer in reversed(LAYERS) for name in layer]
    top = {name: 12 + row * number for number, name in enumerate(order)}
    used = subpackage_imports(edges)
    importers = [name for name in order if used.get(name, set()) & set(order)]
    right = left + width
    # The highest importer has the rightmost lane, so that its line starts without crossing another one.
    lanes = {name: right + 28 + lane * number for number, name in enumerate(reversed(importers))}
    colour = dict(zip(reversed(order), COLOURS, strict=True))
    total = (max(lanes.values(), default=right) + 16, 12 + row * len(order))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total[0]} {total[1]}" font-family="sans-serif">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#90a4ae"/></marker></defs>',
        f'<rect width="{total[0]}" height="{total[1]}" fill="#ffffff"/>',
    ]
    # Subpackages of one layer share a frame.
    for layer in LAYERS:
        if len(layer) > 1:
            first, last = min(top[name] for name in layer), max(top[name] for name in layer)
            parts.append(
                f'<rect x="{left - 6}" y="{first - 6}" width="{width + 12}" height="{last - first + height + 12}" '
                'rx="8" fill="none" stroke="#90a4ae" stroke-dasharray="4 3"/>'
            )
    # What is imported: a grey line into its box, from the farthest lane that needs it.
    for name in order:
        users = [other for other in importers if name in used[other]]
        if users:
            y = top[name] + height - 14
            parts.append(
                f'<path d="M{max(lanes[user] for user in users)} {y}H{right + 1}" fill="none" stroke="#90a4ae" '
                'stroke-width="1.4" marker-end="url(#head)"/>'
            )
    # What imports: a coloured line out of its box and down to the lowest subpackage that it needs.
    for name in importers:
        x, start = lanes[name], top[name] + 14
        targets = [top[target] + height - 14 for target in order if target in used[name]]
        parts.append(
            f'<path d="M{right} {start}H{x - 8}Q{x} {start} {x} {start + 8}V{max(targets)}" fill="none" '
            f'stroke="{colour[name]}" stroke-width="2.2"/>'
        )
        parts += [f'<circle cx="{x}" cy="{y}" r="4.5" fill="{colour[name]}"/>' for y in targets]
    for name in order:
        y = top[name]
        parts += [
            f'<rect x="{left}" y="{y}" width="{width}" height="{height}" rx="5" fill="#f4f6fb" stroke="#c5cae9"/>',
            f'<rect x="{left}" y="{y}" width="7" height="{height}" rx="3" fill="{colour[name]}"/>',
            f'<text x="{left + 18}" y="{y + 21}" font-size="16" font-weight="bold" fill="#212121">{name}</text>',
            f'<text x="{left + 18}" y="{y + 40}" font-size="13" fill="#424242">{escape(PURPOSE[name])}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "pages" / "imports.svg")
    arguments = parser.parse_args()
    edges = graph()
    arguments.output.write_text(draw(edges), encoding="utf-8")
    print(f"Wrote {arguments.output.name}: {len(edges)} modules, {sum(map(len, edges.values()))} imports.")
    problems = [f"Not to a lower layer: {one}" for one in upward(edges)]
    problems += [f"Cycle: {', '.join(group)}" for group in cycles(edges)]
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
