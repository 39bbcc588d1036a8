"""What happens to records: one handler a file, named as its agent in `agents/`.

A handler gets a batch and returns effects; it knows no Faust.

May import registry, streaming, stores, sandbox, the domain and the ground.
"""
