-- Lists of commands of all devices, newest first: of any state, and of one.
CREATE INDEX device_commands_by_time ON device_commands (requested_at DESC, command_id DESC);
CREATE INDEX device_commands_by_state ON device_commands (state, requested_at DESC, command_id DESC);
