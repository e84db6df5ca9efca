"""DECLARES. Feast objects only; imports nothing of ours."""
