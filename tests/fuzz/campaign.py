"""Runs the fuzzing: `python tests/fuzz/campaign.py --harness dicom --seconds 3600 --out findings`.

Each harness runs in a child process, so that a crash of native code, a hang and a lack of memory are seen: with
Atheris, guided by coverage, where it is installed; otherwise with our own mutators, guided by the kinds of answers,
and equal at each run. A finding is an exception that is not of the package, a wrong result, an execution of more than
5 s, a growth of more than 256 MiB, and the end of the process. Its input is saved, with what happened beside it.
"""

import argparse
import collections
import contextlib
import hashlib
import importlib
import importlib.util
import json
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

from harnesses import HARNESSES, MAX_BYTES, Allowed, Harness  # noqa: E402

SECONDS_PER_EXECUTION = 5.0
_WAITING = 12  # times as long, until an execution that waits counts as one that works
BYTES_PER_EXECUTION = 256 * 2**20
_PER_KIND = 3  # inputs that are saved of equal findings
_KEPT = 400  # inputs that the mutators without coverage start from
_HEADER = 40  # bytes of the shared page before the input, see `Guard._note`


class Guard:
    """Runs a harness, and notes what is wrong.

    Args:
        harness: What is run.
        out: Folder for findings; None to raise them instead.
        page: Shared with the parent process, which sees what was running when this one ends.
    """

    def __init__(self, harness: Harness, out: Path | None = None, page: Any = None) -> None:
        from medmoe_hf.errors import MedMoEError

        self.harness, self.out, self.page, self.passed = harness, out, page, (MedMoEError, Allowed)
        self.executions = int.from_bytes(page[:8], "little") if page is not None else 0
        self.kinds: collections.Counter[str] = collections.Counter()
        self.base = _peak_memory()

    def run(self, content: bytes) -> str:
        """Runs one input.

        Returns:
            What kind of answer it gave: equal for inputs that were handled alike.
        """
        self.executions += 1
        started = time.process_time(), time.monotonic()
        self._note(content, True)
        kind, problem = "read", ""
        try:
            self.harness.run(content)
        except self.passed as error:
            kind = _kind_of(error)
        except Exception as error:
            kind = _kind_of(error)
            problem = "".join(traceback.format_exception(error))
        # Of this process: on a busy machine it may have to wait, which is no fault of the reader.
        seconds, waited, peak = time.process_time() - started[0], time.monotonic() - started[1], _peak_memory()
        self._note(b"", False)
        if peak - self.base > BYTES_PER_EXECUTION:
            kind, problem = f"memory {kind}", f"growth of {(peak - self.base) / 2**20:.0f} MiB\n{problem}"
            _reset_peak_memory()
        elif peak > self.base:
            self.base = max(self.base, min(peak, self.base + 2**20))  # caches may grow, slowly
        if seconds > SECONDS_PER_EXECUTION or waited > _WAITING * SECONDS_PER_EXECUTION:
            kind, problem = f"time {kind}", f"{seconds:.1f} s, {waited:.1f} s with waiting\n{problem}"
        if problem:
            self._found(kind, problem, content)
        return kind

    def _note(self, content: bytes, running: bool) -> None:
        """Shares executions, time of the start, length, whether it runs (byte 24), processor time, and the input."""
        if self.page is None:
            return
        if running:
            self.page[_HEADER : _HEADER + len(content)] = content
            self.page[16:24] = len(content).to_bytes(8, "little")
            self.page[8:16] = time.monotonic_ns().to_bytes(8, "little")
            self.page[32:40] = time.process_time_ns().to_bytes(8, "little")
            self.page[:8] = self.executions.to_bytes(8, "little")
        self.page[24:25] = bytes([running])

    def _found(self, kind: str, problem: str, content: bytes) -> None:
        if self.out is None:
            raise AssertionError(f"{len(content)} bytes {content[:200]!r}...\n{problem}")
        self.kinds[kind] += 1
        if self.kinds[kind] <= _PER_KIND:
            save(self.out, kind, problem, content)


def save(out: Path, kind: str, problem: str, content: bytes) -> None:
    """Saves the input of a finding, `NAME.bin`, and what happened, `NAME.txt`."""
    out.mkdir(parents=True, exist_ok=True)
    name = f"{hashlib.sha256(kind.encode()).hexdigest()[:8]}-{hashlib.sha256(content).hexdigest()[:8]}"
    (out / f"{name}.bin").write_bytes(content)
    (out / f"{name}.txt").write_text(f"{kind}\n{problem}", encoding="utf-8", errors="replace")


def _kind_of(error: BaseException) -> str:
    """Returns type and place of an error and of those that led to it."""
    parts = []
    one: BaseException | None = error
    while one is not None and len(parts) < 4:
        places = [f"{Path(code.co_filename).name}:{line}" for code, line in _frames(one)]
        parts.append(f"{type(one).__name__} {' '.join(places[-4:])}")
        one = one.__cause__ or one.__context__
    return " < ".join(parts)


def _frames(error: BaseException) -> Iterator[tuple[Any, int]]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_code, trace.tb_lineno
        trace = trace.tb_next


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def deterministic(harness: Harness, guard: Guard, executions: int | None, seconds: float | None, seed: int) -> None:
    """Runs inputs of our own mutators: equal ones for equal seeds, as long as their number and not the time ends them.

    Args:
        harness: What is run.
        guard: Its guard.
        executions: Number of inputs; None for no limit.
        seconds: Time; None for no limit.
        seed: Of the generator.
    """
    rng = random.Random(seed)
    pool = harness.seeds()
    until = None if seconds is None else time.monotonic() + seconds
    answers = set()
    for content in pool:
        answers.add(guard.run(content))
    done = len(pool)
    while (executions is None or done < executions) and (until is None or time.monotonic() < until):
        content = harness.mutate(rng.choice(pool), rng, MAX_BYTES)
        answer = guard.run(content)
        done += 1
        if answer not in answers:
            answers.add(answer)
            if len(pool) < _KEPT:
                pool.append(content)
            else:
                pool[rng.randrange(len(pool))] = content


def _with_atheris(harness: Harness, guard: Guard, corpus: Path, seconds: int, seed: int) -> None:
    import atheris

    def mutate(data: bytes, maximum: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.2:
            return atheris.Mutate(data, maximum)
        try:
            return harness.mutate(data, rng, maximum)
        except Exception:  # it would end Atheris without a word
            return atheris.Mutate(data, maximum)

    corpus.mkdir(parents=True, exist_ok=True)
    for content in harness.seeds():
        (corpus / hashlib.sha1(content).hexdigest()).write_bytes(content)
    options = (f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", f"-seed={seed}")
    # Time and memory are measured by the guard and the parent process.
    quiet = (
        "-rss_limit_mb=0",
        "-timeout=600",
        "-print_final_stats=0",
        "-verbosity=0",
        "-detect_leaks=0",
        f"-artifact_prefix={corpus.parent}/native-",
    )
    atheris.Setup([sys.argv[0], *options, *quiet, str(corpus)], lambda data: guard.run(data) and None,
                  custom_mutator=mutate)  # fmt: skip
    atheris.Fuzz()


def child(arguments: argparse.Namespace) -> None:
    """Fuzzes one harness in this process, until the time is over."""
    warnings.simplefilter("ignore")
    os.environ["MEDMOE_STRICT_READERS"] = "1"
    import logging

    logging.disable(logging.CRITICAL)
    harness = HARNESSES[arguments.harness]
    guided = _has_atheris() and not arguments.own
    if guided:
        import atheris

        with atheris.instrument_imports(include=list(harness.instrumented)):
            _warm(harness)
    else:
        _warm(harness)
    with open(arguments.page, "r+b") as file:
        page = mmap.mmap(file.fileno(), 0)
    page[25:26] = b"\1"  # imported
    out = Path(arguments.out)
    guard = Guard(harness, out / "findings", page)
    limit = guard.base + 8 * BYTES_PER_EXECUTION
    with contextlib.suppress(ValueError, OSError):
        # More than this at once ends in a MemoryError, and not with the machine.
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
    if guided and arguments.executions is None:
        _with_atheris(harness, guard, out / "corpus", int(arguments.seconds), arguments.seed)
    else:
        deterministic(harness, guard, arguments.executions, arguments.seconds, arguments.seed)


def _warm(harness: Harness) -> None:
    """Imports everything that a harness uses, before time and memory count."""
    for module in harness.modules:
        importlib.import_module(module)
    for content in harness.seeds():
        with contextlib.suppress(Exception):
            harness.run(content)


def _has_atheris() -> bool:
    return importlib.util.find_spec("atheris") is not None


def run(
    name: str, seconds: float, out: Path, seed: int, own: bool = False, most: int | None = None
) -> tuple[int, int, float]:
    """Fuzzes one harness in child processes, which are started again after a crash or a hang.

    Args:
        name: Name of the harness.
        seconds: Time for all of them, without their start.
        out: Folder for findings and, with Atheris, the corpus.
        seed: Of the generators.
        own: Whether to use our own mutators even where Atheris is installed.
        most: Number of executions by our own mutators, which are then the same on every machine; None for no limit.

    Returns:
        Executions, different findings, and seconds.
    """
    out.mkdir(parents=True, exist_ok=True)
    spent = 0.0
    with tempfile.TemporaryDirectory(
        prefix="medmoe_fuzz_", dir="/dev/shm" if os.path.isdir("/dev/shm") else None
    ) as work:
        page_path = Path(work) / "page"
        page_path.write_bytes(b"\0" * (_HEADER + 2 * MAX_BYTES))
        with open(page_path, "r+b") as file:
            page = mmap.mmap(file.fileno(), 0)
        while spent < seconds:
            page[24:26] = b"\0\0"
            command = [
                sys.executable,
                __file__,
                "--child",
                "--harness",
                name,
                "--page",
                str(page_path),
                "--out",
                str(out),
            ]
            command += ["--seconds", str(max(1, round(seconds - spent))), "--seed", str(seed)] + ["--own"] * own
            command += [] if most is None else ["--executions", str(most)]
            folder = tempfile.mkdtemp(dir=work)
            with open(out / "log.txt", "ab") as log:
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, env={**os.environ, "MEDMOE_FUZZ_FOLDER": folder}
                )
                try:
                    spent += _watch(process, page, out, seconds - spent)
                finally:
                    if process.poll() is None:
                        process.kill()
                        process.wait()
            if most is not None and process.returncode == 0:
                break
            seed += 1
        executions = int.from_bytes(page[:8], "little")
        page.close()
    kinds = {path.name.split("-")[0] for path in (out / "findings").glob("*.bin")}
    return executions, len(kinds), spent


def _watch(process: Any, page: Any, out: Path, seconds: float) -> float:
    """Waits for a child, which ends by itself after some seconds; returns those in which it fuzzed."""
    begun = None
    while process.poll() is None:
        time.sleep(0.2)
        if begun is None and page[25]:
            begun = time.monotonic()
        if begun is not None and not page[24] and time.monotonic() > begun + seconds + 60:
            process.kill()
            process.wait()
            raise SystemExit(f"the fuzzing does not end: see {out / 'log.txt'}")
        worked = _processor_time(process.pid) - int.from_bytes(page[32:40], "little") / 1e9
        waited = (time.monotonic_ns() - int.from_bytes(page[8:16], "little")) / 1e9
        if page[24] and max(worked, waited / _WAITING) > 2 * SECONDS_PER_EXECUTION:
            # An execution that ends by itself is noted by the guard; this one does not.
            _save_running(page, out, "hang", f"{worked:.0f} s, {waited:.0f} s with waiting")
            process.send_signal(signal.SIGKILL)
            process.wait()
            break
    else:
        if page[24]:
            _save_running(page, out, f"end of the process {process.returncode}", "see log.txt")
        elif process.returncode not in (0, 77):
            raise SystemExit(f"the fuzzing could not run: see {out / 'log.txt'}")
    return max(1.0, time.monotonic() - begun) if begun is not None else 1.0


def _processor_time(process: int) -> float:
    """Returns the seconds that a process has worked; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _save_running(page: Any, out: Path, kind: str, problem: str) -> None:
    size = int.from_bytes(page[16:24], "little")
    save(out / "findings", kind, problem, bytes(page[_HEADER : _HEADER + size]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--harness", default="all", choices=["all", *HARNESSES])
    parser.add_argument("--seconds", type=float, default=60, help="for each harness")
    parser.add_argument("--out", default="fuzzing", help="folder for findings, corpora and logs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--own", action="store_true", help="our own mutators, even where Atheris is installed")
    parser.add_argument("--executions", type=int, help="by our own mutators, for each harness: equal on all machines")
    for hidden in ("--child", "--page"):
        parser.add_argument(
            hidden, help=argparse.SUPPRESS, **({"action": "store_true"} if hidden == "--child" else {})
        )
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return 0
    print("guided by coverage (Atheris)" if _has_atheris() and not arguments.own else "our own mutators")
    total = found = 0
    results = {}
    for name in HARNESSES if arguments.harness == "all" else [arguments.harness]:
        executions, findings, spent = run(
            name, arguments.seconds, Path(arguments.out) / name, arguments.seed, arguments.own, arguments.executions
        )
        rate = executions / max(spent, 1e-9)
        print(f"{name:12} {executions:>11,} executions {rate:>9,.0f} per second {findings:>4} findings", flush=True)
        total, found = total + executions, found + findings
        results[name] = {"executions": executions, "findings": findings, "seconds": round(spent)}
        Path(arguments.out, "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"{'all':12} {total:>11,} executions {found:>34} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
