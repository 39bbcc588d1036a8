"""Fuzzing: everything that strangers can write, damaged a million times over.

- mutate.py   damages bytes, texts and trees, the same for the same seed
- samples.py  what is damaged: payloads, messages and files as they come
- targets.py  what reads them: decoders, envelopes, lines of topics, files
- doors.py    … and the HTTP ports of a worker
- run.py      runs a target, and what must hold of each input

tests/adversity/test_fuzz.py runs it. `TEST_FUZZ_INPUTS` says how many inputs, `TEST_FUZZ_SEED` which.
"""
