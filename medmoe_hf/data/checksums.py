"""Checksums of files, by which a resumed run recognizes changed data."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_PIECE = 2**14  # bytes; the last 10 kB of a tar may be padding


def file_checksums(paths: Sequence[str], complete: bool = False) -> list[list[Any]]:
    """Returns `[name, size, checksum]` of each file; None for the size and checksum of a missing one.

    Args:
        paths: Paths of the files.
        complete: Whether all bytes are read, or only the first and last 16 KiB.
    """
    # On network file systems most of the time is latency.
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda path: _file_checksum(path, complete), paths))


def _file_checksum(path: str, complete: bool) -> list[Any]:
    name = Path(path).name
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.blake2b(digest_size=8)
            if complete:
                while piece := file.read(2**20):
                    digest.update(piece)
            else:
                digest.update(file.read(_PIECE))
                file.seek(max(_PIECE, size - _PIECE))
                digest.update(file.read(_PIECE))
            return [name, size, digest.hexdigest()]
    except OSError:
        return [name, None, None]
