"""Killable processes for parser scripts: JavaScript codecs and restricted Python.

- pool.py     the stream's side: processes, deadlines, the breaker of each script version
- worker.py   the process: runs calls, one after the other, in contexts kept per script version
- javascript.py, python_scripts.py   the two languages; harness.js, node.js, hardening.js   what a codec runs in
- confine.py  what a process gives up before it runs the first script

May import the ground.
"""
