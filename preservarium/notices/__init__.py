"""Telling people: who is told of an alarm's transition, in which words, through which channel.

May import registry, streaming, stores, the domain and the ground.
"""
