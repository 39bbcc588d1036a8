"""Where a statement ends and its data begins; settings, statuses, encodings."""

import gzip
import zlib

import lz4.frame
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.embedded.clickhouse_http import (
    ClickHouseError,
    choose_encoding,
    decode,
    encode,
    find_insert,
    first_word,
    is_stateful,
    output_format,
    quote_name,
    quote_text,
    set_statement,
    split_parameters,
)


@pytest.mark.parametrize(
    ("text", "statement", "name", "data"),
    [
        (b"INSERT INTO t (a, b) FORMAT Native\n\x01\n", "INSERT INTO t (a, b) ", "Native", b"\x01\n"),
        (b"insert into t format JSONEachRow {}", "insert into t ", "JSONEachRow", b"{}"),
        (b"INSERT INTO t FORMAT CSV\r\n\n1", "INSERT INTO t ", "CSV", b"\n1"),
        (b"INSERT INTO t FORMAT RowBinary ; \n  ", "INSERT INTO t ", "RowBinary", b"  "),
        (
            b"INSERT INTO t SETTINGS async_insert = 0 FORMAT TSV\n1\t2",
            "INSERT INTO t SETTINGS async_insert = 0 ",
            "TSV",
            b"1\t2",
        ),
        (b"/* FORMAT x */ INSERT INTO `FORMAT` (format) FORMAT TSV\n", None, "TSV", b""),
        (b"-- values\nINSERT INTO t ('FORMAT \\' X') FORMAT TSV\nFORMAT CSV", None, "TSV", b"FORMAT CSV"),
        (b"INSERT INTO FUNCTION file('x.csv', 'CSV', 'values Int8') FORMAT TSV\n", None, "TSV", b""),
        (b"INSERT INTO t FORMAT Native", "INSERT INTO t ", "Native", b""),
    ],
)
def test_an_insert_is_split_from_its_data(text: bytes, statement: str | None, name: str, data: bytes) -> None:
    found = find_insert(text)
    assert found is not None
    assert (found.format, text[found.data_start :]) == (name, data)
    assert statement is None or found.statement == statement


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"SELECT 1 FORMAT JSON",
        b"INSERT INTO t VALUES (1)",
        b"INSERT INTO t FORMAT Values (1)",
        b"INSERT INTO t SELECT 1 FORMAT JSON",
        b"INSERT INTO t FROM INFILE 'x' FORMAT CSV",
        b"INSERT INTO t",
        b"INSERT INTO t (FORMAT CSV",
        b"INSERT INTO t FORMAT",
    ],
)
def test_every_other_statement_is_left_whole(text: bytes) -> None:
    assert find_insert(text) is None


@given(st.binary(max_size=300))
def test_data_of_any_bytes_is_found_untouched(data: bytes) -> None:
    found = find_insert(b"INSERT INTO t FORMAT Native\n" + data)
    assert found is not None
    assert (b"INSERT INTO t FORMAT Native\n" + data)[found.data_start :] == data


@given(st.binary(max_size=300))
def test_no_bytes_upset_the_scanner(text: bytes) -> None:
    find_insert(text)
    assert isinstance(first_word(text), str)
    assert isinstance(is_stateful(text), bool)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (b"SELECT 1", None),
        (b"SELECT 1\n FORMAT Native", "Native"),
        (b"SELECT ' FORMAT JSON'", None),
        (b"SELECT formatRow('CSV', 1) FORMAT JSON;", "JSON"),
        (b"SELECT * FROM (SELECT 1 FORMAT x)", None),
        (b"SELECT 1 FORMAT TSV SETTINGS max_threads = 1", "TSV"),
    ],
)
def test_the_output_format_of_a_statement(text: bytes, name: str | None) -> None:
    assert output_format(text) == name


@pytest.mark.parametrize(
    ("text", "stateful"),
    [
        (b"SET a = 1", True),
        (b"use x", True),
        (b"CREATE TEMPORARY TABLE t (a Int8)", True),
        (b"CREATE OR REPLACE TEMPORARY TABLE t (a Int8)", True),
        (b"CREATE TABLE temporary (a Int8)", False),
        (b"SELECT 1 SETTINGS a = 1", False),
    ],
)
def test_only_statements_that_change_a_session_need_one(text: bytes, stateful: bool) -> None:
    assert is_stateful(text) is stateful


def test_parameters_are_settings_unless_the_interface_consumes_them() -> None:
    settings, values = split_parameters(
        {"query": "q", "param_x": "1", "async_insert": "0", "session_id": "s", "wait_end_of_query": "1"}
    )
    assert (settings, values) == ({"async_insert": "0"}, {"x": "1"})
    with pytest.raises(ClickHouseError, match="Unknown setting") as e:
        split_parameters({"a = 1; DROP TABLE t": "1"})
    assert (e.value.code, e.value.status) == (115, 404)


def test_quoting_leaves_no_way_out() -> None:
    assert quote_text("a'b\\") == "'a\\'b\\\\'"
    assert quote_name("a`b\\") == "`a\\`b\\\\`"
    assert set_statement({"a": "1", "b": "x'"}) == "SET a = '1', b = 'x\\''"


@pytest.mark.parametrize(
    ("raised", "code", "status", "text"),
    [
        (RuntimeError("Streaming insert finish failed: Code: 27. DB::Exception: x (Y)"), 27, 400, "Code: 27. DB"),
        (RuntimeError("Code: 60. DB::Exception: no table (UNKNOWN_TABLE)"), 60, 404, "Code: 60. DB"),
        (RuntimeError("Code: 241. DB::Exception: memory"), 241, 500, "Code: 241. DB"),
        (ValueError("odd"), 1001, 500, "Code: 1001. DB::Exception: ValueError: odd. (STD_EXCEPTION)"),
    ],
)
def test_the_engines_errors_keep_code_and_text(raised: Exception, code: int, status: int, text: str) -> None:
    error = ClickHouseError.of(raised)
    assert (error.code, error.status) == (code, status)
    assert str(error).startswith(text)


@pytest.mark.parametrize("name", ["gzip", "deflate", "lz4", "zstd", ""])
@given(pieces=st.lists(st.binary(max_size=50), max_size=5), cut=st.integers(1, 40))
def test_what_is_encoded_decodes(name: str, pieces: list[bytes], cut: int) -> None:
    body = b"".join(encode(name, pieces))
    assert b"".join(decode(name, [body[i : i + cut] for i in range(0, len(body), cut)])) == b"".join(pieces)


def test_encodings_of_others_decode() -> None:
    data = b"abc" * 1000
    assert b"".join(decode("gzip", [gzip.compress(data)])) == data
    assert b"".join(decode("deflate", [zlib.compress(data)])) == data
    assert b"".join(decode("lz4", [lz4.frame.compress(data)])) == data


@pytest.mark.parametrize("body", [b"not gzip at all", gzip.compress(b"abc" * 1000, mtime=0)[:-10]])
def test_a_damaged_body_is_refused(body: bytes) -> None:
    with pytest.raises(ClickHouseError) as e:
        b"".join(decode("gzip", [body]))
    assert e.value.code == 271


def test_an_unknown_encoding_is_refused_and_an_unknown_wish_is_not_met() -> None:
    with pytest.raises(ClickHouseError) as e:
        list(decode("br", [b""]))
    assert e.value.status == 501
    assert choose_encoding("br, zstd;q=0.5, gzip") == "zstd"
    assert choose_encoding("br") == ""
