"""The kernels of ours that a model's decoded tokens go through: those with a good verdict on this machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from typing import Any

import mlx.core as mx

from mlx_gptoss.device import KernelMode, is_resource_error
from mlx_gptoss.model.cache import KVBits
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.kernels.candidates import Candidate, candidates
from mlx_gptoss.model.kernels.layer import LayerKernels
from mlx_gptoss.model.kernels.record import Record, sizes
from mlx_gptoss.model.kernels.verified import BUDGET, Clock, Verdict, at_risk, examining, keep, known, tried

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
        self._examined: tuple[str, Generator[None, None, Verdict]] | None = None
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
        """A piece of the examination of one that there is no verdict on; False when nothing is left to do.

        A piece takes some milliseconds, or a compilation, and all of a process two seconds.
        """
        if self._examined is None:
            left = [name for name, verdict in self.verdicts.items() if verdict is None]
            if not left or self._mode != "verify" or self._spent >= BUDGET:
                return False
            # One that took too long once must not take the time of the others in each process.
            first = min(left, key=lambda name: tried(self._name(self._candidates[name]), self.record))
            self._examined = first, self._examining(first)
        start = self._clock()
        name, pieces = self._examined
        if self._piece(name, pieces) is not None:
            self._examined = None
        self._spent += self._clock() - start
        return True

    def examine(self, name: str) -> Verdict:
        """Examine a kernel now, whatever is known of it, and use it or not."""
        self._examined, pieces = None, self._examining(name)
        while True:
            verdict = self._piece(name, pieces)
            if verdict is not None:
                return verdict

    def _examining(self, name: str) -> Generator[None, None, Verdict]:
        candidate = self._candidates[name]
        return examining(candidate.examination(self._model, sizes(self._model)), clock=self._clock)

    def _piece(self, name: str, pieces: Generator[None, None, Verdict]) -> Verdict | None:
        """A piece of an examination, and the verdict if it was the last one."""
        kept = self._name(self._candidates[name])
        with at_risk(kept, self.record):
            verdict = _next(pieces)
        if verdict is None:
            return None
        keep(kept, verdict, self.record)
        changes = verdict.on or name in self.used
        self.verdicts[name] = verdict
        logger.info("kernel %s: %s", name, verdict.why)
        mx.clear_cache()
        if changes:  # what layers use anew is traced anew
            self._use()
        return verdict

    def distrust(self, error: Exception) -> bool:
        """Whether an error of a forward may come from a kernel; then that one is off for good.

        Where MLX does not name a kernel, all that are in use are off.
        """
        used = self.used
        if not used or not isinstance(error, RuntimeError | ValueError) or is_resource_error(error):
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


def _next(pieces: Generator[None, None, Verdict]) -> Verdict | None:
    """The verdict if there is no piece any more."""
    try:
        return next(pieces)
    except StopIteration as end:
        verdict: Verdict = end.value
        return verdict
