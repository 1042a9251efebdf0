"""Generations as the event loop sees them: jobs, streams, server-sent events, metrics."""

__all__: list[str] = []  # its modules are imported by name
