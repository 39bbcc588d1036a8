"""What people and timers do with the system, whichever face they use: alarms, commands, refused records, checks.

`alarm_board` and `command_desk` are what operators see and do, over Kafka alone; `dlq` lists and redrives what was refused, `refusals` shows the newest of it;
`accounting`, `accounting_facts` and `accounting_decode` say whether a run adds up; `verification` (of the `compared_tables`),
`topic_comparison`, `derived` and `sync_status` compare and mend ClickHouse; `backup` copies and restores everything; `backtest`, `backtest_notices` and `suggesting` try alarm rules on stored readings.

May import everything but agents, tables, cli and console.
"""
