"""What the Dockerfile lays out, without a container engine: the worker's lock in a bare environment, its sources and nothing else, as nobody."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOBODY = 10001

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_800)]


def _others_may_run(venv: Path) -> bool:
    """Whether somebody without rights can run this interpreter; one below /root only root can."""
    for path in (venv, *venv.parents[:3]):
        path.chmod(0o755)
    try:
        subprocess.run(
            [venv / "bin/python", "-c", ""], check=True, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", timeout=60
        )
    except (PermissionError, subprocess.CalledProcessError):
        return False
    return True


def test_the_image_runs_from_its_lock_and_its_sources_alone(tmp_path: Path, told) -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    venv, app, data = tmp_path / "venv", tmp_path / "app", tmp_path / "data"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, timeout=300)
    install = [
        venv / "bin/pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "--require-hashes",
        "-r",
        ROOT / "requirements-worker.lock",
    ]
    done = subprocess.run(install, capture_output=True, text=True, timeout=1_500, check=False)
    if done.returncode and re.search(r"Connection|Temporary failure|No matching distribution", done.stderr):
        pytest.skip(f"missing: a registry of packages ({done.stderr.strip().splitlines()[-1][:200]})")
    assert done.returncode == 0, done.stderr
    app.mkdir()
    for source, target in re.findall(r"^COPY (\w+) (\./\w+)$", text, re.MULTILINE):
        shutil.copytree(ROOT / source, app / target, ignore=shutil.ignore_patterns("__pycache__"))
    data.mkdir()
    root = os.getuid() == 0 and _others_may_run(venv)
    if root:
        os.chown(data, NOBODY, NOBODY)
    environment = {
        "PATH": f"{venv}/bin:/usr/bin:/bin", "PYTHONPATH": str(app), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1",
        "PRESERVARIUM_DATA_DIR": str(data), "PRESERVARIUM_ENV_FILE": os.devnull,
    }  # fmt: skip

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [venv / "bin/python", "-m", *command], cwd=app, env=environment, capture_output=True, text=True, timeout=120, check=False,
            user=NOBODY if root else None, group=NOBODY if root else None, extra_groups=[] if root else None,
        )  # fmt: skip

    assert run("preservarium", "--version").stdout.startswith("preservarium, version ")
    agents = run("faust", "-A", "preservarium", "agents")
    assert agents.returncode == 0, agents.stderr
    assert "normalize" in agents.stdout
    settings = run("preservarium", "config", "show", "--json")
    assert json.loads(settings.stdout)["PRESERVARIUM_DATA_DIR"]["value"] == str(data)
    # No server is there: one line, and no traceback.
    migrated = run("preservarium", "migrate")
    assert migrated.returncode == 1
    assert "Traceback" not in migrated.stderr
    assert run("preservarium.serving.probe", "/health", "1").returncode == 1
    told(
        f"the image's layout ran as {'nobody' if root else 'the user of the tests: others may not read this interpreter'}"
    )
    assert [path for path in app.rglob("*") if path.suffix == ".pyc"] == []
