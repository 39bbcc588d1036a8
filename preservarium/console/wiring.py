"""The console: what a worker shows on its web port. `install(app)` mounts it."""

from typing import Any

from preservarium.console import access
from preservarium.console.commands import Commands
from preservarium.console.dashboards import DashboardViews
from preservarium.console.devices import DeviceViews
from preservarium.console.follower import BoardFollower
from preservarium.console.operators import Operators
from preservarium.console.refusals import RefusalsFollower, RefusalViews
from preservarium.console.tables import TableReader
from preservarium.console.trace import TraceViews
from preservarium.console.views import Console
from preservarium.console.workers import Workers, WorkersFollower
from preservarium.operations.alarm_board import Board, Desk
from preservarium.operations.command_desk import CommandDesk
from preservarium.operations.refusals import Refusals
from preservarium.serving import server
from preservarium.stores.device_reads import DeviceReads
from preservarium.stores.views import Views
from preservarium.streaming.publish import partition_of

__all__ = ["install"]


def install(app: Any) -> Console:
    """Mount the console on the app's web server, behind the door; call it once, while the app is being made.

    The routes go straight to the aiohttp application under Faust's web server, before Faust adds its own: the first
    that matches wins, and Faust too has a view for `/`.
    """
    # Hook: Faust's web driver runs its application by this. tests/contract holds it.
    app.web._runner = server.install(app.web.web_app, app.live)
    app.web.web_app.middlewares.append(access.closed(app.live))
    reads = app.resource(Views(lambda: app.live().postgres))
    tables = TableReader(lambda: app.state_tables, lambda key: partition_of(key, app.live().kafka.partitions))
    workers = Workers()
    console = Console(app, tables, workers)
    console.mount(app.web.web_app)
    DeviceViews(app, app.resource(DeviceReads(app.live)), tables).mount(app.web.web_app)
    refusals = Refusals()
    looking = app.add_dependency(RefusalsFollower(refusals, app.live, app.clock))
    RefusalViews(app, refusals, looking.asked).mount(app.web.web_app)
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
    return console
