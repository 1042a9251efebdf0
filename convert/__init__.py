"""Conversion between checkpoint layouts: streaming, verbatim for experts, verified.

Installed as mlx_gptoss.convert.
"""

__all__: list[str] = []  # its modules are imported by name
