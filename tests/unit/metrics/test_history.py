"""History joins attempts, tolerates what a kill leaves behind, and finds what was computed twice."""

import math

import pytest

from megaroute.common.errors import UserError
from megaroute.metrics.history import differences, overlap, read_history
from megaroute.metrics.records import to_json


def write(path, records, tail=""):
    path.write_text("".join(to_json(record) + "\n" for record in records) + tail)
    return path


def test_the_last_attempt_of_a_step_wins(tmp_path, train_record, valid_record):
    records = [train_record(s, 1, loss=1.0) for s in (1, 2, 3)] + [valid_record(2, 1), valid_record(2, 2, loss=9.0)]
    records += [train_record(s, 2, loss=2.0) for s in (3, 4)]
    history = read_history(write(tmp_path / "metrics.jsonl", records))
    assert [(r.step, r.attempt, r.loss) for r in history.train] == [(1, 1, 1.0), (2, 1, 1.0), (3, 2, 2.0), (4, 2, 2.0)]
    assert [r.loss for r in history.valid] == [9.0]
    assert history.attempts == (1, 2)
    assert [r.step for r in history.of_attempt(1)] == [1, 2, 3]


def test_a_torn_last_line_is_left_out_without_a_word(tmp_path, train_record):
    line = to_json(train_record(3))
    for length in range(1, len(line), 13):
        history = read_history(write(tmp_path / "m", [train_record(1), train_record(2)], tail=line[:length]))
        assert [r.step for r in history.train] == [1, 2]
        assert history.damaged == ()


def test_a_last_line_that_lacks_only_its_newline_counts(tmp_path, train_record):
    history = read_history(write(tmp_path / "m", [train_record(1)], tail=to_json(train_record(2))))
    assert [r.step for r in history.train] == [1, 2]


def test_a_damaged_line_inside_is_left_out_and_numbered(tmp_path, train_record):
    path = write(tmp_path / "m", [train_record(1)])
    path.write_bytes(path.read_bytes() + b'{"kind": "tra\n\xff\x00\n' + to_json(train_record(2)).encode() + b"\n")
    history = read_history(path)
    assert [r.step for r in history.train] == [1, 2]
    assert history.damaged == (2, 3)


def test_a_missing_file_is_one_sentence_that_names_it(tmp_path):
    with pytest.raises(UserError) as refused:
        read_history(tmp_path / "metrics.jsonl")
    assert str(tmp_path / "metrics.jsonl") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_overlap_pairs_consecutive_attempts(tmp_path, train_record):
    records = [train_record(s, 1) for s in (1, 2, 3, 4)] + [train_record(s, 2) for s in (3, 4)] + [train_record(4, 3)]
    pairs = overlap(read_history(write(tmp_path / "m", records)))
    assert [(step, a.attempt, b.attempt) for step, a, b in pairs] == [(3, 1, 2), (4, 1, 2), (4, 2, 3)]
    assert all(differences(a, b) == () for _, a, b in pairs)


def test_attempts_that_do_not_meet_have_no_overlap(tmp_path, train_record):
    assert overlap(read_history(write(tmp_path / "m", [train_record(1, 1), train_record(2, 2)]))) == []


@pytest.mark.parametrize("name", ["loss", "budget_loss", "grad_norm"])
def test_one_bit_is_a_difference(train_record, name):
    a = train_record(5, 1)
    b = train_record(5, 2, **{name: math.nextafter(getattr(a, name), math.inf)})
    assert differences(a, b) == (name,)


def test_density_is_compared_layer_by_layer(train_record):
    a = train_record(5, 1, density=(0.5, 0.25))
    assert differences(a, train_record(5, 2, density=(0.5, math.nextafter(0.25, 1)))) == ("density",)
    assert differences(a, train_record(5, 2, density=(0.5,))) == ("density",)


def test_times_are_not_compared_and_nan_equals_nan(train_record):
    a = train_record(5, 1, loss=math.nan, seconds=1.0)
    assert differences(a, train_record(5, 2, loss=math.nan, seconds=2.0)) == ()
    assert differences(a, train_record(5, 2, loss=1.0)) == ("loss",)
