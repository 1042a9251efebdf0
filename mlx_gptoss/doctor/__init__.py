"""What `mlx-gptoss doctor` finds out about this machine: each module makes some checks, `examine` all."""

from mlx_gptoss.doctor.examine import examine
from mlx_gptoss.doctor.finding import Finding, Verdict

__all__ = ["Finding", "Verdict", "examine"]
