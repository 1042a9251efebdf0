"""The kernels of ours that a model's decoded tokens go through: those with a good verdict on this machine."""

from __future__ import annotations

import logging
import time
from typing import Any

import mlx.core as mx

from mlx_gptoss.device import KernelMode
from mlx_gptoss.model.cache import KVBits
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.kernels.candidates import Candidate, candidates
from mlx_gptoss.model.kernels.layer import LayerKernels
from mlx_gptoss.model.kernels.record import Record, sizes
from mlx_gptoss.model.kernels.verified import BUDGET, Clock, Verdict, keep, known, settle

logger = logging.getLogger("mlx_gptoss.model")

TRUSTED = Verdict(True, "asked for by GPTOSS_KERNELS=on, without a proof")


class DecodeKernels:
    """Puts kernels into a model's layers and takes them out. Used by the engine's thread only.

    kv_bits: of the full layers' keys and values in the sequences to come.
    mode: "off" for none, "verify" for those with a good verdict, "on" for all of which no bad one is known.
    """

    def __init__(
        self,
        model: Model,
        mode: KernelMode,
        record: Record,
        *,
        kv_bits: KVBits = (None, None),
        clock: Clock = time.perf_counter,
    ) -> None:
        self.record = record
        self._model, self._mode, self._clock = model, mode, clock
        self._spent = 0.0
        some = list(candidates(model, kv_bits)) if mode != "off" else []
        self._candidates: dict[str, Candidate] = {}
        self.verdicts: dict[str, Verdict | None] = {}  # by the candidate's name; None: not examined yet
        for candidate in some:
            self._candidates[candidate.name] = candidate
            self.verdicts[candidate.name] = known(self._name(candidate), record)
        self._use()

    @property
    def used(self) -> dict[str, Verdict]:
        """The verdicts on those that are in use, by name."""
        on = {}
        for name, verdict in self.verdicts.items():
            if verdict is None and self._mode == "on":
                verdict = TRUSTED
            if verdict is not None and verdict.on:
                on[name] = verdict
        return on

    def examine_next(self) -> bool:
        """Examine one kernel that there is no verdict on; False when there is none, or no time left for it.

        Takes BUDGET seconds at most, and all calls of a process together not much more.
        """
        left = [name for name, verdict in self.verdicts.items() if verdict is None]
        if not left or self._mode != "verify" or self._spent >= BUDGET:
            return False
        start = self._clock()
        self.examine(left[0])
        self._spent += self._clock() - start
        return True

    def examine(self, name: str) -> Verdict:
        """Examine a kernel now, whatever is known of it, and use it or not."""
        candidate = self._candidates[name]
        verdict = settle(
            candidate.examination(self._model, sizes(self._model)), self.record, clock=self._clock
        )
        self.verdicts[name] = verdict
        logger.info("kernel %s: %s", name, verdict.why)
        mx.clear_cache()
        self._use()
        return verdict

    def distrust(self, error: Exception) -> bool:
        """Whether an error of a forward may come from a kernel; then that one is off for good.

        Where MLX does not name a kernel, all that are in use are off.
        """
        used = self.used
        if not used or not isinstance(error, RuntimeError | ValueError) or "allocat" in str(error).lower():
            return False
        named = [name for name in used if self._is_named(self._candidates[name], str(error))]
        for name in named or used:
            verdict = Verdict(False, f"failed while it ran: {str(error).splitlines()[0][:200]}")
            keep(self._name(self._candidates[name]), verdict, self.record)
            self.verdicts[name] = verdict
        logger.warning("without %s from now on: %s", ", ".join(named or used), error)
        self._use()
        return True

    def _use(self) -> None:
        used = self.used
        for layer in self._model.layers if self._candidates else ():
            own: dict[str, Any] = {}
            for name, verdict in used.items():
                own |= self._candidates[name].bound(layer, verdict.since)
            layer.use(LayerKernels(**own))

    def _name(self, candidate: Candidate) -> str:
        """As its verdict is kept."""
        return candidate.kept_as(sizes(self._model))

    @staticmethod
    def _is_named(candidate: Candidate, text: str) -> bool:
        return any(program.text_hash[:12] in text for program in candidate.kernel.programs)
