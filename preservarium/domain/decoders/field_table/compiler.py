"""A field table to one function: each item checked, then written."""

import struct
from collections.abc import Callable, Mapping
from typing import Any

from preservarium.domain import expressions
from preservarium.domain.decoders.base import DECODED_MAX, ParserError
from preservarium.domain.decoders.field_table.language import (
    CHOICE_KEYS,
    ENUM_MAX,
    EPOCHS,
    FIELD_KEYS,
    GROUP_KEYS,
    IDENTIFIER,
    ITEMS_MAX,
    NAME_CHARACTERS_MAX,
    PART_KEYS,
    REPEAT_KEYS,
    TABLE_KEYS,
    TEMPLATE,
    TURNS_MAX,
    case_of,
    check_keys,
    choice_of,
    number_of,
    sets_time,
    slug,
)
from preservarium.domain.decoders.field_table.layout import (
    ENDIANS,
    Width,
    check_length,
    layout_of,
    order_of,
    text_source,
    width_of,
)
from preservarium.domain.decoders.field_table.runtime import Parse
from preservarium.domain.decoders.field_table.writer import Writer
from preservarium.domain.expressions import Name
from preservarium.domain.readings import json_text
from preservarium.domain.readings.instant import UNITS_US


def compile_table(source: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> tuple[str, Parse]:
    """Compile a table.

    Args:
        source: the table, as data.
        variables: a device's values for the table's `parameters`; others are not looked at.

    Returns:
        The generated source, and the function (payload, port, base time in µs) -> fields.

    Raises:
        ParserError: the table is wrong; the message names the item.
    """
    given = source.get("parameters") or {}
    if not isinstance(given, dict):
        message = "parameters: a mapping of names to numbers"
        raise ParserError(message)
    parameters: dict[str, float] = {}
    for name, default in given.items():
        if not isinstance(name, str) or not IDENTIFIER.fullmatch(name):
            message = f"parameters: {name!r} is not an identifier"
            raise ParserError(message)
        parameters[name] = number_of((variables or {}).get(name, default), f"parameters.{name}")
    return _Compiler(source, parameters).table()


class _Compiler(Writer):
    """One table to one function: checks each item, and writes what it does."""

    def __init__(self, source: Mapping[str, Any], parameters: Mapping[str, float]) -> None:
        super().__init__(parameters)
        self.source = source
        self.items = 0
        self.endian = choice_of(source.get("endian", "big"), ENDIANS, "endian")
        self.has_time = False

    # --- items ---

    def fields(self, items: Any, where: str) -> None:
        if not isinstance(items, list):
            message = f"{where}: a list of items is expected, not {json_text.kind_of(items)}"
            raise ParserError(message)
        i = 0
        while i < len(items):
            item = items[i]
            at = f"{where}[{i}]"
            if not isinstance(item, dict):
                message = f"{at}: an item is a mapping, not {json_text.kind_of(item)}"
                raise ParserError(message)
            self.count_item()
            run: list[tuple[dict[str, Any], Width, str]] = []
            while i < len(items) and (member := self.of_run(items[i], f"{where}[{i}]", run)):
                run.append(member)
                i += 1
                self.count_item()
            if run:
                self.run(run)
                continue
            self.item(item, at)
            i += 1

    def count_item(self) -> None:
        self.items += 1
        if self.items > ITEMS_MAX:
            message = f"more than {ITEMS_MAX} items"
            raise ParserError(message)

    def item(self, item: dict[str, Any], where: str) -> None:
        if "repeat" in item:
            check_keys(item, REPEAT_KEYS, where)
            self.guarded(item, where, self.repeat)
        elif "switch" in item:
            check_keys(item, CHOICE_KEYS, where)
            self.guarded(item, where, self.choice)
        elif "fields" in item:
            check_keys(item, GROUP_KEYS, where)
            self.group(item, where)
        elif "type" in item:
            check_keys(item, FIELD_KEYS, where)
            self.guarded(item, where, self.single)
        elif "expr" in item:
            check_keys(item, FIELD_KEYS, where)
            self.guarded(item, where, self.computed)
        else:
            message = f"{where}: neither a field (type, expr) nor a group, repeat or switch: {sorted(item)}"
            raise ParserError(message)

    def guarded(self, item: dict[str, Any], where: str, compile_item: Callable[[dict[str, Any], str], None]) -> None:
        if "when" not in item:
            compile_item(item, where)
            return
        condition = self.condition(item["when"], where)
        with self.block(f"if {condition}:"):
            compile_item(item, where)

    def condition(self, text: Any, where: str) -> str:
        checked = self.check(str(text).lower() if isinstance(text, bool) else text, f"{where}.when")
        if checked.kind != "number":
            message = f"{where}.when: a condition is a number or a comparison"
            raise ParserError(message)
        if not checked.risky:
            return checked.source
        self.flush()
        return self.evaluate(checked, "w", "0").source

    def of_run(
        self, item: Any, where: str, run: list[tuple[dict[str, Any], Width, str]]
    ) -> tuple[dict[str, Any], Width, str] | None:
        """The item with its width, where it can join the fixed-width fields of `run`."""
        if (
            not isinstance(item, dict)
            or "type" not in item
            or {"when", "at", "repeat", "switch", "fields"} & item.keys()
        ):
            return None
        check_keys(item, FIELD_KEYS, where)
        width = width_of(item["type"], where)
        check_length(item, width, where)
        if not width.size:
            length = item.get("length")
            if isinstance(length, bool) or not isinstance(length, int) or not 0 < length <= 65_536:
                return None
            width = Width(width.kind, length)
        if run and order_of(item, self.endian, where) != order_of(run[0][0], self.endian, where):
            return None
        return item, width, where

    def run(self, run: list[tuple[dict[str, Any], Width, str]]) -> None:
        """Fixed-width fields side by side: one unpack."""
        little = order_of(run[0][0], self.endian, run[0][2]) == "<"
        formats, targets, sources = "", [], []
        for item, width, where in run:
            fmt, names, source = layout_of(item, width, self.endian, self, where)
            formats += fmt
            targets += names
            sources.append(source)
        size = struct.calcsize(("<" if little else ">") + formats)
        assert size == sum(width.size for _, width, _ in run), "a layout has another size than its type"
        at = self.take(size)
        if targets:
            unpack = self.constant(struct.Struct(("<" if little else ">") + formats).unpack_from, "u")
            self.line(f"{', '.join(targets)}, = {unpack}(b, {at})")
        for (item, width, where), source in zip(run, sources, strict=True):
            if source is not None:
                self.value(item, width, source, where)

    def single(self, item: dict[str, Any], where: str) -> None:
        """A field that stands alone: at a place of its own, or with a length that earlier bytes give."""
        width = width_of(item["type"], where)
        check_length(item, width, where)
        if not width.size and "length" not in item:
            message = f"{where}: {item['type']} needs a length"
            raise ParserError(message)
        if not width.size and "at" not in item:
            self.counted(item, width, where)
            return
        if not width.size:
            if not isinstance(item["length"], int) or not 0 < item["length"] <= 65_536:
                message = f"{where}.length: a number of bytes, where the place is given by `at`"
                raise ParserError(message)
            width = Width(width.kind, item["length"])
        if "at" not in item:
            self.run([(item, width, where)])
            return
        at = item["at"]
        if isinstance(at, bool) or not isinstance(at, int) or abs(at) > 65_536:
            message = f"{where}.at: a byte offset, negative from the end"
            raise ParserError(message)
        self.flush()
        offset = str(at) if at >= 0 else f"n - {-at}"
        self.line(f"if not 0 <= {offset} <= n - {width.size}: raise short({width.size}, {offset}, n)")
        fmt, targets, source = layout_of(item, width, self.endian, self, where)
        if source is None:
            return
        mark = order_of(item, self.endian, where)
        unpack = self.constant(struct.Struct(mark + fmt).unpack_from, "u")
        self.line(f"{', '.join(targets)}, = {unpack}(b, {offset})")
        self.value(item, width, source, where)

    def counted(self, item: dict[str, Any], width: Width, where: str) -> None:
        """Text, hexadecimal or padding of a length that an expression gives; `end`: all that is left."""
        self.flush()
        self.dynamic()
        size = self.fresh("z")
        if item["length"] == "end":
            self.line(f"{size} = n - p")
        else:
            self.line(f"{size} = count({self.check(item['length'], where + '.length').source})")
            self.line(f"if n < p + {size}: raise short({size}, p, n)")
        raw = self.fresh("r")
        self.line(f"{raw} = b[p:p + {size}]")
        self.line(f"p += {size}")
        if width.kind != "skip":
            self.value(item, width, text_source(item, width, raw, where), where)

    def computed(self, item: dict[str, Any], where: str) -> None:
        self.value(item, None, None, where)

    def value(self, item: Mapping[str, Any], width: Width | None, raw: str | None, where: str) -> None:
        """From the raw value to what is emitted and what later expressions may refer to."""
        name = item.get("name")
        if not isinstance(name, str) or not 0 < len(name) <= NAME_CHARACTERS_MAX:
            message = f"{where}: a name of 1 to {NAME_CHARACTERS_MAX} characters is needed"
            raise ParserError(message)
        where = f"{where} ({name})"
        key = item.get("key", slug(TEMPLATE.sub("", name)))
        if not isinstance(key, str) or ("key" in item and not IDENTIFIER.fullmatch(key)):
            message = f"{where}.key: {key!r} is not an identifier"
            raise ParserError(message)
        text = width is not None and width.kind in {"string", "hex"}
        x: Name | None = None
        if raw is not None and width is not None:
            if not IDENTIFIER.fullmatch(raw):
                variable = self.fresh("x")
                self.line(f"{variable} = {raw}")
                raw = variable
            x = Name(raw, "text" if text else "number", 1 if width.kind == "bool" else width.bits)
        self.tests(item, name, x, where)
        if isinstance(item.get("bits"), list):
            if x is None or text:
                message = f"{where}.bits: parts are of a whole number"
                raise ParserError(message)
            if key:
                self.scope[key] = x
            for i, part in enumerate(item["bits"]):
                self.part(part, x, f"{where}.bits[{i}]")
            return
        known = self.scaled(item, x, where)
        if key:
            self.scope[key] = known
        if "time" in item:
            self.time(item, known, where)
            return
        self.emit(item, name, known, x, width is not None and width.kind == "bool", where)

    def tests(self, item: Mapping[str, Any], name: str, x: Name | None, where: str) -> None:
        if "equals" not in item:
            return
        if x is None:
            message = f"{where}.equals: is of a field that is read"
            raise ParserError(message)
        wanted = item["equals"]
        allowed = wanted if isinstance(wanted, list) else [wanted]
        if not all(isinstance(w, int | float | str) for w in allowed):
            message = f"{where}.equals: numbers or text"
            raise ParserError(message)
        # repr() of what is not finite would be a name that nothing has.
        allowed = [w if isinstance(w, str | bool) else number_of(w, f"{where}.equals") for w in allowed]
        self.flush()
        constants = ", ".join(repr(w) for w in allowed)
        test = f"{x.source} != {constants}" if len(allowed) == 1 else f"{x.source} not in ({constants},)"
        self.line(f"if {test}: raise unequal({name!r}, {x.source}, {' or '.join(map(str, allowed))!r})")

    def scaled(self, item: Mapping[str, Any], x: Name | None, where: str) -> Name:
        """`expr` over x, then × scale ÷ div + offset, then round."""
        steps = {k: number_of(item[k], f"{where}.{k}") for k in ("scale", "div", "offset") if k in item}
        if steps.get("div") == 0:
            message = f"{where}.div: is 0"
            raise ParserError(message)
        extra = {"x": x} if x is not None else {}
        if "expr" in item:
            checked = self.check(item["expr"], f"{where}.expr", extra)
        elif x is None:
            message = f"{where}: an expr is needed"
            raise ParserError(message)
        elif not steps and "round" not in item:
            return x
        else:
            checked = expressions.Expression(x.source, x.kind, x.bits, False, frozenset())
        if checked.kind == "text":
            if steps or "round" in item:
                message = f"{where}: text has no scale"
                raise ParserError(message)
            return self.evaluate(checked, "e", "''")
        source, bits, risky = checked.source, checked.bits, checked.risky
        if "scale" in steps:
            source, bits = f"({source} * {steps['scale']!r})", 0 if isinstance(steps["scale"], float) else bits + 64
        if "div" in steps:
            source, bits = f"({source} / {steps['div']!r})", 0
        if "offset" in steps:
            source, bits = f"({source} + {steps['offset']!r})", 0 if isinstance(steps["offset"], float) else bits + 1
        if "round" in item:
            digits = item["round"]
            if isinstance(digits, bool) or not isinstance(digits, int) or not 0 <= digits <= 12:
                message = f"{where}.round: 0 to 12 digits"
                raise ParserError(message)
            source, risky = f"_round({source}, {digits})", True
        return self.evaluate(expressions.Expression(source, "number", bits, risky, checked.names), "e", "NAN")

    def part(self, part: Any, whole: Name, where: str) -> None:
        """Some bits of a whole number: `bit: n`, or `bits: [low, high]`, both counted from the least significant."""
        if not isinstance(part, dict):
            message = f"{where}: a mapping is expected"
            raise ParserError(message)
        self.count_item()
        check_keys(part, PART_KEYS, where)
        span = [part["bit"], part["bit"]] if "bit" in part else part.get("bits")
        if not (isinstance(span, list) and len(span) == 2 and all(type(s) is int for s in span)):
            message = f"{where}: `bit: n` or `bits: [low, high]` is needed"
            raise ParserError(message)
        low, high = span
        if not 0 <= low <= high < max(whole.bits, 1):
            message = f"{where}: bits {low} to {high} of a number of {whole.bits}"
            raise ParserError(message)
        count = high - low + 1
        shifted = f"{whole.source} >> {low}" if low else whole.source
        source = f"({shifted}) & {(1 << count) - 1}"
        if part.get("signed"):
            source = f"_signed({source}, {count})"
        flag = "bit" in part and not {"scale", "div", "offset", "expr", "enum"} & part.keys()
        name = self.fresh("q")
        self.line(f"{name} = {source}")
        item = {k: v for k, v in part.items() if k not in {"bit", "bits", "signed"}}
        self.value(item, Width("bool" if flag else "uint", (count + 7) // 8), f"bool({name})" if flag else name, where)

    def time(self, item: Mapping[str, Any], known: Name, where: str) -> None:
        """An instant in the payload: what follows in this block was measured then."""
        unit = choice_of(item["time"], set(UNITS_US), f"{where}.time")
        epoch = EPOCHS[choice_of(str(item.get("epoch", "unix")), set(EPOCHS), f"{where}.epoch")]
        if known.kind != "number":
            message = f"{where}.time: is of a number"
            raise ParserError(message)
        self.flush()
        self.line(f"t = base = instant({known.source}, {UNITS_US[unit]!r}, {epoch})")
        if self.depth == 0:
            # What was emitted before it belongs to the same instant.
            self.has_time = True
            self.line("tm = t")

    def emit(self, item: Mapping[str, Any], name: str, known: Name, x: Name | None, flag: bool, where: str) -> None:
        emitted = item.get("emit", True)
        if not isinstance(emitted, bool):
            message = f"{where}.emit: is true or false"
            raise ParserError(message)
        if not emitted:
            return
        value = known.source
        if "enum" in item:
            enum = self.enumeration(item["enum"], where)
            value = f"{enum}({known.source}, None) or str({known.source})"
        elif flag and x is known and not value.startswith("bool("):
            value = f"bool({value})"
        unit = item.get("unit")
        if unit is not None and not isinstance(unit, str):
            message = f"{where}.unit: is text"
            raise ParserError(message)
        pin = item.get("pin")
        shown = "None" if pin is None else self.template(str(pin), f"{where}.pin")
        decoded = f"D(({self.template(name, where)}, {value}, {unit!r}, t, {shown}))"
        if "invalid" in item and x is not None:
            sentinels = item["invalid"] if isinstance(item["invalid"], list) else [item["invalid"]]
            if not all(isinstance(s, int | float | str) for s in sentinels):
                message = f"{where}.invalid: numbers or text"
                raise ParserError(message)
            self.flush()
            self.line(f"if {x.source} not in ({', '.join(map(repr, sentinels))},): out.append({decoded})")
            return
        self.pending.append(decoded)

    def enumeration(self, given: Any, where: str) -> str:
        if not isinstance(given, dict) or not 0 < len(given) <= ENUM_MAX:
            message = f"{where}.enum: a mapping of 1 to {ENUM_MAX} numbers to text"
            raise ParserError(message)
        table: dict[Any, str] = {}
        for number, text in given.items():
            try:
                table[int(number, 0) if isinstance(number, str) else int(number)] = str(text)
            except ValueError:
                message = f"{where}.enum: {number!r} is not a whole number"
                raise ParserError(message) from None
        return self.constant(table.get, "m")

    # --- structure ---

    def offset_time(self, item: Mapping[str, Any], where: str) -> None:
        if "time_offset_s" not in item:
            return
        checked = self.check(item["time_offset_s"], f"{where}.time_offset_s")
        self.flush()
        self.line(f"t = base + instant({checked.source}, 1000000.0, 0)")

    def group(self, item: dict[str, Any], where: str) -> None:
        header = f"if {self.condition(item['when'], where)}:" if "when" in item else "if True:"
        with self.block(header):
            self.bounded(item, where)
        if "else" in item:
            if "when" not in item:
                message = f"{where}.else: without a `when`"
                raise ParserError(message)
            with self.block("else:"):
                self.fields(item["else"], f"{where}.else")

    def bounded(self, item: dict[str, Any], where: str) -> None:
        saved: str | None = None
        times = self.saved_times(item)
        if "within" in item:
            saved, end = self.fresh("n"), self.fresh("z")
            self.line(f"{end} = p + count({self.check(item['within'], where + '.within').source})")
            self.line(f"if n < {end}: raise short({end} - p, p, n)")
            self.line(f"{saved} = n")
            self.line(f"n = {end}")
        self.offset_time(item, where)
        self.fields(item.get("fields"), f"{where}.fields")
        self.flush()
        if saved is not None:
            # The length leads on to the next item, also past bytes that this table does not know.
            self.line("p = n")
            self.line(f"n = {saved}")
        self.restore_times(times)

    def saved_times(self, item: Mapping[str, Any]) -> tuple[str, str] | None:
        """Inside a group with times of its own, `t` and `base` change and are put back."""
        if "time_offset_s" not in item and not sets_time(item.get("fields")):
            return None
        t, base = self.fresh("t"), self.fresh("t")
        self.line(f"{t} = t; {base} = base")
        return t, base

    def restore_times(self, saved: tuple[str, str] | None) -> None:
        if saved is not None:
            self.line(f"t = {saved[0]}; base = {saved[1]}")

    def repeat(self, item: dict[str, Any], where: str) -> None:
        self.flush()
        self.dynamic()
        index = self.fresh("i")
        times = self.saved_times(item)
        if item["repeat"] == "end":
            self.line(f"{index} = -1")
            header = "while p < n:"
        else:
            checked = self.check(item["repeat"], f"{where}.repeat")
            header = f"for {index} in range(count({checked.source})):"
        with self.block(header):
            self.line("k += 1")
            self.line(f"if k > {TURNS_MAX} or len(out) > {DECODED_MAX}: raise too_much()")
            if item["repeat"] == "end":
                self.line(f"{index} += 1")
                start = self.fresh("p")
                self.line(f"{start} = p")
            self.scope["i"] = Name(index, bits=16)
            self.offset_time(item, where)
            self.fields(item.get("fields"), f"{where}.fields")
            self.flush()
            if item["repeat"] == "end":
                # A turn that takes nothing would turn for ever.
                self.line(f"if p == {start}: raise rest(p, n)")
        self.restore_times(times)

    def choice(self, item: dict[str, Any], where: str) -> None:
        checked = self.check(item["switch"], f"{where}.switch")
        self.flush()
        chosen = self.evaluate(checked, "s", None)
        cases = item.get("cases")
        if not isinstance(cases, dict) or not cases:
            message = f"{where}.cases: a mapping is expected"
            raise ParserError(message)
        self.dynamic()
        word = "if"
        for given, fields in cases.items():
            label = case_of(given, chosen.kind, f"{where}.cases")
            with self.block(f"{word} {chosen.source} == {label!r}:"):
                self.fields(fields, f"{where}.cases[{given}]")
            word = "elif"
        default = item.get("default", "reject")
        if default == "reject":
            with self.block("else:"):
                self.line(f"raise no_case({chosen.source}, p)")
        elif default == "stop":
            # What comes after an unknown tag of unknown length cannot be read.
            with self.block("else:"):
                self.line("p = n")
        elif default != "ignore":
            with self.block("else:"):
                self.fields(default, f"{where}.default")

    # --- the whole ---

    def table(self) -> tuple[str, Parse]:
        check_keys(self.source, TABLE_KEYS, "table")
        self.line("n = len(b)")
        self.line("out = []")
        self.line("p = k = 0")
        self.line("t = tm = None")
        rest = choice_of(self.source.get("rest", "reject"), {"reject", "ignore"}, "rest")
        if ("fields" in self.source) == ("ports" in self.source):
            message = "a table has either `fields` or `ports`"
            raise ParserError(message)
        if "fields" in self.source:
            self.fields(self.source["fields"], "fields")
        else:
            self.ports(self.source["ports"])
        self.flush()
        if rest == "reject":
            end = "p" if self.position is None else str(self.position)
            self.line(f"if {end} != n: raise rest({end}, n)")
        if self.has_time:
            self.line(
                "if tm is not None: return [D((d[0], d[1], d[2], tm if d[3] is None else d[3], d[4])) for d in out]"
            )
        self.line("return out")
        return self.finished()

    def ports(self, ports: Any) -> None:
        if not isinstance(ports, dict) or not ports:
            message = "ports: a mapping of port numbers to fields"
            raise ParserError(message)
        word = "if"
        default: Any = None
        self.dynamic()
        for given, fields in ports.items():
            if given in {"default", None}:
                default = fields
                continue
            label = case_of(given, "number", "ports")
            self.depth -= 1  # a port is the whole payload: its time is the message's
            with self.block(f"{word} port == {label!r}:"):
                self.fields(fields, f"ports[{given}]")
            self.depth += 1
            word = "elif"
        if default is not None and word == "elif":
            with self.block("else:"):
                self.fields(default, "ports[default]")
        elif word == "elif":
            with self.block("else:"):
                self.line("raise no_port(port)")
        else:
            self.fields(default, "ports[default]")
