"""Changes of what the stream is a function of: refused by name, or allowed and recorded."""

import json

import pytest
from streams import content, run_replicas

from megaroute.common.errors import DataError
from megaroute.config.data import DataConfig, SourceConfig
from megaroute.data.cursor import Change, Cursor
from megaroute.data.identity import data_identity
from megaroute.data.stream import open_stream
from megaroute.data.tokenizer_training import train_tokenizer

pytestmark = pytest.mark.data


def sources(data: DataConfig, **weights: float) -> dict[str, SourceConfig]:
    folders = {"a": data.train, "b": data.valid, "c": data.valid}
    return {name: SourceConfig(path=folders[name], weight=weight) for name, weight in weights.items()}


@pytest.fixture
def mixed(data):
    return data.model_copy(update={"train": sources(data, a=1, b=1), "valid": None})


def test_another_mixture_is_refused_by_the_name_of_the_source(data, mixed):
    _, cursor = run_replicas(mixed, 1, [40])
    for train, message in (
        (sources(data, a=3, b=1), r"data.train.a: .* a share of 0.5, this run has a share of 0.75"),
        (sources(data, a=1, b=1, c=1), r"data.train.a: .* a share of 0.5, this run has a share of 0.333"),
        (sources(data, a=1), r"data.train.a: .* allow it with data.allow_change=\[mixture\]"),
    ):
        with pytest.raises(DataError, match=message):
            open_stream(data.model_copy(update={"train": train}), "train", cursor=cursor)


def test_an_allowed_change_of_weights_holds_the_new_shares_from_there_on_and_is_recorded(data, mixed):
    _, cursor = run_replicas(mixed, 2, [80])
    other = data.model_copy(update={"train": sources(data, a=9, b=1), "valid": None, "allow_change": ("mixture",)})
    rows, after = run_replicas(other, 4, [80], cursor)
    taken = sum(span.tokens for row in rows.values() for span in row.spans if span.source == "a")
    assert taken / (320 * 33) == pytest.approx(0.9, abs=0.03)
    assert after.changes == (Change(160, "mixture", {"a": 0.5, "b": 0.5}, {"a": 0.9, "b": 0.1}),)
    assert min(rows) == 160
    again, _ = run_replicas(other.model_copy(update={"allow_change": ()}), 1, [8], after)  # nothing differs any more
    assert min(again) == 480


def test_a_source_may_come_and_go(data, mixed):
    _, cursor = run_replicas(mixed, 1, [40])
    allowed = {"valid": None, "allow_change": ("mixture",)}
    more, cursor = run_replicas(data.model_copy(update={"train": sources(data, a=1, c=1), **allowed}), 1, [80], cursor)
    assert {span.source for row in more.values() for span in row.spans} == {"a", "c"}
    assert [change.field for change in cursor.changes] == ["mixture"]
    assert set(cursor.tokens) == {"a", "b", "c"} and sum(cursor.tokens.values()) == 120 * 33


def test_another_length_goes_on_at_the_same_token(data):
    rows, cursor = run_replicas(data, 1, [40])
    longer = data.model_copy(update={"sequence_length": 65, "allow_change": ("sequence_length",)})
    more, _ = run_replicas(longer, 1, [20], cursor)
    whole, _ = run_replicas(data, 1, [104])
    for lane in range(8):
        text = [i for g, row in whole.items() if g % 8 == lane for i in row.ids.tolist()]
        part = [i for found in (rows, more) for g, row in found.items() if g % 8 == lane for i in row.ids.tolist()]
        assert part == text[: len(part)]


def test_another_seed_or_manifest_starts_the_text_again_and_rows_go_on(data):
    _, cursor = run_replicas(data, 1, [40])
    for change in ({"seed": 9, "allow_change": ("seed",)}, {"train": data.valid, "allow_change": ("manifest",)}):
        other = data.model_copy(update=change)
        rows, _ = run_replicas(other, 1, [40], cursor)
        fresh, _ = run_replicas(other, 1, [40])
        assert [row.ids.tolist() for row in rows.values()] == [row.ids.tolist() for row in fresh.values()]
        assert sorted(rows) == list(range(40, 80))


def test_another_tokenizer_gives_up_the_document_at_hand(data, train_documents, tmp_path):
    _, cursor = run_replicas(data, 1, [40])
    train_tokenizer(train_documents, tmp_path / "other.model", vocab_size=300)
    loose = {"train": data.train, "allow_change": ("tokenizer",), "tokenizer": tmp_path / "other.model"}
    with pytest.raises(DataError, match=r"was prepared with"):  # these shards are tied to theirs
        open_stream(data.model_copy(update=loose), "train", cursor=cursor)
    identity = {**data_identity(data), "tokenizer": "c" * 64}
    after = cursor.continued(identity, ("tokenizer",))
    assert all(state.open == () for state in after.lanes.values())
    assert {lane: state.sources for lane, state in after.lanes.items()} == {
        lane: state.sources for lane, state in cursor.lanes.items()
    }


def test_what_is_not_named_stays_refused_and_lanes_always_are(data):
    cursor = Cursor(0, data_identity(data), {})
    both = data.model_copy(update={"seed": 9, "sequence_length": 16, "allow_change": ("seed",)})
    with pytest.raises(DataError, match=r"data.sequence_length: .* 32, this run has 16"):
        open_stream(both, "train", cursor=cursor)
    with pytest.raises(DataError, match=r"data.lanes: .* 8, this run has 4; .* use 8, or start afresh"):
        open_stream(data.model_copy(update={"lanes": 4}), "train", cursor=cursor)


def test_changes_survive_the_checkpoint(data):
    _, cursor = run_replicas(data, 1, [8])
    other = data.model_copy(update={"seed": 9, "allow_change": ("seed",)})
    _, after = run_replicas(other, 1, [8], cursor)
    assert Cursor.from_json(json.loads(json.dumps(after.to_json()))).changes == (Change(8, "seed", 3, 9),)
    first, second = run_replicas(other, 2, [8], after), run_replicas(other, 1, [16], after)
    assert content(first[0]) == content(second[0])
