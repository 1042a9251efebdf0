"""The test suite; tests/checkpoints.py and tests/oracle.py are its tools."""
