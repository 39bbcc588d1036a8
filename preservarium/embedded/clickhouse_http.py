"""The pure parts of ClickHouse's HTTP interface: where a statement ends and its data begins, statuses, encodings.

Source: ClickHouse's documentation of the HTTP interface, and what clickhouse-connect sends and expects.
"""

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

#: URL parameters that the interface itself consumes; every other one is a setting of the query.
TRANSPORT_PARAMETERS: Final = frozenset({
    "query", "database", "default_format", "user", "password", "quota_key", "query_id", "role",
    "session_id", "session_timeout", "session_check", "compress", "decompress", "buffer_size", "wait_end_of_query",
    "client_protocol_version", "stacktrace", "enable_http_compression", "http_zlib_compression_level",
    "send_progress_in_http_headers", "http_headers_progress_interval_ms",
    "cancel_http_readonly_queries_on_client_close", "add_http_cors_header", "http_write_exception_in_output_format",
})  # fmt: skip

#: Output formats whose blocks, one after the other, are the whole: these can be sent while the query runs. The others
#: have a header or a footer, and the engine's stream would repeat it for every block.
STREAMED_FORMATS: Final = frozenset({"Native", "TabSeparated", "TSV", "CSV", "RowBinary", "JSONEachRow"})

#: Statements that answer with rows, by their first word.
READING_WORDS: Final = frozenset({"SELECT", "WITH", "SHOW", "DESCRIBE", "DESC", "EXISTS", "EXPLAIN", "CHECK"})

#: Exception codes that have a status of their own in ClickHouse; every other one is 500.
_STATUS_OF: Final[Mapping[int, int]] = {
    **dict.fromkeys((194,), 401),  # REQUIRED_PASSWORD
    **dict.fromkeys((192, 193, 195, 497, 516), 403),  # unknown user, wrong password, access denied
    **dict.fromkeys(  # unknown function, identifier, type, storage, table, aggregate function, format, database, setting
        (46, 47, 50, 56, 60, 63, 73, 81, 115, 119), 404
    ),
    **dict.fromkeys(  # cannot parse (various), bad arguments, type mismatch, syntax, unknown parameter, duplicates
        (6, 26, 27, 36, 38, 41, 43, 53, 57, 62, 69, 70, 72, 80, 82, 117, 386, 456, 457), 400
    ),
    48: 501,  # NOT_IMPLEMENTED
    159: 408,  # TIMEOUT_EXCEEDED
    162: 413,  # QUERY_IS_TOO_LARGE
    373: 423,  # SESSION_IS_LOCKED
    202: 503,  # TOO_MANY_SIMULTANEOUS_QUERIES
}

_CODE: Final = re.compile(r"Code: (\d+)\.")
_SETTING: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*\Z")


class ClickHouseError(Exception):
    """An error as ClickHouse tells it: `Code: N. DB::Exception: text (NAME)`."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code

    @classmethod
    def of(cls, error: BaseException) -> "ClickHouseError":
        """From whatever the engine raised; its bindings put words of their own before the engine's text."""
        text = str(error)
        found = _CODE.search(text)
        if found is None:
            # 1001 is ClickHouse's code of an exception that is none of its own.
            return cls(1001, f"Code: 1001. DB::Exception: {type(error).__name__}: {text}. (STD_EXCEPTION)")
        return cls(int(found[1]), text[found.start() :].strip())

    @classmethod
    def new(cls, code: int, name: str, text: str) -> "ClickHouseError":
        """One of our own, in the engine's words."""
        return cls(code, f"Code: {code}. DB::Exception: {text}. ({name})")

    @property
    def status(self) -> int:
        """The HTTP status."""
        return _STATUS_OF.get(self.code, 500)


_TOKEN: Final = re.compile(
    rb"""
    (?P<space>\s+)
  | (?P<comment>--[^\n]*(?:\n|\Z) | \#[!\ ][^\n]*(?:\n|\Z) | /\*.*?\*/)
  | (?P<quoted>'(?:[^'\\]|\\.|'')*' | "(?:[^"\\]|\\.|"")*" | `(?:[^`\\]|\\.|``)*`)
  | (?P<word>[A-Za-z_][A-Za-z0-9_]*)
  | (?P<open>[(\[{]) | (?P<close>[)\]}])
  | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)


def _tokens(sql: bytes) -> Iterator[re.Match[bytes]]:
    """The tokens outside of brackets, without spaces and comments."""
    depth = 0
    for token in _TOKEN.finditer(sql):
        kind = token.lastgroup
        if kind == "open":
            depth += 1
        elif kind == "close":
            depth -= 1
        elif depth == 0 and kind not in ("space", "comment"):
            yield token


@dataclass(frozen=True, slots=True)
class Insert:
    """An INSERT that carries its rows in an input format."""

    statement: str  #: up to FORMAT
    format: str
    data_start: int  #: where in the text the rows begin
    settings_start: int  #: where in the statement its SETTINGS begin; its end where it has none

    def from_file(self, path: str) -> str:
        """The statement that reads the rows from a file."""
        head, settings = self.statement[: self.settings_start], self.statement[self.settings_start :]
        return f"{head} FROM INFILE {quote_text(path)} {settings} FORMAT {self.format}"


def find_insert(text: bytes) -> Insert | None:
    """Split an INSERT … FORMAT x from its data; None for every other statement (VALUES and SELECT included).

    The text may end anywhere in the data, but must hold the whole statement.
    """
    tokens = _tokens(text)
    first = next(tokens, None)
    if first is None or first["word"] is None or first["word"].upper() != b"INSERT":
        return None
    settings_start: int | None = None
    before = b"INSERT"
    for token in tokens:
        word = (token["word"] or b"").upper()
        is_name = before in (b"INTO", b"TABLE", b".")
        before = word or token.group()
        if word == b"SETTINGS" and settings_start is None and not is_name:
            # In characters, as the statement is.
            settings_start = len(text[: token.start()].decode("utf-8", "replace"))
        if word in (b"SELECT", b"WITH", b"VALUES", b"INFILE", b"WATCH"):
            return None
        if word == b"FORMAT":
            name = next(tokens, None)
            if name is None or name["word"] is None:
                return None
            if name["word"].upper() == b"VALUES":
                return None
            start = name.end()
            while text[start : start + 1] in (b" ", b"\t", b"\f", b";"):
                start += 1
            # One line end belongs to the statement; a second one is data.
            if text[start : start + 1] == b"\r":
                start += 1
            if text[start : start + 1] == b"\n":
                start += 1
            statement = text[: token.start()].decode("utf-8", "replace")
            end = len(statement) if settings_start is None else settings_start
            return Insert(statement, name["word"].decode(), start, end)
    return None


def first_word(text: bytes) -> str:
    """The statement's first word in capitals, "" where it has none."""
    token = next((t for t in _tokens(text) if t["other"] is None), None)
    return (token["word"] or b"").upper().decode() if token is not None else ""


def is_stateful(text: bytes) -> bool:
    """Whether the statement changes its session: only then is a session worth keeping."""
    words = [(t["word"] or b"").upper() for t, _ in zip(_tokens(text), range(4), strict=False)]
    if words[:1] != [b"CREATE"]:
        return words[:1] in ([b"SET"], [b"USE"])
    return words[1:2] == [b"TEMPORARY"] or words[1:4] == [b"OR", b"REPLACE", b"TEMPORARY"]


def output_format(text: bytes) -> str | None:
    """The format that the statement itself asks for, by FORMAT x outside of brackets and quotes."""
    found: str | None = None
    after = False
    for token in _tokens(text):
        word = token["word"]
        if after and word is not None:
            found = word.decode()
        after = word is not None and word.upper() == b"FORMAT"
    return found


def split_parameters(parameters: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """(settings of the query, values of its {name:Type} placeholders).

    Raises:
        ClickHouseError: a name that is no setting's name.
    """
    settings: dict[str, str] = {}
    values: dict[str, str] = {}
    for name, value in parameters.items():
        if name.startswith("param_"):
            values[name.removeprefix("param_")] = value
        elif name not in TRANSPORT_PARAMETERS:
            if not _SETTING.match(name):
                raise ClickHouseError.new(115, "UNKNOWN_SETTING", f"Unknown setting '{name}'")
            settings[name] = value
    return settings, values


def quote_text(text: str) -> str:
    """A string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def quote_name(text: str) -> str:
    """An identifier."""
    return "`" + text.replace("\\", "\\\\").replace("`", "\\`") + "`"


def set_statement(settings: Mapping[str, str]) -> str:
    """SET for all of them; the engine turns the quoted values into the settings' own types."""
    return "SET " + ", ".join(f"{name} = {quote_text(value)}" for name, value in settings.items())


# --- content encodings


class Decoder(Protocol):
    """Undoes a content encoding, piece by piece."""

    def decompress(self, data: bytes, /) -> bytes:
        """The next piece."""
        ...


def _zstd() -> Any:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        from backports import zstd
    return zstd


def decoder(encoding: str) -> Decoder | None:
    """For a request body; None: as it is.

    Raises:
        ClickHouseError: an encoding that we do not know.
    """
    match encoding.strip().lower():
        case "" | "identity":
            return None
        case "gzip" | "x-gzip":
            return zlib.decompressobj(wbits=31)
        case "deflate":
            return zlib.decompressobj()
        case "lz4":
            from lz4.frame import LZ4FrameDecompressor

            return LZ4FrameDecompressor()  # type: ignore[no-any-return]
        case "zstd":
            return _zstd().ZstdDecompressor()  # type: ignore[no-any-return]
    raise ClickHouseError.new(48, "NOT_IMPLEMENTED", f"Unknown compression method {encoding!r} of the request")


def decode(encoding: str, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces of a body without their encoding.

    Raises:
        ClickHouseError: they are not of that encoding, or end in the middle.
    """
    undo = decoder(encoding)
    if undo is None:
        yield from pieces
        return
    any_piece = False
    try:
        for piece in pieces:
            any_piece = True
            if out := undo.decompress(piece):
                yield out
    except ClickHouseError:
        raise
    except Exception as e:
        # Each codec has an error class of its own; what they mean here is the same.
        raise ClickHouseError.new(271, "CANNOT_DECOMPRESS", f"The body is not {encoding}: {e}") from e
    if any_piece and not getattr(undo, "eof", True):
        raise ClickHouseError.new(271, "CANNOT_DECOMPRESS", f"The {encoding} body ends in the middle")


def choose_encoding(accepted: str) -> str:
    """The first encoding that the client accepts and we speak, "" where there is none."""
    for item in accepted.split(","):
        name = item.partition(";")[0].strip().lower()
        if name in ("lz4", "zstd", "gzip", "deflate"):
            return name
    return ""


def encode(encoding: str, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces of a body in this encoding, each one sent on as it comes."""
    if not encoding:
        yield from pieces
        return
    import cramjam

    # HTTP's deflate is zlib's format.
    module = {"lz4": cramjam.lz4, "zstd": cramjam.zstd, "gzip": cramjam.gzip, "deflate": cramjam.zlib}[encoding]
    # The fastest level: this is loopback, and the client asked for compression by habit.
    compressor = module.Compressor() if encoding == "lz4" else module.Compressor(1)
    for piece in pieces:
        compressor.compress(piece)
        if out := bytes(compressor.flush()):
            yield out
    yield bytes(compressor.finish())
