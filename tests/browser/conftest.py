"""What the tests in a browser share."""

import pytest
from devtools import chromium, find


@pytest.fixture
async def page():
    if (executable := find()) is None:
        pytest.skip("missing: Chromium (Debian: apt install chromium)")
    async with chromium(executable) as page:
        yield page
