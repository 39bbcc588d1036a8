"""`preservarium simulate`: a fleet that sends."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from preservarium.cli.output import print_json

if TYPE_CHECKING:
    from preservarium.cli.process import Process
    from preservarium.connectors.simulator import Catalogue, Totals

REGISTRY: Final = Path(__file__).resolve().parents[2] / "examples" / "registry.yaml"


@click.command()
@click.option(
    "--registry",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=REGISTRY,
    help="Registry file whose devices or types are played; default: examples/registry.yaml.",
)
@click.option("--devices", type=click.IntRange(1), help="A synthetic fleet of so many; default: the file's devices.")
@click.option("--type", "types", multiple=True, help="A device type of the synthetic fleet; default: all.")
@click.option("--rate", type=click.FloatRange(min=0.001), default=10.0, show_default=True, help="Messages a second.")
@click.option("--for", "for_s", type=click.FloatRange(min=0, min_open=True), help="Seconds; default: until SIGTERM.")
@click.option("--messages", type=click.IntRange(1), help="Stop after so many.")
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed gives the same values.")
@click.option("--print-devices", is_flag=True, help="Print the synthetic fleet as a registry file, and send nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON at the end.")
def simulate(
    registry: Path,
    devices: int | None,
    types: tuple[str, ...],
    rate: float,
    for_s: float | None,
    messages: int | None,
    seed: int,
    print_devices: bool,
    as_json: bool,
) -> None:
    """Play a fleet into iot_raw_data: payloads of the registry's examples, with values that move.

    A synthetic fleet (--devices) must be registered to be decoded:
    `preservarium simulate --devices 500 --print-devices > fleet.yaml`, `preservarium registry apply fleet.yaml`.
    """
    from preservarium.connectors import simulator
    from preservarium.registry import file as registry_file

    catalogue = load(registry)
    if devices is None and (types or print_devices):
        message = "--type and --print-devices need --devices"
        raise click.UsageError(message)
    documents: list[Any] = simulator.fleet(catalogue, devices, types) if devices is not None else catalogue.devices
    if print_devices:
        registry_file.dump({"device": documents}, sys.stdout)
        return
    _play(simulator.players(catalogue, documents, seed), rate, for_s, messages, as_json)


def load(path: Path) -> "Catalogue":
    """The simulator's catalogue of a registry file.

    Raises:
        RegistryFileError: the file has errors.
    """
    from preservarium.connectors.simulator import Catalogue
    from preservarium.registry import file as registry_file

    file = registry_file.read(path)
    file.raise_for_errors()
    return Catalogue(file.documents)


def _play(players: list[Any], rate: float, for_s: float | None, messages: int | None, as_json: bool) -> None:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from preservarium.cli.process import run
    from preservarium.connectors.base import Limits, RawProducer
    from preservarium.connectors.simulator import CONNECTOR, Simulator

    started = time.monotonic()
    simulator = Simulator(players, rate)
    line = Progress(
        SpinnerColumn(),
        TextColumn("{task.fields[messages]:,} messages, {task.fields[readings]:,} readings"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    task = line.add_task("", messages=0, readings=0)

    def progress(totals: "Totals") -> None:
        line.update(task, messages=totals.messages, readings=totals.readings)

    async def main(process: "Process") -> "Totals":
        return await simulator.run(
            RawProducer(process.publisher, CONNECTOR),
            process.clock,
            Limits.of(process.live()),
            stop=process.stop,
            for_s=for_s,
            messages_max=messages,
            on_progress=progress,
        )

    with line:
        totals = run(main)
    seconds = time.monotonic() - started
    if as_json:
        print_json(
            {
                "connector": CONNECTOR,
                "devices": len(players),
                "rate": rate,
                "messages": totals.messages,
                "readings": totals.readings,
                "retries": totals.retries,
                "behind_s": round(totals.behind_s, 3),
                "seconds": round(seconds, 3),
            }
        )
        return
    again = f"; {totals.retries} calls were repeated" if totals.retries else ""
    behind = f"; {totals.behind_s:.1f} s behind its schedule" if totals.behind_s else ""
    click.echo(
        f"{len(players)} devices: {totals.messages:,} messages, {totals.readings:,} readings expected, "
        f"in {seconds:.1f} s{again}{behind}"
    )


commands: list[click.Command] = [simulate]
