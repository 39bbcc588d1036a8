"""What containers ask: whether a port of ours answers."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from preservarium.embedded.service import free_port
from preservarium.serving.probe import main


@pytest.mark.parametrize(("status", "code"), [(200, 0), (204, 1), (503, 1), (404, 1)])
def test_only_200_is_well(
    status: int, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # nobody: the probe must not go there

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 418)
            self.end_headers()
            if status != 204:
                self.wfile.write(b"a stage hangs")

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    assert main(["/health", str(server.server_port)]) == code
    thread.join()
    server.server_close()
    if status >= 400:
        assert "a stage hangs" in capsys.readouterr().out


def test_nobody_there_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRESERVARIUM_WEB__PORT", str(free_port()))
    assert main([]) == 1
    assert "refused" in capsys.readouterr().out
