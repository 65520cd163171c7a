"""Commands to run with `python -m tools.NAME`."""
