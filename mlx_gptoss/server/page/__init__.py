"""The chat page: its files, and the rendering of Markdown that it asks for."""

__all__: list[str] = []
