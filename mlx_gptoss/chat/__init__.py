"""Conversations: the chat format, grammar and tools joined to the engine."""

__all__: list[str] = []  # its modules are imported by name
