"""The browser of these tests."""

import pytest
from browsers import CHROMIUM


@pytest.fixture(scope="module")
def chromium():
    from playwright import sync_api

    with sync_api.sync_playwright() as player:
        # The sandbox cannot be had by root, which CI is.
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
