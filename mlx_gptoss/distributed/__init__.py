"""One model on several machines: rank 0 decides everything, the others do it on their own layers."""

__all__: list[str] = []  # its modules are imported by name
