"""The terminal chat: prompt, streaming Markdown, commands and transcripts. Imported by commands only."""

__all__: list[str] = []  # its modules are imported by name
