"""The services that `preservarium up` and the tests start on one machine: Kafka, PostgreSQL, ClickHouse.

Each is a real engine in processes of its own under a data directory, on loopback ports that were free. A service
object is synchronous and knows nothing of Faust or asyncio; call `start` and `stop` in a thread from async code.
A production worker imports nothing from here.

May import nothing but itself.
"""
