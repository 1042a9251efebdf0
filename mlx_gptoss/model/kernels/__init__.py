"""Metal kernels of our own, one file each; `kernel.py` says what one is."""

__all__: list[str] = []  # its modules are imported by name
