"""What every HTTP request meets: errors, checks, the protocol's limits, the page."""

__all__: list[str] = []  # its modules are imported by name
