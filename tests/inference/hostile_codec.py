"""A codec of Pillow that does what a file tells it to: `HOSTILE load segfault`, `HOSTILE open sleep`."""

import ctypes
import os
import time

from PIL import Image, ImageFile

MARK = b"HOSTILE "


def act(what):
    if what == "exit":
        os._exit(3)
    if what == "segfault":
        ctypes.string_at(0)
    if what == "sleep":
        time.sleep(60)
    if what == "allocate":
        bytearray(8 << 30)
    if what == "descriptors":
        kept = [os.open(os.devnull, os.O_RDONLY) for _ in range(1000)]
        raise AssertionError(f"{len(kept)} were opened")
    if what.startswith("write="):
        with open(what[6:], "wb") as file:
            file.seek(10**9)  # which takes no room
            file.write(b"x")
    if what == "variables":
        raise OSError(" ".join(sorted(os.environ)))
    if what == "fault":
        raise KeyError("DOE^JANE")
    if what == "babble":  # the end of the messages' socket is the only one that is open
        for descriptor in range(3, 64):
            try:
                os.write(descriptor, b"\xff" * 64)
            except OSError:
                continue
        time.sleep(60)


class HostileFile(ImageFile.ImageFile):
    format = "HOSTILE"

    def _open(self):
        _, when, self.what = self.fp.read().decode().split()
        self._size, self._mode, self.tile = (32, 32), "L", []
        if when == "open":
            act(self.what)

    def load(self):
        act(self.what)
        return super().load()


Image.register_open("HOSTILE", HostileFile, lambda head: head.startswith(MARK))
