"""How much MLX may put into one Metal command buffer: told before MLX starts, for it reads this once.

MLX ends a command buffer once it holds more operations, or touches larger arrays, than its limits (40 to 50
of each), and counts every array whole, also a stack of experts of which a step reads four
(CommandEncoder::needs_commit, mlx/backend/metal/device.cpp). So every expert product of gpt-oss ends one, and
the GPU idles between two. What the limits keep in bounds otherwise, `model/pace.py` does.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import MutableMapping

# For the generations of Apple's chips on which larger buffers were measured to pay; others keep MLX's own.
# MB are 2**20 elements, not bytes.
LIMITS = {"MLX_MAX_OPS_PER_BUFFER": "1000", "MLX_MAX_MB_PER_BUFFER": "1000"}
GENERATIONS = range(1, 5)


def raise_limits(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set MLX's limits for this Mac's chip; what the user has set stays. Elsewhere nothing."""
    if sys.platform == "darwin" and generation(_chip()) in GENERATIONS:
        for name, value in LIMITS.items():
            environment.setdefault(name, value)


def generation(chip: str) -> int | None:
    """3 of "Apple M3 Max"; None for what is no such chip."""
    found = re.match(r"Apple M(\d+)\b", chip)
    return int(found[1]) if found else None


def _chip() -> str:
    """The processor's name, as macOS knows it; "" when it does not tell."""
    import ctypes

    name = ctypes.create_string_buffer(128)
    size = ctypes.c_size_t(len(name))
    failed = ctypes.CDLL(None).sysctlbyname(b"machdep.cpu.brand_string", name, ctypes.byref(size), None, 0)
    return "" if failed else name.value.decode()
