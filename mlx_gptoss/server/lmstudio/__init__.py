"""LM Studio's REST API, as far as its clients need it to find the model."""

__all__: list[str] = []  # its modules are imported by name
