"""Scores of tasks survive their line, and are told wherever a run is told of."""

from pages import only_metrics

from megaroute.metrics import figures
from megaroute.metrics.console import task_text
from megaroute.metrics.history import read_history
from megaroute.metrics.records import TaskScore, TasksRecord, from_json, to_json
from megaroute.metrics.run_view import RunView
from megaroute.metrics.sinks import TensorBoardSink
from megaroute.metrics.summary import results

PIQA = TaskScore(metric="acc_norm", value=0.1 + 0.2, stderr=0.0457, documents=100, layers_executed=3.25)
ONE = TaskScore(metric="acc", value=1.0, stderr=None, documents=1)


def record(step=4, attempt=1, **scores):
    return TasksRecord(step=step, attempt=attempt, scores=scores or {"piqa": PIQA, "copa": ONE}, seconds=0.5)


def test_scores_load_back_equal():
    assert from_json(to_json(record())) == record()


def test_the_last_attempt_counts(tmp_path, train_record):
    again = record(4, 2, piqa=ONE)
    run = only_metrics(tmp_path, [train_record(4), record(2), record(4), again])
    assert read_history(run / "metrics.jsonl").tasks == (record(2), again)


def test_a_score_in_words():
    assert task_text("piqa", PIQA) == "piqa acc_norm 30.0 ± 4.6 % of 100"
    assert task_text("copa", ONE) == "copa acc 100.0 % of 1"


def test_report_shows_them_where_there_are_any(tmp_path, train_record):
    run = RunView.open(only_metrics(tmp_path, [train_record(4), record(2), record(4)]))
    (figure,) = [plot for plot in figures.plots(run) if plot.title == "Tasks"]
    assert ">piqa<" in figure.svg and ">copa<" in figure.svg
    assert ("piqa", "30.0 %") in [(fact.label, fact.value) for fact in results(run)]
    none = RunView.open(only_metrics(tmp_path, [train_record(4)]))
    assert "Tasks" not in [plot.title for plot in figures.plots(none)]


def test_tensorboard_has_a_curve_of_each(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path, attempt=1, units=())
    sink.tasks(record(2))
    sink.tasks(record(4))
    sink.close()
    events = EventAccumulator(str(tmp_path / "attempt-1"))
    events.Reload()
    assert [event.step for event in events.Scalars("tasks/copa")] == [2, 4]
