"""One model over several machines: who has what of it, and how they are found, started and asked."""

__all__: list[str] = []  # its modules are imported by name
