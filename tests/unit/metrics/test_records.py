"""Records survive their JSON line, bit for bit."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaroute.metrics.records import EVENT_KINDS, EventRecord, TrainRecord, ValidRecord, from_json, to_json


def bits(value: float) -> str:
    return "nan" if math.isnan(value) else value.hex()


# Without a deadline: a busy machine is no failure.
@settings(deadline=None)
@given(loss=st.floats(), density=st.lists(st.floats(0, 1)))
def test_a_validation_loads_back_bit_equal(loss, density):
    record = ValidRecord(step=3, attempt=1, loss=loss, bits_per_byte=1.0, density=tuple(density), rows=2)
    back = from_json(to_json(record))
    assert isinstance(back, ValidRecord)
    assert bits(back.loss) == bits(loss)
    assert back.density == tuple(density)


def test_a_step_loads_back_equal(train_record):
    record = train_record(7, 2, loss=0.1 + 0.2, density=(1 / 3, 2 / 3), skipped_update=True, nonfinite=1)
    assert from_json(to_json(record)) == record


@pytest.mark.parametrize("kind", EVENT_KINDS)
def test_an_event_loads_back_equal(kind):
    record = EventRecord(kind=kind, step=3, attempt=1, message="NaN", values={"loss": math.inf, "layers": (1, 2)})
    assert from_json(to_json(record)) == record


def test_the_kind_names_the_line(train_record, valid_record):
    lines = [train_record(), valid_record(), EventRecord(kind="stop", step=1, attempt=1, message="")]
    assert [json.loads(to_json(line))["kind"] for line in lines] == ["train", "valid", "stop"]


@pytest.mark.parametrize("value, text", [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_what_is_not_finite_is_strict_json(train_record, value, text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    raw = json.loads(to_json(train_record(loss=value)), parse_constant=refuse)
    assert raw["loss"] == text
    assert bits(from_json(json.dumps(raw)).loss) == bits(value)


def test_keys_and_kinds_of_a_later_version_are_passed_over(train_record):
    raw = json.loads(to_json(train_record()))
    assert from_json(json.dumps({**raw, "temperature": 3})) == train_record()
    assert from_json('{"kind": "profile", "step": 1}') is None


@pytest.mark.parametrize("line", ["", "{", "[1]", '{"kind": "train", "step": 1}'])
def test_what_is_not_a_record_is_refused(line):
    with pytest.raises(ValueError, match="Expecting|JSON object|lacks attempt"):
        from_json(line)


def test_what_an_earlier_version_did_not_write_has_its_default(train_record):
    raw = json.loads(to_json(train_record()))
    for name in ("flops", "rows", "overflow", "choices", "overflow_flops", "load"):
        del raw[name]
    assert from_json(json.dumps(raw)) == train_record()
    assert from_json(json.dumps(raw)).overflow_share == 0.0


def test_load_and_flops_load_back_equal(train_record):
    load = {"ranks": 1 / 3, "units": (1.0, 1.5), "stages": (10.5, 20.0)}
    record = train_record(flops={"mlp": 1e9 / 3}, rows=(3, 4), overflow=(1, 2), overflow_flops=0.1, load=load)
    assert from_json(to_json(record)) == record


def test_overflow_is_a_share_of_what_the_routers_wanted(train_record):
    # 4096 tokens a step: of the first unit 2048 were kept and 512 not, of the second all.
    binary = train_record(1, density=(0.5, 0.25), overflow=(512, 0))
    assert binary.dropped == (0.2, 0.0)
    assert binary.overflow_share == pytest.approx(512 / (2048 + 512 + 1024))
    # Two experts a token: what counts is choices, not tokens.
    experts = train_record(1, density=(1.0,), choices=((6144, 2048),), overflow=(2048,))
    assert experts.dropped == (0.25,) and experts.overflow_share == 0.25
    assert train_record(1).dropped == () and train_record(1).overflow_share == 0.0


def test_a_missing_value_is_named(train_record):
    raw = json.loads(to_json(train_record()))
    del raw["grad_norm"]
    with pytest.raises(ValueError, match="lacks grad_norm"):
        from_json(json.dumps(raw))


def test_records_are_frozen(train_record):
    record: TrainRecord = train_record()
    with pytest.raises(AttributeError):
        record.loss = 0.0
