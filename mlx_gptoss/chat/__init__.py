"""Conversations: the chat format, grammar and tools joined to the engine."""
