"""A Hub on this machine for the tests that push and pull."""

import pytest
from loopback_hub import LoopbackHub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Logged in with a token that may write; nothing may be asked of it that it does not know."""
    with LoopbackHub() as server:
        server.use(monkeypatch, tmp_path / "home", token="hf_write")
        yield server
    assert server.unknown == []
