"""The test suite; checkpoints.py, random_weights.py and oracle.py are its tools.

What a process must be told before numpy and the Hub's library load is set here.
"""

import os

# No test may reach the network or a person's own cache by accident.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
# The tests' matrices are small: threads would cost more than they bring.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
