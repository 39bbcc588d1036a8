"""What preservarium/connectors/mqtt.py leans on below aiomqtt's public API; a new version must still have it."""

import asyncio
import inspect

import aiomqtt
import paho.mqtt.client as paho


async def test_aiomqtt_keeps_paho_in_client_and_takes_a_queue() -> None:
    queue: asyncio.Queue[aiomqtt.Message] = asyncio.Queue()
    client = aiomqtt.Client("localhost", queue_type=lambda maxsize: queue)  # type: ignore[arg-type]
    assert isinstance(client._client, paho.Client)
    assert len(client.messages) == 0
    queue.put_nowait(aiomqtt.Message("a", b"", 0, False, 1, None))
    assert len(client.messages) == 1


def test_paho_leaves_acknowledgement_to_us() -> None:
    assert list(inspect.signature(paho.Client.manual_ack_set).parameters) == ["self", "on"]
    assert list(inspect.signature(paho.Client.ack).parameters) == ["self", "mid", "qos"]
    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    client.manual_ack_set(True)
    # Without a connection it says so and raises nothing: a late PUBACK after a lost connection is harmless.
    assert client.ack(1, 1) in (paho.MQTT_ERR_SUCCESS, paho.MQTT_ERR_NO_CONN)


def test_paho_calls_back_for_the_socket_and_reads_when_told() -> None:
    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    assert client.socket() is None
    assert "max_packets" in inspect.signature(client.loop_read).parameters
