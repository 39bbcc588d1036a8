"""Ways in: MQTT, HTTP, files, and a simulator. Each writes raw messages to `iot_raw_data`, keyed by device.

`wiring.install(app)` runs the enabled ones inside a worker; a command that needs one connector loads no other.

May import streaming, stores, the domain and the ground.
"""
