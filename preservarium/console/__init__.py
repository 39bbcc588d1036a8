"""The console: what a worker shows on its web port. `wiring.install(app)` mounts it.

`page/` has templates, scripts and styles as they are served; uPlot (MIT) is there as it was published, and a test holds its checksum.

May import everything but agents, tables and cli.
"""
