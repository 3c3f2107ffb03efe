"""When merged mode is worth a change: dLoRA's adaptive thresholds (OSDI'24 section 5.1, `_adjust_merge_threshold`), on measured times.

A threshold is a ratio: what merged mode achieves a second over what unmerged mode does. dLoRA's are shares of the FCFS batch,
with 15 and 27 ms built in; here the cost model has put the times into the ratio, so 1 is break-even. At the end of each
phase both modes' tallies over it are compared, what was run and what was not, changes of mode included, and the
threshold that led there moves: by a step where it was right, by a factor where it was wrong (AIMD). Both are clamped,
which dLoRA's are not.
"""

from __future__ import annotations

from dataclasses import dataclass

ADD, FACTOR = 0.05, 1.1
LOWEST, HIGHEST = 0.7, 2.0


@dataclass
class Thresholds:
    """`right`: at least so much better to go over to merged mode. `left`: at least so much to stay in it."""

    right: float = 1.05
    left: float = 0.95
    _merged_value: float = 0.0
    _merged_s: float = 0.0
    _unmerged_value: float = 0.0
    _unmerged_s: float = 0.0

    def count(self, *, merged: tuple[float, float], unmerged: tuple[float, float]) -> None:
        """A step's (value, seconds) in each mode, one of which was run."""
        self._merged_value += merged[0]
        self._merged_s += merged[1]
        self._unmerged_value += unmerged[0]
        self._unmerged_s += unmerged[1]

    def end_phase(self, *, was_merged: bool, switch_s: float) -> None:
        """The mode changes. Whichever mode it was paid for one change, there and back counting once."""
        if self._merged_s > 0 and self._unmerged_s > 0:
            merged = self._merged_value / (self._merged_s + switch_s)
            unmerged = self._unmerged_value / (self._unmerged_s + (0.0 if was_merged else switch_s))
            if was_merged:
                self._judge_merging(merged > unmerged)
            else:
                self._judge_leaving(unmerged > merged)
        self._merged_value = self._merged_s = self._unmerged_value = self._unmerged_s = 0.0

    def _judge_merging(self, was_right: bool) -> None:
        self.right = max(1.0, self.left, self.right - ADD) if was_right else min(HIGHEST, self.right * FACTOR)

    def _judge_leaving(self, was_right: bool) -> None:
        self.left = min(1.0, self.right, self.left + ADD) if was_right else max(LOWEST, self.left / FACTOR)
