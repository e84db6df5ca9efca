"""MOVES DATA. One file per arrow of the path."""
