"""Built-in tools as gpt-oss was trained to call them: `python` and `browser`."""
