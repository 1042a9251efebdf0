"""Weights on disk: layouts, headers, reading, the memory they will take, and the Hub."""

__all__: list[str] = []  # its modules are imported by name
