"""The process that holds librdkafka's in-memory broker: `python -m preservarium.embedded.mock_kafka ADDRESS_FILE`."""

import signal
import sys
from pathlib import Path

from confluent_kafka import Producer


def main() -> None:
    """Start the broker, write host:port to the file, wait for SIGTERM."""
    signals = {signal.SIGTERM, signal.SIGINT}
    # Blocked before librdkafka starts its threads, which inherit the mask: the signal then waits for sigwait.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    owner = Producer({"test.mock.num.brokers": 1})
    brokers = owner.list_topics(timeout=10).brokers.values()
    address = ",".join(f"{b.host}:{b.port}" for b in brokers)
    file = Path(sys.argv[1])
    new = file.with_suffix(".new")
    new.write_text(address + "\n", encoding="utf-8")
    new.rename(file)
    signal.sigwait(signals)
    file.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
