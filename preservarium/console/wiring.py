"""The console: what a worker shows on its web port. `install(app)` mounts it."""

import sys
from collections.abc import Callable
from typing import Any

from preservarium.console import access, api, oidc
from preservarium.console.audit import Audit
from preservarium.console.commands import Commands
from preservarium.console.dashboards import DashboardViews
from preservarium.console.decoding import Bench, DecodeViews
from preservarium.console.devices import DeviceViews
from preservarium.console.explore import ExploreViews
from preservarium.console.follower import BoardFollower
from preservarium.console.messages import MessageViews
from preservarium.console.operators import Operators
from preservarium.console.people import PeopleViews
from preservarium.console.refusals import RefusalsFollower, RefusalViews
from preservarium.console.registry import RegistryViews
from preservarium.console.state import StateViews
from preservarium.console.tables import TableReader
from preservarium.console.trace import TraceViews
from preservarium.console.unknown import UnknownViews
from preservarium.console.views import Console
from preservarium.console.workers import Workers, WorkersFollower
from preservarium.operations.alarm_board import Board, Desk
from preservarium.operations.command_desk import CommandDesk
from preservarium.operations.refusals import Refusals
from preservarium.serving import people, server
from preservarium.settings import SettingsError
from preservarium.stores.people_log import PeopleLog
from preservarium.stores.registry_reads import RegistryReads
from preservarium.stores.series_reads import SeriesReads
from preservarium.stores.views import Views
from preservarium.streaming.publish import partition_of

__all__ = ["install"]


def install(app: Any) -> Console:
    """Mount the console on the app's web server, behind the door; call it once, while the app is being made.

    The routes go straight to the aiohttp application under Faust's web server, before Faust adds its own: the first
    that matches wins, and Faust too has a view for `/`.

    Raises:
        SystemExit: the file of users cannot be read, or what OIDC needs is not installed: said in one line.
    """
    _checked(lambda: people.current(app.live().web))
    _checked(lambda: oidc.check(app.live().web))
    _guard(app)
    # Hook: Faust's web driver runs its application by this. tests/contract holds it.
    app.web._runner = server.install(app.web.web_app, app.live)
    app.web.web_app.middlewares.append(access.closed(app.live))
    reads = app.resource(Views(lambda: app.live().postgres))
    tables = TableReader(lambda: app.state_tables, lambda key: partition_of(key, app.live().kafka.partitions))
    workers = Workers()
    told = app.resource(PeopleLog(lambda: app.live().postgres))
    audit = app.add_dependency(Audit(told, app.live, app.clock))
    console = Console(app, tables, workers, audit.tell)
    console.mount(app.web.web_app)
    PeopleViews(app, audit, told).mount(app.web.web_app)
    StateViews(app, tables, workers, console.worker).mount(app.web.web_app)
    devices = app.resource(SeriesReads(app.live))
    ExploreViews(app, devices).mount(app.web.web_app)
    DeviceViews(app, devices, tables).mount(app.web.web_app)
    MessageViews(app).mount(app.web.web_app)
    refusals = Refusals()
    looking = app.add_dependency(RefusalsFollower(refusals, app.live, app.clock))
    RefusalViews(app, refusals, looking.asked).mount(app.web.web_app)
    registry, bench = app.resource(RegistryReads(app.live)), app.resource(Bench(app))
    DecodeViews(app, registry, refusals, bench).mount(app.web.web_app)
    RegistryViews(app, registry, bench).mount(app.web.web_app)
    UnknownViews(app, registry, bench).mount(app.web.web_app)
    follower = app.add_dependency(
        WorkersFollower(workers, console.state, app.publisher.publish, app.live, app.clock, app.clock_check)
    )
    app.on_before_shutdown.connect(follower.goodbye)
    board = Board()
    app.add_dependency(BoardFollower(board, app.live, app.clock))
    DashboardViews(app).mount(app.web.web_app)
    TraceViews(app).mount(app.web.web_app)
    Operators(app, Desk(board, app.publisher.publish, app.clock), reads).mount(app.web.web_app)
    Commands(app, CommandDesk(app.publisher.publish, app.clock, reads.registered), reads).mount(app.web.web_app)
    api.mount(app.web.web_app)
    return console


def _guard(app: Any) -> None:
    """Do not open a port that would show everybody everything."""

    def check() -> None:
        # As it is bound: Faust's command line may name another address than the settings, or no web server.
        if app.conf.web_enabled:
            _checked(lambda: access.check(app.live().web, app.conf.web_bind))

    app.start_checks.append(check)


def _checked(check: Callable[[], Any]) -> None:
    try:
        check()
    except (SettingsError, people.PeopleError) as e:
        print(f"preservarium: {e}", file=sys.stderr)  # one line, before anything is served
        raise SystemExit(2) from None
