"""The processes in which files are decoded, as the process sees them that needs the pixels."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from medmoe_hf.errors import ArgumentError, IsolationError
from medmoe_hf.inference.isolation import child
from medmoe_hf.inference.isolation.messages import MessageError, receive, send

LOOK = 0.1  # seconds between two looks at limits of time
_START = 300  # seconds within which the libraries are imported, on the slowest machine
_BUFFER = 1 << 20
_END = 2  # seconds within which the launcher ends by itself
_CODE = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given['path']; "
    "import socket; from medmoe_hf.inference.isolation.child import launch; "
    "launch(socket.socket(fileno=given['control']), given['plugins'])"
)
# Nothing else: tokens and passwords are kept in variables.
_VARIABLES = (
    *("PATH", "HOME", "LANG", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"),
    "TORCHINDUCTOR_CACHE_DIR",  # torch makes a folder of its own without it
)
_SET = {
    "HF_HUB_OFFLINE": "1",
    # A process with a single thread can be forked.
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"),
}


@dataclass(frozen=True)
class DecodingLimits:
    """What decoding may cost, in a process of its own.

    Args:
        megabytes: Memory, above what the libraries take that are loaded; and size of a temporary file, to which
            compressed volumes are inflated.
        seconds: Longest time per file while headers are read, and per slice.
        open_files: Number of files that are open at a time.

    Raises:
        ArgumentError: If one of them is too small for any file.
    """

    megabytes: int = 4096
    seconds: int = 60
    open_files: int = 64

    def __post_init__(self) -> None:
        for name, least in (("megabytes", 64), ("seconds", 1), ("open_files", 16)):
            if getattr(self, name) < least:
                raise ArgumentError(f"The limit `{name}` must be at least {least}, got {getattr(self, name)}.")


class Fork:
    """A process that reads one set of files.

    Args:
        channel: Socket to it.
        pid: Its number.
    """

    def __init__(self, channel: socket.socket, pid: int) -> None:
        self.channel, self.pid = channel, pid


class Launcher:
    """Starts processes in milliseconds: it forks one that has imported the libraries.

    Args:
        plugins: Modules to import there, which add codecs.

    Raises:
        IsolationError: If the system has no limits for processes.
    """

    def __init__(self, plugins: Sequence[str] = ()) -> None:
        if not (hasattr(os, "fork") and hasattr(socket, "send_fds")):
            raise IsolationError(
                "Files cannot be decoded in a process of their own here: its limits need Linux or macOS. Decode them "
                "in this process (`--no-isolate`), and only files that you trust."
            )
        self._lock = threading.Lock()
        self._control, other = socket.socketpair()
        self._ready = False
        self._forked: list[bool] = []  # empty until the first fork
        given = {"path": sys.path, "control": other.fileno(), "plugins": list(plugins)}
        environment = {name: os.environ[name] for name in _VARIABLES if name in os.environ} | _SET
        environment["TMPDIR"] = tempfile.gettempdir()
        environment |= {name: value for name, value in os.environ.items() if name.startswith("LC_")}
        with other:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _CODE, json.dumps(given)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # codecs quote what they read
                pass_fds=[other.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which ends that one
            )
        self.pid = process.pid
        self._end = weakref.finalize(self, _close, self._control, process, self._forked)

    @property
    def alive(self) -> bool:
        """Whether it was not closed."""
        return self._end.alive

    def fork(self, limits: DecodingLimits) -> tuple[Fork, list[str]]:
        """Starts a process.

        Args:
            limits: Its limits.

        Returns:
            The process, and the limits that the system does not have.

        Raises:
            IsolationError: If it does not start.
        """
        here, there = socket.socketpair()
        try:
            with there, self._lock:
                self._wait_until_ready()
                for one in (here, there):
                    with contextlib.suppress(OSError):  # systems limit it
                        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
                self._forked[:] = [True]
                self._control.settimeout(_START)
                socket.send_fds(self._control, [child.FORK], [there.fileno()])
                made = Fork(here, int(receive(self._control)[0]["pid"]))
            here.settimeout(_START)
            send(here, {"megabytes": limits.megabytes, "open_files": limits.open_files, "seconds": limits.seconds})
            missing = [str(name) for name in receive(here)[0]["missing"]]
            here.settimeout(LOOK)
            return made, missing
        except (OSError, EOFError, MessageError, KeyError) as error:
            here.close()
            raise IsolationError(f"The process that decodes files does not start ({type(error).__name__}).") from error

    def end(self, fork: Fork) -> str:
        """Ends a process, if it has not ended, and returns how it did: `SIGSEGV`, or `exit code 3`."""
        fork.channel.close()
        try:
            with self._lock:
                self._control.settimeout(_START)
                self._control.sendall(child.END + fork.pid.to_bytes(child.PID_BYTES, "little"))
                status = int(receive(self._control)[0]["status"])
        except (OSError, EOFError, MessageError, KeyError):
            return "its launcher has ended"
        if status >= 0:
            return f"exit code {status}"
        return signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"

    def close(self) -> None:
        """Ends the launcher and all its processes."""
        self._end()

    def _wait_until_ready(self) -> None:
        if self._ready:
            return
        self._control.settimeout(_START)
        failed = receive(self._control)[0]["failed"]
        if failed:
            raise IsolationError(f"The process that decodes files does not start: {failed}")
        self._ready = True


def _close(control: socket.socket, process: "subprocess.Popen[bytes]", forked: list[bool]) -> None:
    control.close()  # upon which the launcher ends its processes, and itself
    try:
        process.wait(_END if forked else 0)
    except subprocess.TimeoutExpired:  # it may still be importing
        process.kill()
        process.wait()
