"""Back-fill: rows, what is refused, and where an interrupted one goes on."""

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from connector_fakes import MemoryPublisher
from hypothesis import given
from hypothesis import strategies as st

from preservarium import topics
from preservarium.clock import ManualClock
from preservarium.connectors import files
from preservarium.connectors.base import Limits, RawProducer
from preservarium.connectors.files import Columns, FileError, Position, Positions, Reader, backfill, format_of
from preservarium.errors import Retry

NOW_US = 1_700_000_000_000_000
LIMITS = Limits(payload_bytes_max=10_000, record_bytes_max=100_000)


class Run:
    def __init__(self, directory: Path) -> None:
        self.publisher = MemoryPublisher()
        self.clock = ManualClock(NOW_US)
        self.positions = Positions(directory / "state")

    async def __call__(self, path: Path, columns: Columns, **kwargs: Any) -> files.Totals:
        producer = RawProducer(self.publisher, "files")
        form = kwargs.pop("form", None) or format_of(path)
        return await backfill(path, form, columns, producer, self.positions, LIMITS, self.clock, **kwargs)

    def lines(self) -> list[dict[str, Any]]:
        return self.publisher.lines()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def write(path: Path, data: str | bytes) -> Path:
    content = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
async def test_csv_columns_become_a_payload_object(run: Run, tmp_path: Path, suffix: str) -> None:
    path = write(
        tmp_path / f"a.csv{suffix}",
        '\ufeffserial,at,temperature,note,humidity\r\nd1,2024-02-12T15:15:45Z,21.5,"a ""b"",\r\nc",\r\n\r\n007,1707750945,-1e1,x,40\r\n',
    )
    totals = await run(path, Columns(device="serial", time="at", mode="LAB"))
    assert (totals.rows, totals.sent, totals.refused) == (2, 2, 0)
    assert run.lines() == [
        {
            "device": "d1",
            "received_at": 1_707_750_945_000_000,
            "connector": "files",
            "mode": "LAB",
            "payload": {"temperature": "21.5", "note": 'a "b",\r\nc'},
        },
        {
            "device": "007",
            "received_at": 1_707_750_945_000_000,
            "connector": "files",
            "mode": "LAB",
            "payload": {"temperature": "-1e1", "note": "x", "humidity": "40"},
        },
    ]
    assert [s.key for s in run.publisher.sends] == [b"d1", b"007"]


async def test_payload_columns(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'hex\tb64\tjson\tport\n0102\tAQI=\t"{""t"":1}"\t7\n')
    base = {"device_id": "d", "delimiter": "\t", "port": "port"}
    for columns in ({"payload_hex": "hex"}, {"payload_b64": "b64"}, {"payload": "json"}, {"columns": ("hex", "port")}):
        run.positions.forget(path)
        await run(path, Columns(**base, **columns))
    assert [x.get("payload", x.get("payload_b64")) for x in run.lines()] == [
        "AQI=",
        "AQI=",
        {"t": 1},
        {"hex": "0102", "port": "7"},
    ]
    assert {x["port"] for x in run.lines()} == {7}


async def test_ndjson_envelopes_keep_their_time_and_objects_are_mapped(run: Run, tmp_path: Path) -> None:
    envelope = {"device": "d1", "payload_b64": "AQI=", "received_at": NOW_US - 9, "port": 2, "mode": "LoRaWAN"}
    path = write(tmp_path / "a.ndjson", json.dumps(envelope) + "\n" + json.dumps({**envelope, "received_at": None}))
    await run(path, Columns())
    assert [(x["received_at"], x["mode"], x["port"]) for x in run.lines()] == [
        (NOW_US - 9, "LoRaWAN", 2),
        (NOW_US, "LoRaWAN", 2),
    ]
    mapped = write(tmp_path / "b.jsonl", '{"id": 17, "when": 1707750945000, "t": 1, "u": null}\n')
    await run(mapped, Columns(device="id", time="when"))
    assert run.lines()[-1] == {
        "device": "17",
        "received_at": 1_707_750_945_000_000,
        "connector": "files",
        "mode": "FILE",
        "payload": {"t": 1, "u": None},
    }


async def test_bad_rows_go_to_iot_errors_and_their_neighbours_live(run: Run, tmp_path: Path) -> None:
    rows = [
        b"d1,1707750945,1",
        b"d2,never,1",
        b",1707750945,1",
        b"d4,1707750945",
        b'd5,1707750945,"open',
        b"d6,1707750945,\xff",
        b"d7,1707750945,2",
    ]
    path = write(tmp_path / "a.csv", b"device,at,t\n" + b"\n".join(rows) + b"\n")
    totals = await run(path, Columns(device="device", time="at"))
    assert (totals.rows, totals.sent, totals.refused) == (7, 2, 5)
    assert [x["device"] for x in run.lines()] == ["d1", "d7"]
    errors = run.publisher.lines(topics.ERRORS)
    assert [(e["index"], e["code"], e["topic"]) for e in errors] == [
        (3, "timestamp_invalid", "files:a.csv"),
        (4, "envelope_no_device", "files:a.csv"),
        (5, "envelope_invalid", "files:a.csv"),
        (6, "envelope_invalid", "files:a.csv"),
        (7, "envelope_not_utf8", "files:a.csv"),
    ]
    assert errors[0]["raw"] == "d2,never,1"
    assert len(totals.examples) == 5


async def test_an_interrupted_back_fill_goes_on_where_kafka_acknowledged(
    run: Run, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(files, "BATCH_ROWS", 10)
    for name in ("a.csv", "b.csv.gz"):
        path = write(tmp_path / name, "t\n" + "".join(f"{i}\n" for i in range(95)))
        run.publisher.sends.clear()
        stop = asyncio.Event()
        columns = Columns(device_id="d")
        first = await run(path, columns, stop=stop, on_progress=lambda _, t, stop=stop: t.rows >= 30 and stop.set())
        assert (first.rows, first.sent) == (30, 30)
        run.publisher.failures = 2
        stop = asyncio.Event()
        with pytest.raises(Retry):
            await run(
                path,
                columns,
                stop=stop,
                on_wait=lambda _e, _s, stop=stop: stop.set(),
                totals=(second := files.Totals()),
            )
        assert (second.rows, second.sent) == (40, 0)
        last = await run(path, columns)
        assert (last.rows, last.sent) == (95, 65)
        assert [x["payload"]["t"] for x in run.lines()] == [str(i) for i in range(95)]
        again = await run(path, columns)
        assert (again.rows, again.sent) == (95, 0)


async def test_kafka_away_is_waited_for(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "t\n1\n")
    run.publisher.failures = 3
    waits: list[float] = []
    totals = await run(path, Columns(device_id="d"), on_wait=lambda _, s: waits.append(s))
    assert (totals.sent, len(waits), len(run.lines())) == (1, 3, 1)


async def test_another_file_under_the_same_name_begins_anew_and_a_grown_one_goes_on(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "t\n1\n2\n")
    columns = Columns(device_id="d")
    assert (await run(path, columns)).sent == 2
    write(path, "t\n1\n2\n3\n")
    assert (await run(path, columns)).sent == 1
    write(path, "t\n7\n8\n")
    assert (await run(path, columns)).sent == 2
    assert [x["payload"]["t"] for x in run.lines()] == ["1", "2", "3", "7", "8"]


async def test_the_rate_is_kept(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "t\n" + "1\n" * 500)
    begun = run.clock.monotonic_s()
    await run(path, Columns(device_id="d"), rate=100.0)
    assert run.clock.monotonic_s() - begun == pytest.approx(5.0, abs=0.01)
    assert max(run.publisher.calls) <= 20


async def test_a_dry_run_sends_and_saves_nothing(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "t\n1\n2,3\n")
    totals = await backfill(path, "csv", Columns(device_id="d"), None, None, LIMITS, run.clock)
    assert (totals.rows, totals.sent, totals.refused) == (2, 1, 1)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("name", "data", "columns", "message"),
    [
        ("a.csv", "a,b\n1,2\n", Columns(device="c"), "no column c; there are: a, b"),
        ("a.csv", "a,a\n1,2\n", Columns(device="a"), "column a stands there twice"),
        ("a.csv", b"\xff\n", Columns(), "names no columns"),
    ],
)
async def test_a_file_that_cannot_be_used_says_why(
    run: Run, tmp_path: Path, name: str, data: Any, columns: Columns, message: str
) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(FileError, match=message):
        await run(path, columns)


async def test_a_torn_gzip_says_how_far_it_got(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"t\n" + b"".join(b"%d\n" % (i * i) for i in range(50_000)))[:-5_000])
    with pytest.raises(FileError, match="cannot be read beyond byte"):
        await run(path, Columns(device_id="d"))
    assert len(run.lines()) >= 1_000


async def test_what_cannot_be_read_is_said_in_words(run: Run, tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(b"t\n" + b"".join(b"%d\n" % (i * i) for i in range(50_000))))
    packed[len(packed) // 2 :] = bytes(b ^ 0x55 for b in packed[len(packed) // 2 :])
    for name, data, words in (
        ("damaged.csv.gz", bytes(packed), "cannot be read beyond byte .*decompress"),
        ("damaged.csv.gz", packed[:20] + b"\xff" * 40, "decompress"),
        ("latin.csv", "zähler\n1\n".encode("latin-1"), "the first line names no columns: not UTF-8"),
        ("torn.csv", "t\n1\n".encode("utf-16")[:-1], "not UTF-16"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FileError, match=words) as caught:
            await run(tmp_path / name, Columns(device_id="d"))
        assert "codec" not in str(caught.value)


def test_a_damaged_position_is_the_beginning(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "t\n1\n")
    run.positions.save(path, Position(2, 1, 0, 0))
    assert run.positions.load(path).offset == 2
    (saved,) = (tmp_path / "state").iterdir()
    whole = json.loads(saved.read_bytes())
    for change in ({"fingerprint_bytes": 2**53}, {"fingerprint_bytes": "x"}, {"offset": None}):
        saved.write_text(json.dumps(whole | change))
        assert run.positions.load(path) in (Position(), Position(2, 1, 0, 0))


def test_the_format_is_told_by_the_name() -> None:
    assert [format_of(Path(n)) for n in ("a.CSV", "a.tsv.gz", "a.ndjson", "a.jsonl.gz")] == [
        "csv",
        "csv",
        "ndjson",
        "ndjson",
    ]
    with pytest.raises(FileError):
        format_of(Path("a.xlsx"))


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\x1a"), max_size=8)


@given(st.lists(st.lists(cells, min_size=2, max_size=2), max_size=12), st.sampled_from(["\n", "\r\n"]))
def test_every_row_of_any_csv_is_found_and_every_offset_is_a_place_to_resume(
    tmp_path_factory: Any, rows: list[list[str]], ending: str
) -> None:
    import csv
    import io

    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=ending, quoting=csv.QUOTE_ALL)
    writer.writerow(["a", "b"])
    writer.writerows(rows)
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(text.getvalue().encode())
    columns = Columns(device_id="d")
    reader = Reader(path, "csv", columns, Position())
    found = list(reader.rows())
    assert [list(reader._csv(row).values()) for row in found] == rows
    reader.close()
    for i, row in enumerate(found):
        resumed = Reader(path, "csv", columns, reader.position(row, files.Totals()))
        assert [(r.raw, r.line, r.end) for r in resumed.rows()] == [(r.raw, r.line, r.end) for r in found[i + 1 :]]
        resumed.close()
