"""How records move: batches from Kafka in, effects out.

| file | what |
|---|---|
| app.py | the one Faust app: stages, tables, watchdog, starting and stopping |
| faust_parts.py, reports.py | Faust's classes as the app needs them; how its stages stand |
| transport.py, lanes.py | the shared feed: a batch transport under Faust, for stages that depend on Kafka alone; where records wait |
| feeds.py, group_lanes.py | group feeds: a consumer group a stage, for stages that write to a database or a mail server |
| runner.py | carries out what a handler decided, retries, bisects |
| stage.py, state.py, publish.py | what a handler is given and returns; state on RocksDB; acknowledged sends |
| records/ | values of records: lines, envelopes, error lines |
| following.py | topics followed without a group |
| kafka_clients.py, topics_admin.py | how every Kafka client is made; topics created and compared |

May import the ground and the domain.
"""
