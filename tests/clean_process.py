"""Programs that run where this package does not exist.

Each is a process of its own, forked from one that has imported torch, torchvision and scikit-learn and nothing else:
importing these is two thirds of what loading a checkpoint takes.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = """
import json, os, signal, sys, types
import sklearn.metrics, torch, torchvision
torch.set_num_threads(1)
while line := sys.stdin.readline():
    job = json.loads(line)
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    signal.alarm(1800)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for number, path in enumerate((os.devnull, job["stdout"], job["stderr"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.argv = ["-c", *job["arguments"]]
    # its own, empty: a program that has forgotten an import must not find ours
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    sys.modules["medmoe_hf"] = None
    exec(compile(job["code"], "<clean process>", "exec"), vars(main))
    break
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-I", "-c", SERVER]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_clean(code: str, *arguments: object, folder: Path, **environment: object) -> str:
    """Runs a program in `folder`, with changes to the environment, and returns what it has printed.

    Raises:
        AssertionError: If the program fails; the message ends with its standard error.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as scratch:
        stdout, stderr = Path(scratch, "stdout"), Path(scratch, "stderr")
        job = {
            "code": code,
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder),
            "environment": os.environ | {name: str(value) for name, value in environment.items()},
            "stdout": str(stdout),
            "stderr": str(stderr),
        }
        print(json.dumps(job), file=server.stdin, flush=True)
        ended = server.stdout.readline().strip()
        assert ended == "0", f"ended with {ended}: {stderr.read_text()[-5000:] if stderr.is_file() else ''}"
        return stdout.read_text()
