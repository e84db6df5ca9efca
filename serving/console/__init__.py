"""The console at /console: one customer at a time, for the people of the shop. HTML made here, without scripts; admin key required.

`markup` escapes, `sessions` remembers who signed in, `pages` lays out, `desk` answers.
"""
