"""CALCULATES. Arrays and frames in and out; no files, clock, network or environment."""
