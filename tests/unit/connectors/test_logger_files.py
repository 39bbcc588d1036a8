"""The files of data loggers: how they begin, how they write time, and how a folder of them is watched."""

import asyncio

import pytest
from connector_fakes import MemoryPublisher
from hypothesis import given
from hypothesis import strategies as st

from preservarium.clock import ManualClock, SystemClock
from preservarium.connectors import files, logger_files
from preservarium.connectors.base import Limits, RawProducer
from preservarium.connectors.files import Columns, FileError, Positions, backfill, format_of, watch
from preservarium.connectors.logger_files import instant, layout_of
from preservarium.domain.readings.instant import iso_us
from preservarium.domain.readings.wall_clock import wall_clock

NOW_US = 1_796_000_000_000_000
LIMITS = Limits(payload_bytes_max=262_144, record_bytes_max=1_000_000)

TOA5 = (
    '"TOA5","83014","CR1000","83014","CR1000.Std.27","CPU:met.CR1","5120","Met"\r\n"TIMESTAMP","RECORD","AirTC","RH"\r\n'
    '"TS","RN","Deg C","%"\r\n"","","Smp","Smp"\r\n"2026-11-22 09:00:00",1,24.5,55.2\r\n"2026-11-22 09:10:00.5",2,"NAN",54\r\n'
)
HOBO = (
    '"Plot Title: 10712345"\n"#","Date Time, GMT+01:00","Temp, °C (LGR S/N: 10712345, SEN S/N: 10712345)","RH, % (LGR S/N: 10712345, LBL: inside)",'
    '"Host Connected (LGR S/N: 10712345)","End Of File (LGR S/N: 10712345)"\n1,11/22/26 09:00:00 AM,21.4,55.1,,\n2,11/22/26 12:10:00 PM,21.5,,Logged,\n'
)
DAVIS = (
    "\t\tTemp\tHi\tOut\tWind\n   Date\t  Time\tOut\tTemp\tHum\tSpeed\n------------------------------\n"
    "22/11/26\t 9:00a\t 7.2\t7.4\t88\t1.3\n22/11/26\t12:30p\t 7.6\t7.8\t---\t0.9\n"
)
GERMAN = (
    "Station: Wiese\nSeriennummer; 4711\n\nZeit;Temperatur;Feuchte\n[TT.MM.JJJJ];[°C];[%]\n22.11.2026 09:00;21,4;55\n22.11.2026 24:00;-0,5;54,25\n"
)  # fmt: skip


def us(text):
    return iso_us(text)


async def sent(tmp_path, name, content, columns, **kwargs):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    publisher = MemoryPublisher()
    totals = await backfill(
        path,
        format_of(path),
        columns,
        RawProducer(publisher, "files"),
        Positions(tmp_path / "state"),
        LIMITS,
        ManualClock(NOW_US),
        **kwargs,
    )
    return totals, [
        (line["device"], line["received_at"], line["payload"]) for line in publisher.lines() if "payload" in line
    ]


@pytest.mark.parametrize(
    ("name", "content", "columns", "expected"),
    [
        ("met.dat", TOA5, Columns(), [
            ("83014", us("2026-11-22T09:00:00"), {"AirTC": "24.5", "RH": "55.2"}), ("83014", us("2026-11-22T09:10:00.5"), {"RH": "54"}),
        ]),
        ("met.dat", TOA5, Columns(device_id="mast", time_zone="America/Denver"), [
            ("mast", us("2026-11-22T16:00:00"), {"AirTC": "24.5", "RH": "55.2"}), ("mast", us("2026-11-22T16:10:00.5"), {"RH": "54"}),
        ]),
        ("h.csv", HOBO, Columns(), [
            ("10712345", us("2026-11-22T08:00:00"), {"Temp": "21.4", "inside": "55.1"}), ("10712345", us("2026-11-22T11:10:00"), {"Temp": "21.5"}),
        ]),
        ("d.txt", DAVIS, Columns(device_id="davis"), [
            ("davis", us("2026-11-22T09:00:00"), {"Temp Out": "7.2", "Hi Temp": "7.4", "Out Hum": "88", "Wind Speed": "1.3"}),
            ("davis", us("2026-11-22T12:30:00"), {"Temp Out": "7.6", "Hi Temp": "7.8", "Wind Speed": "0.9"}),
        ]),
        ("g.csv", GERMAN.encode("cp1252"), Columns(device_id="w", layout="guess", time_zone="Europe/Berlin", encoding="cp1252"), [
            ("w", us("2026-11-22T08:00:00"), {"Temperatur": "21.4", "Feuchte": "55"}), ("w", us("2026-11-22T23:00:00"), {"Temperatur": "-0.5", "Feuchte": "54.25"}),
        ]),
        ("p.csv", "at,t\n22.11.2026 09:00,1\n", Columns(device_id="x", time="at", time_zone="Europe/Berlin"), [("x", us("2026-11-22T08:00:00"), {"t": "1"})]),
    ],
)  # fmt: skip
async def test_each_loggers_files(tmp_path, name, content, columns, expected):
    totals, lines = await sent(tmp_path, name, content, columns)
    assert totals.refused == 0
    assert lines == expected


async def test_a_file_goes_on_where_it_was_sent(tmp_path):
    first, second = TOA5, '"2026-11-22 09:20:00",3,25,50\r\n"2026-11-22 09:3'
    assert len((await sent(tmp_path, "m.dat", first, Columns(), grows=True))[1]) == 2
    totals, lines = await sent(tmp_path, "m.dat", first + second, Columns(), grows=True)
    assert [p for _, _, p in lines] == [{"AirTC": "25", "RH": "50"}]
    totals, lines = await sent(tmp_path, "m.dat", first + second + '0:00",4,26,49\r\n', Columns(), grows=True)
    assert ([p for _, _, p in lines], totals.rows) == ([{"AirTC": "26", "RH": "49"}], 4)


async def test_the_hour_that_a_clock_shows_twice_is_told_apart_by_order(tmp_path):
    rows = "at,t\n" + "".join(
        f"2026-10-25 {text},1\n" for text in ("01:30:00", "02:30:00", "02:00:00", "02:30:00", "03:30:00")
    )
    _, lines = await sent(tmp_path, "a.csv", rows, Columns(device_id="x", time="at", time_zone="Europe/Berlin"))
    assert [at for _, at, _ in lines] == [
        us(f"2026-10-{text}:00Z") for text in ("24T23:30", "25T00:30", "25T01:00", "25T01:30", "25T02:30")
    ]


async def test_day_and_month_that_nobody_can_tell_apart_are_refused(tmp_path):
    totals, lines = await sent(
        tmp_path,
        "a.csv",
        "at,t\n03/04/2026 01:00,1\n13/04/2026 01:00,1\n",
        Columns(device_id="x", time="at", time_zone="UTC"),
    )
    assert (totals.refused, [at for _, at, _ in lines]) == (1, [us("2026-04-13T01:00:00Z")])
    assert "--date-order" in totals.examples[0]


@pytest.mark.parametrize(
    ("text", "order", "expected"),
    [
        ("2026-11-22 09:00:00", None, "2026-11-22T09:00:00"),
        ("2026/11/22 9:00", None, "2026-11-22T09:00:00"),
        ("22.11.26 09:00", None, "2026-11-22T09:00:00"),
        ("11/22/2026 12:00:00 AM", None, "2026-11-22T00:00:00"),
        ("11/22/26 12:05 pm", "mdy", "2026-11-22T12:05:00"),
        ("03/04/26 1:05p", "dmy", "2026-04-03T13:05:00"),
        ("26/11/22 09:00:00", "ymd", "2026-11-22T09:00:00"),
        ("22.11.2026", None, "2026-11-22T00:00:00"),
        ("31.12.2026 24:00", None, "2027-01-01T00:00:00"),
        ("2026-11-22T09:00:00+01:00", None, "2026-11-22T08:00:00"),
        ("03/04/2026", None, None),
        ("31.02.2026 09:00", None, None),
        ("11/22/2026 13:00 PM", None, None),
        ("yesterday", None, None),
    ],
)
def test_instants_as_loggers_write_them(text, order, expected):
    assert instant(text, order, None, None, NOW_US, None) == (None if expected is None else us(expected + "Z"))


@pytest.mark.parametrize(
    ("layout", "content"),
    [
        ("toa5", "a,b\n1,2\n"),
        ("hobo", TOA5),
        ("davis", HOBO),
        ("guess", "nothing\nof the kind\n"),
        ("guess", "1;2\n3;4\n"),
    ],
)
async def test_a_file_that_is_not_what_it_should_be(tmp_path, layout, content):
    with pytest.raises(FileError):
        await sent(tmp_path, "a.csv", content, Columns(device_id="x", layout=layout))


@given(st.lists(st.text(max_size=40), max_size=12), st.sampled_from(logger_files.NAMES))
def test_whatever_a_file_begins_with_is_a_layout_or_none(lines, name):
    try:
        found = layout_of(lines, name)
    except logger_files.LayoutError:
        return
    assert found is None or 0 < found.skip <= len(lines)


@given(st.text(max_size=40), st.sampled_from([None, "dmy", "mdy", "ymd"]), st.booleans())
def test_any_text_is_an_instant_or_none(text, order, zoned):
    zone = wall_clock("Europe/Berlin") if zoned else None
    assert isinstance(instant(text, order, "+01:00", zone, NOW_US, None), int | None)


async def test_a_folder_is_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "POLL_S", 0.05)
    folder, done, publisher, stop = tmp_path / "in", tmp_path / "done", MemoryPublisher(), asyncio.Event()
    folder.mkdir()
    troubles: list[str] = []
    (folder / "a.dat").write_text(TOA5)
    (folder / "b.dat.part").write_text(TOA5)
    (folder / "c.dat").write_text("")
    (folder / "d.xlsx").write_text("x\n")
    (tmp_path / "taken").mkdir()

    async def turned(condition):
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.02)

    def start(settle_s, into):
        return asyncio.create_task(
            watch(folder, "*", None, Columns(), RawProducer(publisher, "files"), Positions(tmp_path / "state"), LIMITS, SystemClock(), stop,
                  done=into, settle_s=settle_s, on_trouble=lambda path, why: troubles.append(path.name))
        )  # fmt: skip

    def rows():
        return [line["payload"] for line in publisher.lines()]

    task = start(600, done)
    await turned(lambda: len(rows()) == 2)
    with (folder / "a.dat").open("a") as file:
        file.write('"2026-11-22 09:20:00",3,25,50\r\n"2026')
    await turned(lambda: len(rows()) == 3)
    await turned(lambda: troubles)
    stop.set()
    told = await task
    assert (told.sent, told.moved, troubles, done.exists()) == (3, 0, ["d.xlsx"], False)
    # Started again it goes on; what is left alone is finished, its torn last line too, and goes away.
    stop.clear()
    task = start(0.01, done)
    await turned(lambda: not (folder / "a.dat").exists())
    stop.set()
    told = await task
    assert (told.sent, told.refused, told.moved, len(rows())) == (0, 1, 2, 3)
    assert (done / "a.dat").exists()
    assert (folder / "b.dat.part").exists()


async def test_a_folder_of_too_many_files_says_what_to_do(tmp_path, monkeypatch):
    for number in range(3):
        (tmp_path / f"{number}.csv").write_text("")
    monkeypatch.setattr(files, "WATCHED_FILES_MAX", 2)
    producer, stop = RawProducer(MemoryPublisher(), "files"), asyncio.Event()
    with pytest.raises(FileError, match="--done"):
        await watch(tmp_path, "*", None, Columns(), producer, Positions(tmp_path), LIMITS, SystemClock(), stop)
