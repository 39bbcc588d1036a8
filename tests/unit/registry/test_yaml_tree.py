"""YAML from files: what aliases stand for is bounded before it is made; what people write with them keeps working."""

import io
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from preservarium.cli.decode import commands
from preservarium.domain.registry.checks import RegistryFileError
from preservarium.registry import codecs, yaml_tree
from preservarium.registry.file import read
from preservarium.registry.yaml_tree import editor, parse, plain_file

#: A refusal must not depend on what else the machine does: processor time of this process.
REFUSED_WITHIN_S = 1.0


def lists(levels: int = 9, width: int = 9) -> str:
    """The classic: each line stands for nine of the line before."""
    lines = ["a0: &a0 [lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels + 1)]
    return "\n".join(lines) + "\n"


def maps() -> str:
    pairs = [", ".join(f"k{j}: *a{i - 1}" for j in range(9)) for i in range(1, 10)]
    return "a0: &a0 {k: lol}\n" + "".join(f"a{i}: &a{i} {{{pair}}}\n" for i, pair in enumerate(pairs, 1))


def merges() -> str:
    """Merge keys of lists: few keys in the end, but each is looked up in all of them."""
    merged = [", ".join([f"*a{i - 1}"] * 9) for i in range(1, 10)]
    return "a0: &a0 {k: lol}\n" + "".join(f"a{i}: &a{i} {{<<: [{m}], k{i}: 1}}\n" for i, m in enumerate(merged, 1))


def merge_chain() -> str:
    """Each has all keys of the one before and one more."""
    return "a0: &a0 {k0: 0}\n" + "".join(f"a{i}: &a{i} {{<<: *a{i - 1}, k{i}: {i}}}\n" for i in range(1, 1_000))


def merges_and_values() -> str:
    steps = [f"a{i}: &a{i} {{<<: *a{i - 1}, x{i}: *a{i - 1}, y{i}: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 30)]
    return "a0: &a0 {k: lol}\n" + "\n".join(steps) + "\n"


def blocks() -> str:
    lines = ["- &a0", "  - lol"]
    for i in range(1, 10):
        lines += [f"- &a{i}", *[f"  - *a{i - 1}"] * 9]
    return "\n".join(lines) + "\n"


def keys() -> str:
    """Aliases as keys: what is compared must be whole."""
    return "a0: &a0 [lol]\n" + "".join(f"a{i}: &a{i} {{*a{i - 1} : *a{i - 1}}}\n" for i in range(1, 40))


def anchored_within() -> str:
    """Anchors within anchors, all of them in one value."""
    text = "&a0 [lol]"
    for i in range(1, 40):
        text = f"&a{i} [{text}, *a{i - 1}]"
    return f"a: {text}\n"


def names_again() -> str:
    """Two names, given anew in turn."""
    return "- &a [lol]\n" + "- &b [*a, *a]\n- &a [*b, *b]\n" * 30


BOMBS = {
    "lists": lists(),
    "lists, hardly too much": lists(5),
    "maps": maps(),
    "merges": merges(),
    "merge chain": merge_chain(),
    "merges and values": merges_and_values(),
    "blocks": blocks(),
    "keys": keys(),
    "anchors within anchors": anchored_within(),
    "names given again": names_again(),
    "a long text often": f"a: &a {'x' * 5_000}\nb: [{', '.join(['*a'] * 1_000)}]\n",
    "a folded text often": "a: &a >\n" + "  xxxx yyyy\n" * 500 + "b:\n" + "  - *a\n" * 2_000,
    "a long list often": f"a: &a [{', '.join('x' * 2_000)}]\nb: [{', '.join(['*a'] * 1_000)}]\n",
    "often merged": f"a: &a {{{', '.join(f'k{i}: 1' for i in range(500))}}}\n" + "".join(f"b{i}: {{<<: *a}}\n" for i in range(500)),
}  # fmt: skip


def harmless_s() -> float:
    """CPU that a file of three thousand words takes at this moment: on a busy machine, reading takes its time."""
    began = time.process_time()
    YAML(pure=True).compose(f"a: [{', '.join('x' * 3_000)}]\n")
    return time.process_time() - began


@pytest.fixture
def nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*_: Any) -> None:
        pytest.fail("the document was made before it was refused")

    monkeypatch.setattr(yaml_tree._Constructor, "construct_document", made)


@pytest.mark.filterwarnings("ignore::ruamel.yaml.error.ReusedAnchorWarning")
@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize("name", BOMBS)
def test_what_aliases_stand_for_is_bounded(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS[name])
    began = time.process_time()
    with pytest.raises(RegistryFileError, match=r"bomb\.yaml:\d+: with \*\w+, aliases stand for more than \d+") as e:
        plain_file(path)
    assert time.process_time() - began < max(REFUSED_WITHIN_S, 2 * harmless_s())
    line, alias = int(str(e.value).split(":")[1]), str(e.value).partition("with *")[2].partition(",")[0]
    assert f"*{alias}" in BOMBS[name].splitlines()[line - 1]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: &a [*a]\n", 1),
        ("a: &a\n  b: [1, {c: *a}]\n", 2),
        ("a: &a {<<: *a, b: 1}\n", 1),
        ("a:\n  &a\n  b: &b {<<: *a}\n", 3),
        ("? &a [*a]\n: 1\n", 1),
    ],
)
@pytest.mark.usefixtures("nothing_is_made")
def test_what_stands_within_itself_is_refused(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(RegistryFileError, match=rf"a\.yaml:{line}: the alias \*a stands within what it stands for"):
        plain_file(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["a: " + "[" * 5_000, "- " * 5_000 + "x", "{a: " * 3_000, "? " * 3_000, "a: " + "[" * 101 + "]" * 101])  # fmt: skip
@pytest.mark.usefixtures("nothing_is_made")
def test_what_is_nested_without_end_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "deep.yaml").write_text(f"# deep\n{text}\n")
    began = time.process_time()
    with pytest.raises(RegistryFileError, match=r"deep\.yaml:2: nested deeper than 100"):
        plain_file(tmp_path / "deep.yaml")
    assert time.process_time() - began < REFUSED_WITHIN_S


@pytest.mark.parametrize(
    "value",
    ["9" * 5_000, "-" + "9" * 5_000, "0x_", "+_", "!!int xx", "!!int ''", "!!int 1:2", "!!float xx", "!!float ''", "!!bool xx"],
)  # fmt: skip
def test_a_number_that_is_none_is_refused_with_its_line(tmp_path: Path, value: str) -> None:
    (tmp_path / "a.yaml").write_text(f"a: 1\nb:\n  - [x, {value}]\n")
    with pytest.raises(RegistryFileError, match=r"a\.yaml:3: '.* cannot be read as (int|float|bool)$") as e:
        plain_file(tmp_path / "a.yaml")
    assert len(str(e.value)) < len(str(tmp_path)) + 120


@pytest.mark.parametrize(
    ("text", "message"), [("\\0", "NUL"), ("x\\ud800", "half a character"), ("\\ude00\\ud83d", "half a character")]
)
def test_text_that_no_database_takes_is_a_problem(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(f'experiments:\n  - name: a\n    meta: {{x: ["{text}"]}}\n')
    (problem,) = read(tmp_path / "r.yaml").problems
    assert (problem.path, problem.line) == ("experiments[0].meta.x[0]", 3)
    assert message in problem.message


def test_values_and_characters_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list and its two texts: 1 + 2 + 3."""
    monkeypatch.setattr(yaml_tree, "ALIASED_PER_CHARACTER_MAX", 0)
    path = tmp_path / "a.yaml"
    path.write_text("a: &a [x, yy]\nb: *a\nc:\n  - &c [*a]\n  - *c\n")
    monkeypatch.setattr(yaml_tree, "ALIASED_MAX", 6 + 6 + 7)
    assert plain_file(path) == {"a": ["x", "yy"], "b": ["x", "yy"], "c": [[["x", "yy"]], [["x", "yy"]]]}
    for most, line in ((6 + 6 + 6, 5), (6 + 5, 4), (5, 2)):
        monkeypatch.setattr(yaml_tree, "ALIASED_MAX", most)
        with pytest.raises(RegistryFileError, match=rf"a\.yaml:{line}: .* more than {most} "):
            plain_file(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &a 1\nb: *a\n", {"a": 1, "b": 1}),
        ("a: &a 1.5\nb: [*a, *a]\n", {"a": 1.5, "b": [1.5, 1.5]}),
        ("a: &a true\nb: *a\n", {"a": True, "b": True}),
        ("a: &a 'no'\n*a : b\n", {"a": "no", "no": "b"}),
        ("a: &a\nb: *a\n", {"a": None, "b": None}),
        ("a: &a {x: 1}\nb: {<<: *a, x: 2}\nc: {x: 3, <<: *a}\n", {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 3}}),
        ("a: &a {x: 1}\nd: {<<: [*a, {x: 4, y: 5}], z: 1}\n", {"a": {"x": 1}, "d": {"x": 1, "y": 5, "z": 1}}),
        ("a: &a {x: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b}\n", {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1, "y": 2}}),
        ("a: {<<: {x: 1}, y: 2}\n", {"a": {"x": 1, "y": 2}}),
        # A name may be given again, and means the later one from there.
        ("a: &a 1\nb: *a\nc: &a x\nd: *a\n", {"a": 1, "b": 1, "c": "x", "d": "x"}),
    ],
)  # fmt: skip
def test_what_people_write_with_anchors_is_read(tmp_path: Path, text: str, expected: Any) -> None:
    (tmp_path / "a.yaml").write_text(text)
    found = plain_file(tmp_path / "a.yaml")
    assert found == expected
    assert [type(v) for v in found.values()] == [type(v) for v in expected.values()]


def test_a_fleet_may_have_nearly_all_from_one_anchor(tmp_path: Path) -> None:
    """Devices of 45 characters each, of which an anchor says ten times more."""
    mapping = ", ".join(f"field_{i}: {{component_type: temperature_{i}}}" for i in range(6))
    devices = "".join(f"  - {{<<: *common, device_id: dev-{i:09}}}\n" for i in range(500))
    first = f"  - &common {{device_id: first, type: T1, mapping: {{{mapping}}}}}\n"
    (tmp_path / "fleet.yaml").write_text(f"devices:\n{first}{devices}")
    file = read(tmp_path / "fleet.yaml")
    assert file.problems == []
    assert len(file.documents["device"]) == 501
    assert file.documents["device"][-1]["device_id"] == "dev-000000499"
    assert file.documents["device"][-1]["mapping"]["field_5"] == {"component_type": "temperature_5"}


def test_a_map_that_is_merged_costs_hardly_more_than_one_that_is_written(tmp_path: Path) -> None:
    def seconds(entry: str) -> float:
        (tmp_path / "many.yaml").write_text("a: &a {x: 1, y: 2}\n" + "".join(f"b{i}: {entry}\n" for i in range(2_000)))
        began = time.process_time()
        assert plain_file(tmp_path / "many.yaml")["b1999"] == {"x": 1, "y": 2}
        return time.process_time() - began

    assert seconds("{<<: *a}") < 4 * seconds("{x: 1, y: 2}")


_shared = st.lists(
    st.recursive(
        st.none() | st.booleans() | st.integers(-1_000, 1_000) | st.sampled_from(["", "x", "no", "0x1F", "a b"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        max_leaves=6,
    ).filter(lambda value: isinstance(value, list | dict) and value),
    min_size=1,
    max_size=3,
)


@settings(deadline=None)
@given(parts=_shared, picks=st.lists(st.integers(0, 99), min_size=1, max_size=8))
def test_shared_values_come_back_from_their_aliases(
    tmp_path_factory: pytest.TempPathFactory, parts: list[Any], picks: list[int]
) -> None:
    for pick in picks:
        parts.append([parts[pick % len(parts)], {"again": parts[pick % len(parts)]}])
    out = io.StringIO()
    YAML(typ="safe").dump({"all": parts}, out)
    assert "*id001" in out.getvalue()
    path = tmp_path_factory.getbasetemp() / "shared.yaml"
    path.write_text(out.getvalue(), encoding="utf-8")
    assert plain_file(path) == {"all": parts}


# --- every way to the loader -----------------------------------------------------------------------------------------

BOMB = lists()
REFUSED = r"bomb\.yaml:\d: with \*a\d, aliases stand for more than"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "valve.js").write_text("function decodeUplink(input) { return {data: {}}; }\n")
    (tmp_path / "bomb.yaml").write_text(f"uplinkDecoder: {{fileName: valve.js}}\n{BOMB}")
    return tmp_path


def test_a_registry_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text(f"{BOMB}devices:\n  - {{device_id: d, type: T, meta: *a9}}\n")
    with pytest.raises(RegistryFileError, match=REFUSED):
        read(tmp_path / "bomb.yaml")


@pytest.mark.parametrize("kind", ["table", "json", "javascript", "python"])
def test_what_a_parser_names_is_a_problem_of_the_file(folder: Path, kind: str) -> None:
    (folder / "registry.yaml").write_text(f"parsers:\n  - name: p\n    kind: {kind}\n    file: bomb.yaml\n")
    (problem,) = read(folder / "registry.yaml").problems
    assert (problem.path, problem.line) == ("parsers[0].file", 4)
    with pytest.raises(RegistryFileError, match=REFUSED):
        raise RegistryFileError(problem.message)


def test_a_codec_bundle_is_refused_whichever_of_its_files_is_named(folder: Path) -> None:
    for name in ("bomb.yaml", "valve.js"):
        with pytest.raises(RegistryFileError, match=REFUSED):
            codecs.load(folder / name)


def test_commands_refuse_it_in_one_line(folder: Path) -> None:
    decode, decoders = commands
    for command, arguments in (
        (decode, ["--codec", str(folder / "bomb.yaml"), "--hex", "00"]),
        (decoders, ["test", str(folder / "bomb.yaml")]),
    ):
        done = CliRunner().invoke(command, arguments)
        assert done.exit_code == 2
        assert "bomb.yaml:" in done.stderr
        assert "aliases stand for more than" in done.stderr
        assert "Traceback" not in done.output


def test_a_file_that_is_edited_is_bounded_too_and_keeps_its_aliases() -> None:
    with pytest.raises(yaml_tree.YAMLError, match="aliases stand for more than"):
        parse(editor(), BOMB)
    text = "# what\na: &a {x: 1} # one\nb:\n  <<: *a\n  y: 2\n"
    out = io.StringIO()
    editor().dump(parse(editor(), text), out)
    assert out.getvalue() == text


@pytest.mark.parametrize("text", ["? {a: 1}\n: 2\n", "? [{a: 1}]\n: 2\n", "rules: [{? {} : 1}]\n", "{[[], {}]: 1}"])
def test_a_key_that_is_no_text_is_refused_in_words(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RegistryFileError, match="key"):
        plain_file(path)
