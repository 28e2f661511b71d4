"""How far the making of shards is."""

from megaroute.common.progress import Progress


class PartsProgress(Progress):
    """Counts bytes of text and finished parts; `shown` is False on all ranks but the first."""

    def __init__(self, parts: int, done: int = 0, shown: bool = True) -> None:
        self._parts, self._finished = parts, done
        super().__init__(f"{done}/{parts} parts", "B", shown=shown)

    def part_done(self) -> None:
        """One more part is finished."""
        self._finished += 1
        self.describe(f"{self._finished}/{self._parts} parts")
