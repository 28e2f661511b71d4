"""What follows from a step besides the next one: things to tell, a way back, or the end of the run."""

from megaroute.training import rollback
from megaroute.training.evaluate import Validation
from megaroute.training.guards import LoadGuard, Notice, check_nonfinite
from megaroute.training.observer import Observer
from megaroute.training.parts import Parts
from megaroute.training.step import StepResult


class Watch:
    """The guards of a run, asked after every step and validation; all ranks decide alike."""

    def __init__(self, parts: Parts, observer: Observer) -> None:
        self._parts, self._observer = parts, observer
        self._load = LoadGuard(parts.config)

    def step(self, result: StepResult) -> None:
        """Tell what a counted step gives to tell, roll back when it is due; raises what ends the run."""
        parts = self._parts
        for spike in result.spikes:
            left_out = "; the update was left out" if result.skipped else ""
            self._observer.event("alarm", spike.text + left_out, {"spike": spike.name, "deviations": spike.deviations})
        if result.skipped and not result.spikes:
            self._observer.event("alarm", "the update was left out: loss or gradient is not finite")
        self._tell(self._load.check(parts.state.step - 1, result.totals.wanted, result.totals.dropped))
        if rollback.due(parts):
            told = rollback.roll_back(parts)
            self._observer.event("alarm", told, {"rollback": parts.state.guards.rollbacks})
        check_nonfinite(parts.state.nonfinite, parts.config.train.max_nonfinite)
        if result.totals.supply.skipped:
            self._observer.event("alarm", self._damage(result))
            parts.ledger.check_budget(parts.config.data.skip_budget)

    def validation(self, validation: Validation) -> None:
        """Tell what a validation gives to tell."""
        self._observer.valid(validation)
        self._tell(self._load.check_validation(self._parts.state.step - 1, validation.density))

    def _damage(self, result: StepResult) -> str:
        parts = self._parts
        return (
            f"{result.totals.supply.skipped} slices of text could not be read and were skipped in step "
            f"{parts.state.step}, {parts.ledger.skipped} so far of data.skip_budget {parts.config.data.skip_budget}; "
            "inspect_checkpoint --data says which"
        )

    def _tell(self, notices: list[Notice]) -> None:
        for notice in notices:
            self._observer.event("recovered" if notice.recovered else "alarm", notice.message, notice.values)
