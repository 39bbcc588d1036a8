"""`preservarium db`: what is asked where, what people type, and where passwords are."""

import sys
from io import StringIO

import pytest

from preservarium.cli import db
from preservarium.settings import load


class Terminal(StringIO):
    """Standard input with somebody at it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def asked(monkeypatch):
    """Statements that were asked; one that says `wrong` is refused."""
    statements: list[str] = []

    def ask(statement: str) -> db.Answer:
        statements.append(statement)
        if "wrong" in statement:
            raise db.DatabaseRefuses("PostgreSQL: syntax error")
        return ["n", "text"], [(1, "a\tb"), (2, None)]

    ask.statements = statements
    return ask


def typed(monkeypatch, *lines):
    said = iter(lines)

    def read(prompt: str = "") -> str:
        line = next(said, None)
        if line is None:
            raise EOFError
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", Terminal())


def test_statements_are_cut_at_semicolons_outside_of_quotes(asked, capsys):
    db._serve("postgres", "SELECT ';' AS a; -- end\nSELECT 2;", asked, False)
    assert asked.statements == ["SELECT ';' AS a", "SELECT 2"]
    assert capsys.readouterr().out == "n\ttext\n1\ta\\tb\n2\t\n" * 2


def test_json_has_an_object_for_each_row(asked, capsys):
    db._serve("postgres", "SELECT 1", asked, True)
    assert capsys.readouterr().out.split() == [
        "[",
        "{",
        '"n":',
        "1,",
        '"text":',
        '"a\\tb"',
        "},",
        "{",
        '"n":',
        "2,",
        '"text":',
        "null",
        "}",
        "]",
    ]


def test_standard_input_is_read(asked, monkeypatch):
    monkeypatch.setattr(sys, "stdin", StringIO("SELECT 1;\nSELECT 2\n"))
    db._serve("clickhouse", None, asked, False)
    assert asked.statements == ["SELECT 1", "SELECT 2"]


def test_at_the_prompt_a_statement_may_have_lines_and_an_error_ends_nothing(asked, monkeypatch, capsys):
    typed(
        monkeypatch, "SELECT", "  1;", "", "half", KeyboardInterrupt, "wrong;", "SELECT 'open;", KeyboardInterrupt,
        "SELECT 2; SELECT 3;", "quit", "SELECT 4;",
    )  # fmt: skip
    db._serve("postgres", None, asked, False)
    assert asked.statements == ["SELECT\n  1", "wrong", "SELECT 2", "SELECT 3"]
    told = capsys.readouterr().err
    assert "preservarium: PostgreSQL: syntax error" in told
    assert "not closed" in told


@pytest.mark.parametrize("last", ["exit", "\\q", "QUIT;", None])
def test_the_prompt_ends_when_it_is_told_to(asked, monkeypatch, last):
    typed(monkeypatch, *([] if last is None else [last]))
    db._serve("postgres", None, asked, False)
    assert asked.statements == []


def test_psql_gets_the_address_and_no_list_of_processes_the_password(monkeypatch):
    monkeypatch.setenv(
        "PRESERVARIUM_POSTGRES__URL", "postgresql://ann:p%40ss@db.example.org:5433/x?sslmode=verify-full"
    )
    monkeypatch.setenv("PGHOST", "elsewhere")
    called = []
    monkeypatch.setattr("os.execve", lambda *arguments: called.append(arguments))
    db._become_psql("/usr/bin/psql", load(), "SELECT 1")
    ((program, arguments, environment),) = called
    assert program == "/usr/bin/psql"
    assert arguments == [
        "/usr/bin/psql", "-v", "ON_ERROR_STOP=1", "-c", "SELECT 1", "postgresql://ann@db.example.org:5433/x?sslmode=verify-full",
    ]  # fmt: skip
    assert environment["PGPASSWORD"] == "p@ss"
    assert "PGHOST" not in environment
