"""Faust's own classes as this app needs them, and its words for the connection to Kafka."""

from collections.abc import Mapping
from typing import Any

import faust
import structlog
from faust.assignor.partition_assignor import PartitionAssignor
from faust.auth import Credentials, SASLCredentials, SSLCredentials

from preservarium import logs
from preservarium.settings import Kafka
from preservarium.streaming import kafka_clients

log = structlog.get_logger(__name__)


class Topic(faust.Topic):
    """Faust's topic, which can also be made where the broker has no CreateTopics (librdkafka's in-memory broker)."""

    async def declare(self) -> None:
        """Create the topic; where that is refused, ask for it."""
        try:
            await super().declare()
        except Exception as e:
            # Faust wraps whatever the broker said; what counts is whether the topic can be had another way.
            log.warning(
                "topic_not_created", topic=self.get_topic_name(), error=repr(e), action="asking for its metadata"
            )
            await self.app.publisher.ensure_topic(self.get_topic_name())


class GroupChannel(faust.Channel):
    """The channel of a group stage's agent: nothing is sent to it, but `faust agents` lists it with its topic."""

    def __init__(self, app: Any, *, topic: str = "", **kwargs: Any) -> None:
        super().__init__(app, **kwargs)
        self.topic = topic

    def get_topic_name(self) -> str:
        """What `faust agents` shows."""
        return self.topic

    def _clone_args(self) -> Mapping[str, Any]:
        return {**super()._clone_args(), "topic": self.topic}


class Worker(faust.Worker):
    """Faust's worker with our logging: no spinner, no banner of levels, standard output left alone."""

    def __init__(self, app: Any, *services: Any, **kwargs: Any) -> None:
        # The command line always asks for redirection, whatever the setting says; it would swallow our own log.
        kwargs["redirect_stdouts"] = False
        super().__init__(app, *services, **kwargs)
        self.spinner = None

    def _setup_logging(self) -> None:
        settings = self.app.live()
        given = str(self.loglevel or "").upper()
        # WARN is the command line's default, so it says nothing about what the operator wants.
        level = given if given in ("DEBUG", "INFO", "ERROR", "CRITICAL") else settings.log_level
        logs.configure(level, settings.log_format)


class _Declared:
    """The cluster as the settings declare it: partitions that somebody has added to a topic are not there."""

    def __init__(self, cluster: Any, partitions: int) -> None:
        self._cluster = cluster
        self._partitions = partitions

    def partitions_for_topic(self, topic: str) -> set[int] | None:
        """Those with a number below what is declared."""
        found = self._cluster.partitions_for_topic(topic)
        return None if found is None else {partition for partition in found if partition < self._partitions}


class Assignor(PartitionAssignor):
    """Faust's assignor, which keeps to the partitions that are declared.

    It would share out a topic with other partitions by itself, so that a worker had raw messages of one partition and
    the tables of another.
    """

    def _perform_assignment(self, cluster: Any, member_metadata: Any) -> Any:
        # Hook: Faust asks a cluster for nothing but the partitions of a topic.
        declared = _Declared(cluster, self.app.live().kafka.partitions)
        return super()._perform_assignment(declared, member_metadata)


def credentials(kafka: Kafka) -> Credentials | None:
    """The connection of our own clients in Faust's words: its consumer and its producer make their arguments of it."""
    arguments = kafka_clients.connection(kafka)
    context = arguments.get("ssl_context")
    if "sasl_mechanism" in arguments:
        return SASLCredentials(
            mechanism=arguments["sasl_mechanism"],
            username=arguments["sasl_plain_username"],
            password=arguments["sasl_plain_password"],
            ssl_context=context,
        )
    return None if context is None else SSLCredentials(context)
