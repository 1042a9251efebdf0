"""Conversion between checkpoint layouts: streaming, verbatim for experts, verified.

Installed as mlx_gptoss.convert.
"""
