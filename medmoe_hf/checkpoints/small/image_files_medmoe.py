"""Decoding of images: one path for the image processors and for the streams of `medmoe_hf.data`.

Pillow's own conversions lose information of medical images (16-bit colours, unsigned 32 bits, the polarity of wide
TIFFs), and it limits neither downloads nor the kinds of files that are opened. `load_image` does.
"""

import base64
import contextlib
import http.client
import io
import ipaddress
import os
import socket
import stat
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .errors_medmoe import ImageError, ImageTooLargeError, PathNotFoundError
from .medical_images_medmoe import is_medical_image, read_medical_image
from .medical_pixels_medmoe import MAX_PIXELS, MedicalImage, check_size

_SECONDS_PER_DOWNLOAD = 60
_SECONDS_PER_READ = 10
_BYTES_PER_READ = 2**16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_WEB = ("http://", "https://")
# Pillow keeps only the high bytes of 16-bit colours; read in the other byte order, these are the low bytes.
_OTHER_BYTE_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
# Tags of TIFF, and two of their values.
_PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT, _BITS, _TILE_WIDTH, _TILE_HEIGHT = 262, 284, 339, 258, 322, 323
_WHITE_IS_ZERO, _SEPARATE, _UNSIGNED = 0, 2, 1


def load_image(
    source: Any,
    *,
    window: Any = None,
    frame: int | None = None,
    draft: int | None = None,
    max_pixels: int = MAX_PIXELS,
    allow_urls: bool = False,
) -> tuple[Image.Image | np.ndarray, str | None]:
    """Decodes one image, upright by its EXIF orientation, without loss of precision.

    Args:
        source: A path; the bytes of a file; a base64 string or `data:` URI; an http(s) address if `allow_urls`; a PIL
            image; an input of `read_medical_image` (DICOM and NIfTI as paths or bytes, `pydicom` datasets and
            `nibabel` images); or a `MedicalImage`.
        window: For DICOM and NIfTI, see `read_medical_image`.
        frame: For DICOM and NIfTI, see `read_medical_image`.
        draft: Side in pixels to which the image will be resized: JPEGs are decoded at a reduced scale that is not
            smaller. None decodes them at full size.
        max_pixels: An image with more pixels is rejected before it is decoded, and so is a file that inflates to more
            than 16 bytes per allowed pixel.
        allow_urls: Whether http(s) addresses are fetched. Only public addresses are, redirects included, in at most
            60 seconds, and at most one byte per allowed pixel.

    Returns:
        The image, and the modality from a DICOM header (None for everything else). The image is a PIL image in its
        stored mode; or an array `(H, W)`, `(H, W, 3)` or `(H, W, 4)`: float32 in 0..1 or uint8 RGB for medical files,
        uint16 for 16-bit colours, and any dtype where Pillow's modes cannot represent the stored values.

    Raises:
        FileNotFoundError: The path does not exist, or the string is not an image.
        ImageTooLargeError: The image or its inflated file exceeds `max_pixels`.
        ImageError: The image cannot be decoded, is not a regular file, or is at an address that must not be fetched.
        ImportError: The packages that read DICOM or NIfTI are missing.
        TypeError: The object is not an image.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> from medmoe_hf.model import load_image
        >>> file = io.BytesIO()
        >>> Image.new("L", (64, 48)).save(file, format="PNG")
        >>> image, modality = load_image(file.getvalue())
        >>> image.size, modality
        ((64, 48), None)
    """
    if isinstance(source, Image.Image):
        return _decode(lambda: source, "the PIL image", draft, max_pixels), None
    if isinstance(source, MedicalImage):
        return source.pixels, source.modality
    name = "the image given as bytes"
    if isinstance(source, (str, os.PathLike)):
        name = os.fsdecode(source)
        source = _located(name, max_pixels, allow_urls)
        name = f"the image {_shortened(name)!r}"
    if is_medical_image(source):
        medical = read_medical_image(source, frame, window, max_pixels=max_pixels)
        return medical.pixels, medical.modality
    if isinstance(source, (bytes, bytearray, memoryview)):
        content = bytes(source)
        return _decode(lambda: Image.open(io.BytesIO(content)), name, draft, max_pixels), None
    if isinstance(source, str):
        return _decode(lambda: Image.open(source), name, draft, max_pixels), None
    raise TypeError(
        "an image is a PIL image, a numpy array, a torch tensor, a file name or a file's bytes, "
        f"got {type(source).__name__}"
    )


def _located(name: str, max_pixels: int, allow_urls: bool) -> str | bytes:
    """Returns the path of a regular file, or the bytes that a string encodes or refers to."""
    if name.startswith(_WEB):
        if not allow_urls:
            raise ImageError(f"{_shortened(name)!r} is not fetched: http(s) addresses are not allowed here")
        return _fetched(name, max_pixels)
    try:
        mode = os.stat(name).st_mode
    except (OSError, ValueError):  # missing, or base64, which is too long or invalid as a file name
        return _from_base64(name)
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise ImageError(f"cannot read the image {_shortened(name)!r}: it is {what} and not a file")
    return name


def _from_base64(name: str) -> bytes:
    encoded = name.split(",", 1)[-1] if name.startswith("data:image/") else name
    try:
        content = base64.b64decode("".join(encoded.split()), validate=True)
        if not is_medical_image(content):
            Image.open(io.BytesIO(content)).verify()
    except Image.DecompressionBombError:
        pass  # it is an image, and will be rejected when it is decoded
    except Exception:
        raise PathNotFoundError(
            f"{_shortened(name)!r} is neither an image file nor an http(s) address nor a base64 image"
        ) from None
    return content


def _shortened(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:200]}..."


# --- Pillow


def _decode(opened: Callable[[], Image.Image], name: str, draft: int | None, max_pixels: int) -> Any:
    """Decodes an image that Pillow opens; `opened` may be called twice."""
    try:
        image = opened()
        _check_image(image, name, max_pixels)
        if draft is not None:
            # Lets the JPEG decoder skip resolution that a resize would discard.
            image.draft(None, (draft, draft))
        return _exact(image, opened, name)
    except (ImageError, FileNotFoundError, PermissionError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(
            f"cannot read {name}: {error} (Pillow's own limit is PIL.Image.MAX_IMAGE_PIXELS)"
        ) from None
    except UnidentifiedImageError:
        raise ImageError(
            f"cannot read {name}: it is not DICOM, NIfTI or an image file in a format that Pillow reads"
        ) from None
    except Exception as error:  # Pillow's decoders raise many types, such as SyntaxError and struct.error
        raise ImageError(f"cannot read {name}: {error}") from error


def _check_image(image: Image.Image, name: str, max_pixels: int) -> None:
    if image.format == "EPS":
        # Pillow would start Ghostscript, which runs what is in the file.
        raise ImageError(f"cannot read {name}: it is PostScript, a program and no picture; export it as PNG")
    tags = getattr(image, "tag_v2", {})
    # A tile of a TIFF is decoded completely, even where it is larger than the image.
    for width, height in (image.size, (tags.get(_TILE_WIDTH, 0), tags.get(_TILE_HEIGHT, 0))):
        check_size(width, height, name, max_pixels)


def _exact(image: Image.Image, opened: Callable[[], Image.Image], name: str) -> Image.Image | np.ndarray:
    """Returns the upright image, as an array where Pillow's modes cannot represent the stored values."""
    tags = getattr(image, "tag_v2", {})
    pending = getattr(image, "tile", [])
    rawmode = pending[0].args if pending else ""
    rawmode = str(rawmode[0]) if isinstance(rawmode, tuple) and rawmode else str(rawmode)
    wide = 16 in _numbers(tags.get(_BITS)) or ";16" in rawmode
    if wide and image.mode in ("RGB", "RGBA") and pending:
        if tags.get(_PLANES) == _SEPARATE:
            raise ImageError(f"{name} holds 16-bit colours in separate planes; save it with interleaved channels")
        if ";16" in rawmode:
            colours = _colours_of_16_bits(*_reopened(image, opened), rawmode)
            key = image.info.get("transparency")  # of a PNG: the colour that is transparent
            if isinstance(key, tuple) and colours.shape[2] == 3:
                alpha = (colours != key).any(axis=2, keepdims=True) * np.uint16(65535)
                colours = np.concatenate([colours, alpha], axis=2)
            return colours
    image.load()
    if image.mode in ("P", "PA") and image.palette is None:
        raise ImageError(f"cannot read {name}: its palette is missing; it is damaged")
    image = _upright(image)
    if tags and image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        return _wide_tiff(image, tags)
    return image


def _reopened(image: Any, opened: Callable[[], Image.Image]) -> tuple[Callable[[], Image.Image], int]:
    """Returns a function that opens the image again, and the index of its frame."""
    again: Any = opened()
    if again is image:  # opened by the caller, and not decoded yet
        image.fp.seek(0)
        content = image.fp.read()
        return lambda: Image.open(io.BytesIO(content)), image.tell()
    return opened, image.tell()


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged header has no orientation, but the pixels are intact
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _colours_of_16_bits(opened: Callable[[], Image.Image], frame: int, rawmode: str) -> np.ndarray:
    """Decodes `(H, W, 3 or 4)` uint16: once for the high bytes and once for the low ones."""

    def decoded(rawmode: str) -> np.ndarray:
        image: Any = opened()
        image.seek(frame)
        image.tile = [
            tile._replace(args=(rawmode, *tile.args[1:]) if isinstance(tile.args, tuple) else rawmode)
            for tile in image.tile
        ]
        image.load()
        return np.asarray(_upright(image))

    layout, order = rawmode.split(";16")
    if layout == "LA":  # two channels of two bytes are decoded as four channels of one
        gray, alpha = decoded("RGBA").view(">u2").transpose(2, 0, 1).astype(np.uint16)
        return np.stack([gray, gray, gray, alpha], axis=-1)
    premultiplied = layout == "RGBa"  # already blended with black
    layout = layout.upper()
    high, low = (decoded(f"{layout};16{end}") for end in (order, _OTHER_BYTE_ORDER[order]))
    colours: np.ndarray = high.astype(np.uint16) << 8 | low
    return colours[..., :3] if premultiplied else colours


def _wide_tiff(image: Image.Image, tags: Any) -> Image.Image | np.ndarray:
    """Corrects pixels of more than 8 bits where Pillow does not: unsigned 32 bits, and white at zero."""
    bits = (*_numbers(tags.get(_BITS)), 1)[0]
    unsigned = (*_numbers(tags.get(_SAMPLE_FORMAT)), _UNSIGNED)[0] == _UNSIGNED
    inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    if not inverted and not (unsigned and bits == 32):
        return image
    pixels: np.ndarray = np.array(image)
    if unsigned:
        pixels = pixels.view(np.uint32) if bits == 32 else pixels.astype(np.uint16)
        white: Any = 2**bits - 1
        return white - pixels if inverted else pixels
    return -pixels if pixels.dtype.kind == "f" else -1 - pixels


def _numbers(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


# --- http(s)


def _fetched(address: str, max_bytes: int) -> bytes:
    """Downloads the content of a public address.

    Raises:
        ImageError: The address is in a private network, or the size or time limit is exceeded.
    """
    shown = repr(_shortened(address))
    download = _Download()
    watchdog = threading.Timer(_SECONDS_PER_DOWNLOAD, download.stop)
    watchdog.daemon = True
    watchdog.start()
    try:
        # Servers reject urllib's own user agent; huggingface_hub's client would not work in its offline mode.
        request = urllib.request.Request(address, headers={"User-Agent": "medmoe_hf"})
        with download.opener.open(request, timeout=_SECONDS_PER_READ) as response:
            content: bytes = response.read(max_bytes + 1)
    except Exception as error:
        reason = error.reason if type(error) is urllib.error.URLError else error
        if download.stopped:
            reason = f"it took more than {_SECONDS_PER_DOWNLOAD} seconds"
        raise ImageError(f"cannot read the image {shown}: {reason}") from error
    finally:
        watchdog.cancel()
    if download.stopped:
        raise ImageError(f"cannot read the image {shown}: it took more than {_SECONDS_PER_DOWNLOAD} seconds")
    if len(content) > max_bytes:
        raise ImageTooLargeError(f"cannot read the image {shown}: it has more than {max_bytes} bytes")
    return content


class _Download:
    """An opener that only connects to public addresses, and can be stopped from another thread."""

    def __init__(self) -> None:
        self.stopped = False
        self._sockets: list[socket.socket] = []
        connect = self._connect

        class Http(urllib.request.HTTPHandler):
            def http_open(self, request: Any) -> Any:
                return self.do_open(_connection(http.client.HTTPConnection, connect), request)

        class Https(urllib.request.HTTPSHandler):
            def https_open(self, request: Any) -> Any:
                return self.do_open(_connection(http.client.HTTPSConnection, connect), request)

        # No proxy, whose connections cannot be checked; no `file:` or `ftp:`, to which a redirect might lead.
        self.opener = urllib.request.OpenerDirector()
        for handler in (
            Http,
            Https,
            urllib.request.HTTPRedirectHandler,
            urllib.request.HTTPDefaultErrorHandler,
            urllib.request.HTTPErrorProcessor,
            urllib.request.UnknownHandler,
        ):
            self.opener.add_handler(handler())

    def stop(self) -> None:
        self.stopped = True
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _connect(self, address: tuple[str, int], timeout: Any = None, source_address: Any = None) -> socket.socket:
        host, port = address
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        for number in found:
            if not _is_public(number):
                raise ImageError(f"{host} is an address of a private network")
        # To the address that was checked: a second look-up might return another one.
        for number in found[:-1]:
            with contextlib.suppress(OSError):
                return self._kept(socket.create_connection((number, port), timeout, source_address))
        return self._kept(socket.create_connection((found[-1], port), timeout, source_address))

    def _kept(self, connection: socket.socket) -> socket.socket:
        self._sockets.append(connection)
        if self.stopped:
            self.stop()
        return connection


def _is_public(number: str) -> bool:
    address: Any = ipaddress.ip_address(number.split("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        translated = ipaddress.IPv4Address(address.packed[12:]) if address in _NAT64 else None
        teredo = address.teredo[1] if address.teredo else None
        address = address.ipv4_mapped or address.sixtofour or teredo or translated or address
    return address.is_global and not address.is_multicast


def _connection(kind: Any, connect: Callable[..., socket.socket]) -> Any:
    def make(host: str, **kwargs: Any) -> Any:
        connection = kind(host, **kwargs)
        connection._create_connection = connect
        return connection

    return make
