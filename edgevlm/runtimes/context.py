"""Where a kv cache ends: the counting that every decoder engine shares."""

from __future__ import annotations

from edgevlm.core.errors import DoesNotFitError, UsageError


class Context:
    """Rows that a kv cache of ``max_context`` rows holds; ``position`` of them now."""

    def __init__(self, max_context: int) -> None:
        self.max_context, self.position = max_context, 0

    def end(self, num_rows: int) -> int:
        """The cache's length after ``num_rows`` more; checked before the engine runs out of buffer.

        Raises UsageError for no rows, DoesNotFitError for too many; ``position`` is the caller's to move.
        """
        end = self.position + num_rows
        if num_rows < 1:
            raise UsageError("a prefill needs at least one row")
        if end > self.max_context:
            raise DoesNotFitError(
                f"{end} rows do not fit into the context of {self.max_context} "
                f"({self.position} are taken): shorten the prompt or rewind"
            )
        return end

    def rewind(self, position: int) -> None:
        """Forget every row after the first ``position``.  Raises UsageError for rows that are not there."""
        if not 0 <= position <= self.position:
            raise UsageError(f"cannot rewind to row {position}: the kv cache holds {self.position}")
        self.position = position
