"""Routed experts apart from the rest: held packed in a bounded pool of slots, fetched as they are needed.

policy.py decides which expert lies in which slot; layout.py says how one lies there; disk.py reads it from the
checkpoint's files; store.py is the pool in memory.  Nothing here knows attention, sessions or the command line.
"""
