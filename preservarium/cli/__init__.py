"""The commands: one file a group, each with a list `commands`. Heavy imports stand inside the functions.

May import everything but the console; agents and tables only where `reference` describes them.
"""
