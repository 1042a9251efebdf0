"""OpenAI's APIs: chat completions, responses, completions and models."""

__all__: list[str] = []  # its modules are imported by name
