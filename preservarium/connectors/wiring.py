"""Connectors inside a worker: they share its publisher, its settings and its web port."""

from typing import Any

from mode import Service

from preservarium.clock import StampClock
from preservarium.connectors import http, mqtt
from preservarium.connectors.base import formats_in
from preservarium.connectors.mailbox import Mailbox, MailboxFollower


def install(app: Any) -> list[str]:
    """Run the enabled connectors inside a worker; call once, while agents are being declared.

    Args:
        app: preservarium.streaming.app.app.

    Returns:
        Names of the connectors that will run.

    Raises:
        SettingsError: a subscription of the MQTT connector is no topic pattern.
    """
    settings = app.live()
    clock = StampClock(app.clock)  # one for all: a device may come by several
    installed: list[str] = []
    if settings.http.enabled:
        mailbox = Mailbox()
        app.add_dependency(MailboxFollower(mailbox, app.live))
        app.web.web_app.router.add_routes(http.routes(app.publisher, app.live, clock, mailbox))
        installed.append(http.CONNECTOR)
    if settings.mqtt.enabled:
        # What is wrong must stop the worker now, not in an hour.
        mqtt.patterns_of(settings.mqtt.subscriptions)
        formats_in(settings)

        class MqttService(Service):  # type: ignore[misc]  # mode has no types
            """The MQTT connector for as long as the worker runs."""

            connector: mqtt.MqttConnector | None = None

            @Service.task  # type: ignore[untyped-decorator]
            async def _serve(self) -> None:
                self.connector = mqtt.MqttConnector(app.publisher, app.live, clock)
                await self.connector.run()

            async def on_stop(self) -> None:
                if self.connector is not None:
                    self.connector.stop()

        app.service(MqttService)
        installed.append(mqtt.CONNECTOR)
    return installed
