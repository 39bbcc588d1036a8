"""Connectors inside a worker: they share its publisher, its settings and its web port."""

from typing import Any

from mode import Service

from preservarium.connectors import http, mqtt
from preservarium.connectors.mailbox import Mailbox, MailboxFollower


def install(app: Any) -> list[str]:
    """See `preservarium.connectors.install`."""
    settings = app.live()
    installed: list[str] = []
    if settings.http.enabled:
        mailbox = Mailbox()
        app.add_dependency(MailboxFollower(mailbox, app.live))
        app.web.web_app.router.add_routes(http.routes(app.publisher, app.live, app.clock, mailbox))
        installed.append(http.CONNECTOR)
    if settings.mqtt.enabled:
        mqtt.patterns_of(settings.mqtt.subscriptions)  # a wrong one must stop the worker now, not in an hour

        class MqttService(Service):  # type: ignore[misc]  # mode has no types
            """The MQTT connector for as long as the worker runs."""

            connector: mqtt.MqttConnector | None = None

            @Service.task  # type: ignore[untyped-decorator]
            async def _serve(self) -> None:
                self.connector = mqtt.MqttConnector(app.publisher, app.live, app.clock)
                await self.connector.run()

            async def on_stop(self) -> None:
                if self.connector is not None:
                    self.connector.stop()

        app.service(MqttService)
        installed.append(mqtt.CONNECTOR)
    return installed
