"""The commands: one file a group, each with a list `commands`. Heavy imports stand inside the functions."""
