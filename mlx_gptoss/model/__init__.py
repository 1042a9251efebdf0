"""The MLX graph of gpt-oss and what it needs: configuration, matrices, caches, the CPU backend."""

__all__: list[str] = []  # its modules are imported by name
