"""Ollama's API: chat, generate, and what its clients ask about the model."""

__all__: list[str] = []  # its modules are imported by name
