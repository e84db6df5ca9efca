"""Interactions -> the few items worth ranking for a customer: sources of candidates, one a file, and their union with its features."""
