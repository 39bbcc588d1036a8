"""The private parts of Faust, mode and aiokafka that we lean on: an upgrade that moves one fails here, by name.

Each test says what preservarium/streaming/transport.py, state.py, publish.py or app.py needs to be true.
"""

import asyncio
import importlib.metadata
import inspect
import re
from types import SimpleNamespace
from typing import Any

import aiokafka
import faust
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import AIOKafkaConnection
from aiokafka.consumer.consumer import AIOKafkaConsumer
from aiokafka.consumer.fetcher import Fetcher, FetchResult, PartitionRecords
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.consumer.subscription_state import Assignment, SubscriptionState, TopicPartitionState
from aiokafka.errors import for_code
from aiokafka.producer.message_accumulator import BatchBuilder, MessageAccumulator
from aiokafka.producer.sender import Sender
from aiokafka.protocol.commit import OffsetFetchRequest, OffsetFetchResponse_v3
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from faust.app.base import App
from faust.assignor.partition_assignor import PartitionAssignor
from faust.stores import memory, rocksdb
from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery
from faust.tables.table import Table
from faust.topics import Topic
from faust.transport.consumer import Consumer, ThreadDelegateConsumer
from faust.transport.consumer import Fetcher as FaustFetcher
from faust.transport.drivers import TRANSPORTS
from faust.transport.drivers import aiokafka as driver
from mode.services import Service
from mode.threads import QueueServiceThread

from preservarium.streaming import kafka_clients


def source(thing: Any) -> str:
    thing = getattr(thing, "fun", thing)  # mode's ServiceTask holds the function
    return " ".join(inspect.getsource(thing).split())


def test_versions_are_the_pinned_ones() -> None:
    assert importlib.metadata.version("faust-streaming") == "0.15.3"
    assert aiokafka.__version__.startswith("0.14.")


@pytest.mark.parametrize(
    ("thing", "parameters"),
    [
        (Consumer._drain_messages, ["self", "fetcher"]),
        (Consumer._wait_next_records, ["self", "timeout"]),
        (Consumer._new_offset, ["self", "tp"]),
        (Consumer._filter_tps_with_pending_acks, ["self", "topics"]),
        (Consumer._add_gap, ["self", "tp", "offset_from", "offset_to"]),
        (Consumer._should_commit, ["self", "tp", "offset"]),
        (Consumer._to_message, ["self", "tp", "record"]),
        (Consumer.wait_empty, ["self"]),
        (Consumer.perform_seek, ["self"]),
        (Consumer.verify_all_partitions_active, ["self"]),
        (Consumer.maybe_wait_for_commit_to_finish, ["self"]),
        (Consumer._get_active_partitions, ["self"]),
        (ThreadDelegateConsumer._commit, ["self", "offsets"]),
        (ThreadDelegateConsumer._getmany, ["self", "active_partitions", "timeout"]),
        (driver.Consumer._new_consumer_thread, ["self"]),
        (driver.AIOKafkaConsumerThread._create_worker_consumer, ["self", "transport"]),
        (driver.AIOKafkaConsumerThread._ensure_consumer, ["self"]),
        (QueueServiceThread.call_thread, ["self", "fun", "args", "kwargs"]),
        (Topic.declare, ["self"]),
        (rocksdb.Store._db_for_partition, ["self", "partition"]),
        (rocksdb.Store.set_persisted_offset, ["self", "tp", "offset"]),
        (Recovery.flush_buffers, ["self"]),
        (GroupCoordinator.check_errors, ["self"]),
        (Fetcher._proc_fetch_request, ["self", "assignment", "node_id", "request"]),
        (
            driver.AIOKafkaConsumerThread._fetch_records,
            ["self", "consumer", "active_partitions", "timeout", "max_records"],
        ),
        (driver.AIOKafkaConsumerThread.highwater, ["self", "tp"]),
        (SubscriptionState.seek, ["self", "tp", "offset"]),
        (BatchBuilder.append, ["self", "timestamp", "key", "value", "headers"]),
    ],
)
def test_signatures(thing: Any, parameters: list[str]) -> None:
    assert list(inspect.signature(thing).parameters) == parameters


def test_the_fetch_loop_is_our_hook() -> None:
    assert "consumer._drain_messages(self)" in source(FaustFetcher._fetcher)


def test_commit_asks_our_hooks_for_what_to_commit() -> None:
    assert "self._filter_tps_with_pending_acks(topics)" in source(Consumer.force_commit)
    committable = source(Consumer._filter_committable_offsets)
    assert "self._new_offset(tp)" in committable
    assert "self._should_commit(tp, offset)" in committable
    assert "await self._commit(committable_offsets)" in source(Consumer._commit_offsets)


def test_a_revoke_stops_the_flow_and_then_waits_for_the_batches_under_way() -> None:
    revoke = source(App._on_partitions_revoked)
    assert revoke.index("consumer.stop_flow") < revoke.index("self._consumer_wait_empty")
    assert "await consumer.wait_empty()" in source(App._consumer_wait_empty)
    assert "self._on_partitions_revoked" in source(Consumer.on_partitions_revoked)
    # What was committed is forgotten before, so the commit in wait_empty is not held back by _should_commit.
    forgets = source(Consumer.on_partitions_revoked)
    assert forgets.index("self._committed_offset.pop") < forgets.index("self._on_partitions_revoked")


def test_a_stop_stops_the_flow_and_the_fetcher_and_then_waits() -> None:
    stop = source(App._stop_consumer)
    assert stop.index("consumer.stop_flow()") < stop.index("self._stop_fetcher()")
    assert stop.index("self._stop_fetcher()") < stop.index("self._consumer_wait_empty")
    assert stop.index("self._consumer_wait_empty") < stop.index("self.tables.stop()")


def test_recovery_seeks_to_the_commits_before_it_resumes_the_flow() -> None:
    for method in (Recovery.on_recovery_completed, Recovery._resume_streams):
        text = source(method)
        assert text.index("consumer.perform_seek()") < text.index("consumer.resume_flow()")


def test_a_fetch_in_the_thread_looks_at_the_flow_only_when_it_begins() -> None:
    # If Faust looked again at its end, records could not slip through a rebalance and give_back were needless.
    text = source(driver.AIOKafkaConsumerThread._fetch_records)
    assert text.count("flow_active") == 1
    assert "await fetcher.fetched_records(" in text


def test_the_generation_is_set_before_the_new_assignment_is_handled() -> None:
    text = source(driver.ConsumerRebalanceListener.on_partitions_assigned)
    assert text.index("app.consumer_generation_id = generation") < text.index("_thread.on_partitions_assigned")


def test_consumer_attributes() -> None:
    text = source(Consumer.__init__) + source(Consumer._reset_state) + source(ThreadDelegateConsumer.__init__)
    for name in ("_read_offset", "_committed_offset", "_acked", "can_resume_flow", "suspend_flow", "scheduler"):
        assert f"self.{name}" in text
    assert "self._thread = self._new_consumer_thread()" in text
    assert "flow_active" in Consumer.__annotations__


def test_faust_gives_no_setting_for_the_fetch_wait() -> None:
    assert "await self._consumer.stop()" in source(driver.AIOKafkaConsumerThread.on_thread_stop)
    assert "fetch_max_wait_ms=1500" in source(driver.AIOKafkaConsumerThread._create_worker_consumer)


async def test_aiokafka_reads_the_fetch_wait_when_it_starts() -> None:
    assert "fetch_max_wait_ms=self._fetch_max_wait_ms" in source(AIOKafkaConsumer.start)
    consumer = AIOKafkaConsumer()
    assert consumer._fetch_max_wait_ms == 500
    assert hasattr(consumer, "_subscription")
    await consumer.stop()


async def test_aiokafka_reads_the_fetch_wait_for_every_request() -> None:
    assert "self._fetch_max_wait_ms," in inspect.getsource(Fetcher._get_actions_per_node)
    assert "self._fetcher_timeout" in inspect.getsource(Fetcher._get_actions_per_node)
    assert "self._fetcher = Fetcher(" in inspect.getsource(AIOKafkaConsumer.start)


async def test_aiokafka_reads_the_age_of_metadata_for_every_turn() -> None:
    assert "timeout=self._metadata_max_age_ms / 1000" in inspect.getsource(AIOKafkaClient._md_synchronizer)


def test_aiokafka_connects_anew_where_a_connection_was_closed() -> None:
    text = inspect.getsource(AIOKafkaClient._get_conn)
    assert "conn_id = (node_id, group)" in text
    assert "if not conn.connected():\n                del self._conns[conn_id]" in text
    assert "group=ConnectionGroup.DEFAULT" in inspect.getsource(AIOKafkaClient.send)
    assert "CloseReason.IDLE_DROP" in inspect.getsource(AIOKafkaConnection._idle_check)
    # What is asked for the group goes over a connection of its own.
    assert "group=ConnectionGroup.COORDINATION" in inspect.getsource(GroupCoordinator._send_req)


def test_aiokafka_closes_its_connections_last() -> None:
    assert "self._conns.values()" in inspect.getsource(AIOKafkaClient.close)
    assert "self._writer, self._protocol = reader, writer, protocol" in inspect.getsource(AIOKafkaConnection.connect)
    text = inspect.getsource(AIOKafkaConsumer.stop)
    assert (
        text.index("self._coordinator.close()")
        < text.index("self._fetcher.close()")
        < text.index("self._client.close()")
    )


def test_aiokafka_asks_for_no_part_of_a_node_while_another_waits_to_be_taken() -> None:
    """So that a long fetch of an idle feed covers every partition that is not paused."""
    source = inspect.getsource(Fetcher._get_actions_per_node)
    assert source.index("if node_id in backoff_by_nodes:") < source.index("# Create fetch request")


def test_aiokafka_positions() -> None:
    assert isinstance(TopicPartitionState.has_valid_position, property)
    assert isinstance(TopicPartitionState.position, property)
    # Written together, in this order, by the answer to a fetch.
    assert "tp_state.highwater = highwater tp_state.lso = lso tp_state.timestamp = now_ms" in source(
        Fetcher._proc_fetch_request
    )
    assert "tps" in dir(Assignment)
    assert list(inspect.signature(Assignment.state_value).parameters) == ["self", "tp"]


def test_aiokafka_takes_the_isolation_level_when_it_starts() -> None:
    assert "isolation_level=self._isolation_level" in source(AIOKafkaConsumer.start)
    assert "self._isolation_level = isolation_level" in source(AIOKafkaConsumer.__init__)
    assert "isolation_level=isolation_level" in source(driver.AIOKafkaConsumerThread._create_worker_consumer)
    # And asks with it where a partition ends.
    assert "OffsetRequest(-1, self._isolation_level" in source(Fetcher._proc_offset_request)


def test_aiokafka_moves_a_position_over_what_holds_no_record() -> None:
    parse = source(PartitionRecords._unpack_records)
    assert parse.count("self.next_fetch_offset = next_batch.next_offset") == 3  # aborted, marker, end of a batch
    assert "state.consumed_to(self._partition_records.next_fetch_offset)" in source(FetchResult._update_position)
    # No wait between a position's change and the records that it belongs to.
    taken = source(Fetcher.fetched_records)
    assert "await" not in taken[taken.index("drained = {}") : taken.index("waiter = self._create_fetch_waiter()")]
    assert source(AIOKafkaConsumer.getmany).endswith("return records")


async def test_aiokafka_sends_every_fetch_and_every_heartbeat_through_what_we_wrap() -> None:
    assert "self._proc_fetch_request(assignment, node_id, request)" in source(Fetcher._fetch_requests_routine)
    assert "now_ms = int(1000 * time.time())" in source(Fetcher._proc_fetch_request)
    assert "success = await self._do_heartbeat()" in source(GroupCoordinator._heartbeat_routine)
    assert "return True" in source(GroupCoordinator._do_heartbeat)
    consumer = AIOKafkaConsumer()
    assert consumer._coordinator is None, "made by start()"
    await consumer.stop()


def test_aiokafka_gives_what_is_noted_beside_a_commit() -> None:
    assert list(inspect.signature(GroupCoordinator.fetch_committed_offsets).parameters) == ["self", "partitions"]
    text = source(GroupCoordinator._do_fetch_commit_offsets)
    assert "for partition, offset, metadata, error_code in topic_partitions" in text
    assert "OffsetAndMetadata(offset, metadata)" in text
    # And Faust notes nothing of its own, and commits by the method that we wrap.
    text = source(driver.AIOKafkaConsumerThread._commit)
    assert 'OffsetAndMetadata(offset, "")' in text
    assert "await consumer.commit(aiokafka_offsets)" in text


def test_aiokafka_has_these_tasks_and_connections() -> None:
    """kafka_clients.stop cuts off what does not end."""
    text = source(GroupCoordinator.__init__)
    for name in ("_coordination_task", "_heartbeat_task", "_commit_refresh_task"):
        assert f"self.{name} = " in text
    assert "self._fetch_task = create_task(" in source(Fetcher.__init__)
    assert "self._sync_task = create_task(" in source(AIOKafkaClient.bootstrap)
    # A half-closed group member sends heartbeats for ever.
    close = source(GroupCoordinator.close)
    assert close.index("await self._coordination_task") < close.index("await self._stop_heartbeat_task()")


def test_aiokafka_writes_to_a_connection_in_two_places() -> None:
    """kafka_clients has both of them take a closed one for a broken one."""
    writes = re.findall(r"def (\w+)|_writer\.(?:write|writelines)\(", source(AIOKafkaConnection))
    assert writes.count("") == 2
    for one in (AIOKafkaConnection.send, AIOKafkaConnection._send_sasl_token):
        assert "self._writer.write(size + " in source(one)
        assert "except OSError as err:" in source(one)


def test_faust_asks_the_cluster_for_nothing_but_partitions_when_it_assigns() -> None:
    text = source(PartitionAssignor._perform_assignment) + source(PartitionAssignor._get_copartitioned_groups)
    assert set(re.findall(r"cluster\.(\w+)", text)) == {"partitions_for_topic"}
    assert "self._perform_assignment(cluster, member_metadata)" in source(PartitionAssignor._assign)


def test_metadata_can_be_asked_for_without_making_a_topic() -> None:
    assert list(inspect.signature(MetadataRequest.__init__).parameters)[1:] == ["topics", "allow_auto_topic_creation"]
    assert "self._topics = set(topics)" in source(AIOKafkaClient.set_topics)


def test_aiokafka_drops_what_was_fetched_before_a_seek() -> None:
    text = source(Fetcher.seek_to)
    assert "self._records" in text
    assert "seek(tp, offset)" in text.replace("self._subscriptions.", "")


def test_aiokafka_waits_for_the_assignment_within_a_fetch() -> None:
    assert "await self._subscriptions.wait_for_assignment()" in source(Fetcher.fetched_records)


async def test_aiokafka_parks_group_errors_until_someone_asks() -> None:
    coordinator = GroupCoordinator.__new__(GroupCoordinator)
    coordinator._coordination_task = asyncio.get_running_loop().create_future()
    coordinator._error_consumed_fut = consumed = asyncio.get_running_loop().create_future()
    coordinator._pending_exception = RuntimeError("parked")
    with pytest.raises(RuntimeError, match="parked"):
        coordinator.check_errors()
    assert consumed.done()
    assert coordinator._pending_exception is None


def test_faust_never_asks_for_group_errors() -> None:
    # The reason for the watchdog. If Faust begins to ask, the watchdog can go.
    assert "check_errors" not in source(driver)


async def test_producer_internals_for_closing_without_a_flush() -> None:
    producer = aiokafka.AIOKafkaProducer()
    assert isinstance(producer._sender, Sender)
    assert producer._sender.sender_task is None
    assert producer._closed is False
    assert "await self.flush()" in source(MessageAccumulator.close)  # what stop() would do
    producer._sender = None
    await producer.stop()


def test_an_idempotent_producer_never_gives_a_batch_up() -> None:
    # Therefore the publisher sets a time limit of its own.
    from aiokafka.producer.sender import SendProduceReqHandler

    assert "self._sender._txn_manager is None and batch.expired()" in source(SendProduceReqHandler._can_retry)


async def test_a_closed_batch_does_not_linger() -> None:
    from aiokafka.producer.message_accumulator import MessageBatch

    builder = BatchBuilder(1_000, 0)
    assert builder.append(timestamp=None, key=b"k", value=b"v", headers=[]) is not None
    builder.close()
    batch = MessageBatch(aiokafka.TopicPartition("t", 0), builder, 60, 30)
    assert batch.remaining_linger() is None
    batch.future.cancel()


def test_stores() -> None:
    assert rocksdb.USE_ROCKSDICT
    assert "self.rocksdb_options.open(" in source(rocksdb.Store._open_for_partition)
    assert "options=self.as_options()" in source(rocksdb.RocksDBOptions.open)
    assert rocksdb.Store.offset_key == b"__faust\0offset__"
    assert not hasattr(memory.Store, "_db_for_partition")
    assert "int(offset)" in source(rocksdb.Store.persisted_offset)


def test_a_tables_changelog_belongs_to_the_app_id() -> None:
    app = faust.App("an-id", broker="kafka://", store="memory://")
    table: Table[Any, Any] = app.Table("t", key_type=bytes, value_type=bytes)
    assert table.changelog_topic_name == "an-id-t-changelog"
    assert table.changelog_topic.internal
    assert isinstance(app.tables, TableManager)


def test_recovery_attributes_for_applying_changelogs_in_batches() -> None:
    text = source(Recovery.__init__)
    for name in ("tp_to_table", "active_tps", "standby_tps", "active_offsets", "standby_offsets", "buffers"):
        assert f"self.{name}" in text
    slurp = source(Recovery._slurp_changelogs)
    # The last record of a batch goes Faust's way, and that is what makes it look whether recovery is over.
    assert "if seen_offset is None or offset > seen_offset: offsets[tp] = offset" in slurp
    assert slurp.index("offsets[tp] = offset") < slurp.index("await _maybe_signal_recovery_end()")
    # flush_buffers and the loop write a table's buffer and empty it in one go, so we may do the same in between.
    assert "table.apply_changelog_batch(buf) buf.clear()" in slurp
    assert "table.apply_changelog_batch(buffer) buffer.clear()" in source(Recovery.flush_buffers)


def test_recovery_can_be_fenced() -> None:
    """restoring.py: fences before the ends are asked for; tables open before streams resume."""
    text = source(Recovery._restart_recovery)
    order = [
        text.index(step)
        for step in (
            '_build_highwaters)( consumer, assigned_active_tps, active_highwaters, "active"',
            '_build_offsets)( consumer, assigned_active_tps, active_offsets, "active"',
            "if self.need_recovery():",
            "T(self.on_recovery_completed)(generation_id)",
        )
    ]
    assert order == sorted(order)
    assert "consumer.highwaters(*tps)" in source(Recovery._build_highwaters)
    completed = source(Recovery.on_recovery_completed)
    assert completed.index("call") < completed.index("consumer.resume_partitions(")
    assert "self._recovery is None" in source(TableManager.recovery.fget)
    assert "self.tables.recovery" not in source(Recovery.__init__)


def test_recovery_gives_up_for_good_where_a_step_takes_too_long() -> None:
    """Why restoring.py has its own wait: Faust's takes a time-out for a stop, and each step of recovery goes through it."""
    wait, loop, first = source(Recovery._wait), source(Recovery._restart_recovery), source(Service.wait_first)
    assert "if wait_result.stopped: # service was stopped. raise ServiceStopped()" in wait
    assert "except ServiceStopped as exc:" in loop
    assert "break # service was stopped" in loop
    assert "return WaitResults([], [], True)" in first
    steps = ("_build_highwaters", "_build_offsets", "_seek_offsets", "on_recovery_completed")
    assert all(
        f"await self._wait( T(self.{step})" in loop or f"await self._wait(T(self.{step})" in loop for step in steps
    )
    assert "if await self.wait_for_stopped( self.signal_recovery_start" in loop


async def test_a_consumer_that_nobody_asks_joins_no_group() -> None:
    """Why the fetch loop says that it is at work while it waits for its partitions."""
    join = source(GroupCoordinator.ensure_active_group)
    assert "idle_time >= self._max_poll_interval: await asyncio.sleep" in join
    idle = source(SubscriptionState.fetcher_idle_time.fget)
    assert "time.monotonic() - self._last_fetch_ended" in idle
    subscriptions = SubscriptionState()
    subscriptions._last_fetch_ended -= 1_000
    assert subscriptions.fetcher_idle_time > 999
    kafka_clients.stay_active(SimpleNamespace(_subscription=subscriptions))
    assert subscriptions.fetcher_idle_time < 100


@pytest.mark.parametrize("code", [14, 15, 16, 30])
async def test_a_broker_that_has_not_read_its_groups_is_asked_again(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets that a broker cannot say are not taken for offsets that there are none of."""
    assert "group_id, partitions" in source(AIOKafkaAdminClient.list_consumer_group_offsets)
    for asked in (AIOKafkaAdminClient._send_request, GroupCoordinator._send_req):
        assert "await self._client.send(" in source(asked)
    request = OffsetFetchRequest("g", [("t", [0])])
    answer = OffsetFetchResponse_v3(throttle_time_ms=0, topics=[], error_code=code)

    async def send(client: Any, node_id: Any, request: Any, **kwargs: Any) -> Any:
        return answer

    heeding = kafka_clients._offsets_or_error(send)
    with pytest.raises(for_code(code)):
        await heeding(None, 1, request)
    answer = OffsetFetchResponse_v3(throttle_time_ms=0, topics=[("t", [(0, 7, "", 0)])], error_code=0)
    assert await heeding(None, 1, request) is answer
    assert AIOKafkaClient.send.__wrapped__, "every client's"  # type: ignore[attr-defined]


def test_our_store_is_the_one_that_tables_get() -> None:
    from faust.stores import STORES

    from preservarium.streaming.local_store import Store

    assert STORES.by_name("state") is Store
    # It is keyed by partition, is told of revoked ones, and opens a database in one place.
    assert "self._open_for_partition(partition)" in source(rocksdb.Store._db_for_partition)
    assert "self.revoke_partitions(self.table, revoked)" in source(rocksdb.Store.on_rebalance)


def test_our_scheme_is_registered() -> None:
    import preservarium.streaming.transport

    assert TRANSPORTS.by_url("batch://localhost") is preservarium.streaming.transport.Transport
    assert preservarium.streaming.transport.Transport.Consumer is preservarium.streaming.transport.BatchConsumer


def test_records_are_parsed_when_they_are_taken_and_may_stay_so() -> None:
    # kafka_clients.keep_as_parsed puts an instance's _consumer_record in the way.
    assert "self._records = collections.OrderedDict()" in source(Fetcher.__init__)
    assert "self._records[tp] = FetchResult(" in source(Fetcher._proc_fetch_request)
    assert "consumer_record = self._consumer_record(tp, record)" in source(PartitionRecords._unpack_records)
    builder = DefaultRecordBatchBuilder(2, 0, False, -1, -1, -1, 10_000)
    builder.append(0, 1_700_000_000_123, b"key", b"value", [("name", b"text")])
    builder.append(1, 1_700_000_000_124, None, None, [])
    data = bytes(builder.build())

    def fetched(topic: str) -> list[Any]:
        results = kafka_clients._Fetched(lambda name: name == "ours")
        tp = aiokafka.TopicPartition(topic, 3)
        records = PartitionRecords(tp, MemoryRecords(data), [], 0, None, None, True, 0)
        results[tp] = FetchResult(tp, assignment=None, partition_records=records, backoff=0)
        return list(results[tp]._partition_records)

    ours, theirs = fetched("ours"), fetched("theirs")
    assert [type(r) for r in theirs] == [aiokafka.ConsumerRecord] * 2
    assert all(type(r) is not aiokafka.ConsumerRecord for r in ours)
    for names in ("offset", "timestamp", "key", "value"):
        assert [getattr(r, names) for r in ours] == [getattr(r, names) for r in theirs]
    assert [tuple(r.headers) for r in ours] == [r.headers for r in theirs] == [(("name", b"text"),), ()]
