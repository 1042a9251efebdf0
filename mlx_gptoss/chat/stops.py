"""Stop texts: output ends before the one that is complete first, wherever token boundaries fall."""

from __future__ import annotations

from collections.abc import Sequence


class UntilStop:
    """Lets text through up to the first stop text, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None  # the stop text that was found

    @property
    def over(self) -> bool:
        """True when a stop text was found."""
        return self.found is not None

    def push(self, text: str) -> str:
        """What of the text so far is safe to show now."""
        if self.over or not text:
            return ""
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, at, self.found = min(found)
            return self._held[:at]
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back and turned out to be ordinary text."""
        return "" if self.over else self._held

    def _overlap(self, stop: str) -> int:
        """The longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
