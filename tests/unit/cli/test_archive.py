"""What the archive's commands refuse before they ask any server."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from preservarium.__main__ import cli


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["restore", "--yes"], "say where to"),
        (["restore", "--to-topic", "a", "--to-place", "b", "--yes"], "say where to"),
        (["restore", "--to-place", "x", "--json"], "--json does not ask"),
        (["restore", "--to-place", "s3://Bad_Bucket/x", "--yes"], "is no bucket"),
        (["restore", "--to-place", "x", "--since", "yesterday", "--yes"], "--since"),
        (["verify", "--since", "1h", "--until", "2h"], "--until is not after --since"),
        (["run", "--follow", "--json"], "--follow has no end"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PRESERVARIUM_ARCHIVE__URL", str(tmp_path / "archive"))
    done = CliRunner().invoke(cli, ["archive", *arguments])
    assert (done.exit_code, told in done.output) == (2, True), done.output


@pytest.mark.parametrize("command", ["run", "verify", "reindex"])
def test_without_an_archive_it_is_said_what_to_set(command: str) -> None:
    done = CliRunner().invoke(cli, ["archive", command])
    assert (done.exit_code, "PRESERVARIUM_ARCHIVE__URL" in done.output) == (2, True), done.output
