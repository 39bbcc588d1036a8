"""Proving parsers by their examples: declarative ones in this process, scripts in the sandbox as in the stream."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import structlog

from preservarium import metrics
from preservarium.domain.decoders import examples
from preservarium.domain.decoders.examples import Outcome
from preservarium.domain.decoders.scripts import FUNCTIONS
from preservarium.domain.registry.checks import RegistryFile
from preservarium.errors import PreservariumError
from preservarium.sandbox import pool
from preservarium.sandbox.pool import Call, Limits, SandboxPool, Script
from preservarium.settings import Settings

log = structlog.get_logger(__name__)


class Sandbox(Protocol):
    """Where scripts run."""

    async def run(self, calls: Sequence[Call]) -> list[pool.Outcome]:
        """The outcome of every call, in their order."""
        ...


async def prove(docs: Sequence[Mapping[str, Any]], sandbox: Sandbox) -> list[list[Outcome]]:
    """Run the examples of parsers: for each parser document the outcomes of its examples, in their order.

    Raises:
        Fatal: a parser is a script, and the sandbox does not start.
    """
    proven: list[list[Outcome]] = []
    waiting: list[tuple[list[Outcome], examples.Asked, Mapping[str, Any]]] = []
    calls: list[Call] = []
    for doc in docs:
        if doc["kind"] not in FUNCTIONS:
            proven.append(examples.run(doc))
            continue
        asked, outcomes = examples.ask(doc)
        proven.append(outcomes)
        for call in asked:
            waiting.append((outcomes, call, doc["examples"][call.index]))
            script = Script(call.parser.script_id, call.parser.name, call.parser.kind, call.parser.source)
            calls.append(Call(script, call.parser.function, call.arguments))
    if calls:
        for (outcomes, call, example), done in zip(waiting, await sandbox.run(calls), strict=True):
            fault = done.fault
            line = f"line {fault.line}: " if fault is not None and fault.line is not None else ""
            outcomes.append(examples.judge(call, example, done.text, f"{line}{fault.message}" if fault else ""))
    for outcomes in proven:
        outcomes.sort(key=lambda o: o.index)
    return proven


async def check_scripts(file: RegistryFile, settings: Settings) -> None:
    """Note in a registry file what its scripts' examples show; a draft that fails is only a warning.

    `preservarium.domain.registry.checks.check_meaning` does so for declarative parsers.
    """
    scripts = [(i, d) for i, d in enumerate(file.documents.get("parser", ())) if d["kind"] in FUNCTIONS]
    tried = [(i, d) for i, d in scripts if d.get("examples")]
    if not tried:
        return
    sandbox = SandboxPool(Limits.of(settings))
    try:
        proven = await prove([d for _, d in tried], sandbox)
    except PreservariumError as e:
        for i, _ in tried:
            file.problem("parser", i, ("examples",), f"cannot be run: {e}")
        return
    finally:
        await sandbox.close()
    for (i, doc), outcomes in zip(tried, proven, strict=True):
        level: Literal["error", "warning"] = "error" if doc["status"] == "active" else "warning"
        for outcome in outcomes:
            if not outcome.ok:
                file.problem("parser", i, ("examples", outcome.index), "; ".join(outcome.differences), level)


async def check_active(parsers: Iterable[Mapping[str, Any]], settings: Settings) -> int:
    """Run the examples of the parsers in force; log and count what fails. Never raises for what a parser does.

    Returns:
        How many examples fail.
    """
    docs = [doc for doc in parsers if doc.get("status") == "active"]
    # Of its own, so that payloads under way wait for no example.
    sandbox = SandboxPool(Limits.of(settings))
    failing = 0
    try:
        for doc, outcomes in zip(docs, await prove(docs, sandbox), strict=True):
            for outcome in outcomes:
                if not outcome.ok:
                    failing += 1
                    log.error(
                        "parser_example_fails",
                        parser=f"{doc['name']}@{doc['version']}",
                        example=outcome.index,
                        differences=outcome.differences[:5],
                    )
    except PreservariumError as e:
        log.error("parsers_not_checked", error=str(e))
    finally:
        await sandbox.close()
    metrics.PARSER_EXAMPLES_FAILING.set(failing)
    log.info("parsers_checked", parsers=len(docs), failing=failing)
    return failing
