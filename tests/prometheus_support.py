"""A real Prometheus that watches a worker by the project's own rules."""

import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from preservarium.cli.monitoring import write
from preservarium.embedded.service import free_port


class Prometheus:
    """Prometheus with deploy/prometheus' rules, as `preservarium monitoring` writes them."""

    def __init__(self, directory: Path, *targets: str) -> None:
        program = shutil.which("prometheus")
        if program is None:
            pytest.skip("missing: prometheus (Debian: apt install prometheus)")
        self.port = free_port()
        for _ in write.write(directory, write.files(targets=targets)):
            pass
        self._log = (directory / "prometheus.log").open("w")
        self.process = subprocess.Popen(
            [
                program, f"--config.file={directory}/prometheus/prometheus.yml", f"--storage.tsdb.path={directory}/data",
                f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=warn",
            ],
            stdout=self._log, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def get(self, path: str) -> Any:
        """The data of an answer of its API; None while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}", timeout=5) as response:
                return json.load(response)["data"]
        except OSError:
            return None

    def firing(self) -> list[dict[str, str]]:
        """Labels of the alerts that fire, besides those for machines."""
        found = (self.get("alerts") or {"alerts": []})["alerts"]
        labels = [alert["labels"] for alert in found if alert["state"] == "firing"]
        return [each for each in labels if each["severity"] != "info"]

    def until(self, what: Any, within_s: float) -> Any:
        """What `what` gives, once it gives something; None where it does not in time."""
        deadline = time.monotonic() + within_s
        while not (found := what()):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.5)
        return found

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        self._log.close()
