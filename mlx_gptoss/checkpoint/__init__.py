"""Weights on disk: layouts, headers, reading, the memory they will take, and the Hub."""
