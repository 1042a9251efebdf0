"""The engine: requests as token ids, batched into forwards, over kept prefixes."""

__all__: list[str] = []  # its modules are imported by name
