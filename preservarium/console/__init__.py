"""The console: what a worker shows on its web port. `wiring.install(app)` mounts it.

May import everything but agents, tables and cli.
"""
