"""Servers that tests start as commands and ask over HTTP."""

import subprocess
import time
import urllib.request
from contextlib import contextmanager

SECONDS = 240  # for a server that has to load a model, on a machine that has more to do


@contextmanager
def running(command, port, log, **options):
    """A process that serves on a port, once it does so; in the end nothing in its log is a traceback."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
    try:
        begun = time.monotonic()
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() - begun < SECONDS, log.read_text()
                time.sleep(0.5)
        yield
        assert "Traceback" not in log.read_text()
    finally:
        process.terminate()
        process.wait(timeout=30)
