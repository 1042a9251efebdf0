"""What a server remembers: sampled turns and stored responses."""

__all__: list[str] = []  # its modules are imported by name
