-- Commands that have ended, and their events, are deleted by age.

CREATE INDEX command_events_by_time ON command_events (at);
CREATE INDEX device_commands_by_end ON device_commands (ended_at) WHERE ended_at IS NOT NULL;
