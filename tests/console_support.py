"""Asking the console's views in tests."""

from typing import Any

from aiohttp.test_utils import TestClient

from preservarium.console import access


async def body(client: TestClient[Any, Any], path: str, status: int = 200, **options: Any) -> Any:
    """The JSON of a view, with the status and the headers that it must have."""
    response = await client.get(path, **options)
    assert response.status == status, await response.text()
    for name, value in access.HEADERS.items():
        assert response.headers[name] == value
    return await response.json()
