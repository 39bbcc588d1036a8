"""Ways in: MQTT, HTTP, files, and a simulator. Each writes raw messages to `iot_raw_data`, keyed by device."""

from typing import Any


def install(app: Any) -> list[str]:
    """Run the enabled connectors inside a worker; call once, while agents are being declared.

    Args:
        app: preservarium.engine.app.

    Returns:
        Names of the connectors that will run.

    Raises:
        SettingsError: a subscription of the MQTT connector is no topic pattern.
    """
    from preservarium.connectors import wiring  # a command that needs one connector loads no other

    return wiring.install(app)
