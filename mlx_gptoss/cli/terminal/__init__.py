"""The terminal chat: prompt, streaming Markdown, commands and transcripts. Imported by commands only."""
