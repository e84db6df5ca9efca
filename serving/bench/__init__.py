"""What an answer costs, and what becomes of it in trouble. Imports nothing, for `sending` is a program: `serve` has the entry point."""
