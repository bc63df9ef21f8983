"""Messages between a process and the one that decodes for it: JSON, and pixels as bare bytes.

Nothing in a message can run code, whatever the sender has become: no pickles, no names of classes. The receiver checks
lengths before it makes room, and the type and shape of pixels before it looks at them.
"""

import contextlib
import json
import math
import socket
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

_HEAD = struct.Struct("<QQ")  # bytes of the JSON, and of the pixels
_MOST_TEXT = 1 << 28
_TYPES = ("uint8", "float32")  # what a `MedicalImage` may hold
_PIXELS = "pixels"


class MessageError(Exception):
    """A message that no process of ours sends."""


def send(channel: socket.socket, told: dict[str, Any], pixels: np.ndarray | None = None) -> None:
    """Sends a message.

    Args:
        channel: A connected socket.
        told: Plain data.
        pixels: uint8 or float32 of any shape.
    """
    content = b"" if pixels is None else np.ascontiguousarray(pixels).tobytes()
    if pixels is not None:
        told = told | {_PIXELS: [pixels.dtype.name, list(pixels.shape)]}
    text = json.dumps(told).encode("ascii")
    channel.sendall(_HEAD.pack(len(text), len(content)) + text)
    channel.sendall(content)


def receive(
    channel: socket.socket, most_pixels: int = 0, waiting: Callable[[], None] | None = None
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Receives a message.

    Args:
        channel: A connected socket, with a timeout if there is `waiting`.
        most_pixels: Greatest number of bytes of pixels.
        waiting: Called after each part and timeout; what it raises ends the wait.

    Returns:
        The plain data, and pixels if there are any.

    Raises:
        EOFError: The other side is gone.
        MessageError: The message is malformed or too large.
    """
    length, size = _HEAD.unpack(_exactly(channel, _HEAD.size, waiting))
    if length > _MOST_TEXT or size > most_pixels:
        raise MessageError("it is too large")
    text = _exactly(channel, length, waiting)
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        raise MessageError("it is no JSON") from None
    if not isinstance(told, dict):
        raise MessageError("it is no JSON object")
    described = told.pop(_PIXELS, None)
    if described is None:
        if size:
            raise MessageError("it does not describe its pixels")
        return told, None
    try:
        name, shape = described
        wanted = tuple(int(side) for side in shape)
    except (TypeError, ValueError, OverflowError):
        raise MessageError("it does not describe its pixels") from None
    known = name in _TYPES and 0 < len(wanted) <= 3 and min(wanted) > 0
    if not known or math.prod(wanted) * np.dtype(name).itemsize != size:
        raise MessageError("its pixels are not those that it describes")
    return told, np.frombuffer(_exactly(channel, size, waiting), dtype=name).reshape(wanted)


def _exactly(channel: socket.socket, count: int, waiting: Callable[[], None] | None) -> bytearray:
    content = bytearray(count)
    view, done = memoryview(content), 0
    while done < count:
        more = 0
        with contextlib.suppress(TimeoutError):
            more = channel.recv_into(view[done:])
            if not more:
                raise EOFError
        done += more
        if waiting is not None and done < count:
            waiting()
    return content
