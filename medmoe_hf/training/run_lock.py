"""A lock on the folder of a run, so that two runs do not write the same checkpoints."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from medmoe_hf.errors import TrainingError
from medmoe_hf.training.negatives import max_over_processes

logger = logging.getLogger(__name__)

LOCK = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def locked_run(folder: Path) -> Iterator[None]:
    """Holds the lock of a run's folder in the block. Every process must call this; the main one holds it.

    The system releases the lock when the process ends, however it ends: a file that a killed run leaves is not in the
    way. Where locks do not work, as on some network file systems, a warning says so and the block runs without.

    Args:
        folder: The run's folder, which is created; it is removed afterwards if it is empty.

    Raises:
        TrainingError: If another run holds the lock.

    Example:
        ```python
        with locked_run(config.run_dir):
            TrainingRun(config).train()
        ```
    """
    # As Accelerate makes it: without this argument several processes on CPUs would each be the only one.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    problem, held = "", None
    if state.is_main_process:
        try:
            held = _take(folder / LOCK)
        except TrainingError as error:
            problem = str(error)
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): make sure that no other run has this `output_dir`.", folder, error.strerror
            )
    if max_over_processes(int(bool(problem)), state.device):
        raise TrainingError(problem or "Another run uses the folder of this one; the main process says which.")
    try:
        yield
    finally:
        if held is not None:
            (folder / LOCK).unlink(missing_ok=True)  # before others can have it
            os.close(held)
            with suppress(OSError):  # it has checkpoints or logs
                folder.rmdir()


def _take(path: Path) -> int:
    """Locks a file that it creates.

    Returns:
        Its descriptor, which holds the lock until it is closed.

    Raises:
        TrainingError: If another process holds the lock.
        OSError: If there are no locks here, or the file cannot be created.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # a run that ends has just removed the folder
            continue
        try:
            # Not `flock`, which processes that read data inherit: they may outlive a run that is killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                os.truncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return file
        except OSError as error:
            owner = os.pread(file, 200, 0).decode(errors="replace")
            os.close(file)
            if error.errno not in _HELD:
                raise
            raise TrainingError(
                f"Another run is training with this `output_dir`: {owner or 'a process'} holds {path}. Wait until it "
                "ends, or stop it by Ctrl-C or SIGTERM and go on with `--resume auto`; to train beside it, choose "
                "another `output_dir`."
            ) from error
        os.close(file)  # of a run that has just ended


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
