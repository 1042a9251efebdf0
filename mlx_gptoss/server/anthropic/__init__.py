"""Anthropic's Messages API."""

__all__: list[str] = []  # its modules are imported by name
