"""From a request's fields to a harmony conversation and to how it is sampled."""

__all__: list[str] = []  # its modules are imported by name
