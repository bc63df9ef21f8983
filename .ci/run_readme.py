"""Runs every block of the README as printed, in order, in a folder that holds the quickstart's output.

    python .ci/run_readme.py FOLDER     (a folder that contains quickstart/)

YAML blocks are written to the file that their first line names. Commands of pip are skipped, and so are the quickstart
itself, which has run before, and the tests. The Hub is a server on this machine, from the tests.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = ("pip install",)

sys.path.insert(0, str(ROOT / "tests" / "hub"))
from loopback_hub import Account, LoopbackHub  # noqa: E402


def main(folder: Path) -> None:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    with LoopbackHub() as hub:
        hub.accounts["hf_write"] = Account("you")
        environment = hub.environment(folder / "home", "hf_write")
        for kind, text in blocks:
            print(f"\n--- {kind}\n{text}", end="", flush=True)
            if kind == "yaml":
                name = re.match(r"# (\S+\.yaml)\n", text)
                assert name is not None, "the block does not name its file"
                (folder / name[1]).write_text(text, encoding="utf-8")
            elif kind == "python":
                subprocess.run([sys.executable, "-c", text], cwd=folder, env=environment, check=True)
            elif not text.startswith(SKIPPED):
                subprocess.run(["bash", "-euo", "pipefail", "-c", text], cwd=folder, env=environment, check=True)
        assert hub.unknown == [], hub.unknown
    print("\nok: the README runs as printed")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
