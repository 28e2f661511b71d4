"""Rows in the process that asks for them, and the recipe from which any process can make them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megaroute.data.lanes import Lane
from megaroute.data.packing import Packing
from megaroute.data.rows import LaneState, Row
from megaroute.data.sources import SourceRecipe
from megaroute.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Recipe:
    """What the rows of a run are a function of; can be sent to another process."""

    sources: tuple[SourceRecipe, ...]
    """Sources in the order of their names."""
    tokenizer: Path
    """Sentencepiece model."""
    lanes: int
    """Lanes of the run, V."""
    length: int
    """Tokens of a row, S + 1."""
    packing: Packing
    """How documents fill them."""
    skip_budget: int | None
    """Slices that may be skipped for damage; None: damage is an error."""
    max_open_files: int
    """Shards that one process keeps open."""


class RowMaker:
    """Makes rows first, first + step, first + 2 * step, .. of the run.

    `states` has the state of each lane that has made rows before.  A lane stays with one maker if `step` divides the
    number of lanes.
    """

    def __init__(self, recipe: Recipe, first: int, step: int, states: Mapping[int, LaneState]) -> None:
        tokenizer = Tokenizer(recipe.tokenizer)
        share = max(1, recipe.max_open_files // len(recipe.sources))
        self._sources = [source.open(tokenizer, share) for source in recipe.sources]
        self._recipe, self._states = recipe, states
        self._next, self._step = first, step
        self._lanes: dict[int, Lane] = {}

    def next_row(self) -> Row:
        """The next row.  Raises DataError when a document cannot be read and may not be skipped."""
        row = self._lane(self._next % self._recipe.lanes).next()
        assert row.sample == self._next, f"lane {row.lane} made row {row.sample}, expected {self._next}"
        self._next += self._step
        return row

    def close(self) -> None:
        """Close the shards; a later row opens them again."""
        for source in self._sources:
            source.close()

    def _lane(self, number: int) -> Lane:
        if number not in self._lanes:
            recipe = self._recipe
            state = self._states.get(number)
            self._lanes[number] = Lane(
                number, recipe.lanes, recipe.length, self._sources, recipe.packing, state, recipe.skip_budget
            )
        return self._lanes[number]
