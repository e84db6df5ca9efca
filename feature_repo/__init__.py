"""DECLARES. Feast objects and plain declarations; imports nothing of ours."""
