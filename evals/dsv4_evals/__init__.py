"""Long-context evaluation: tasks, scoring, runs and reports over any model that speaks the Protocol in model.py.

Imports nothing of the other rooms: whoever runs an evaluation hands it a model.
"""
