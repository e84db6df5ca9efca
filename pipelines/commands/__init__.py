"""The verbs that need these pipelines alone. Each parses its words, calls one file of the room and prints what came back.

The front door joins them with those of the other rooms. Heavy libraries are imported by the verb that needs them.
"""
