"""The token atlas: tables of tokens made up for the purpose, and of a trained model."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from pages import Page

from megaroute.common.errors import DataError
from megaroute.config.units import Unit
from megaroute.evaluation import atlas as atlas_module
from megaroute.evaluation import atlas_page
from megaroute.evaluation.atlas import Atlas, collect, correlation, tables
from megaroute.evaluation.perplexity import bits_per_byte, text_files
from megaroute.evaluation.statistics import spearman

COUNT = 4000


@pytest.fixture(scope="module")
def made_up() -> Atlas:
    """Tokens 1 to 8 of falling frequency; the cost of a token is higher the more units executed it."""
    draw = np.random.default_rng(0)
    executed = draw.random((2, COUNT)) < [[0.3], [0.6]]
    return Atlas(
        units=(Unit(1, "layer"), Unit(2, "mlp")),
        num_layers=4,
        context=32,
        ids=draw.choice(np.arange(1, 9), COUNT, p=np.array([50, 20, 10, 8, 5, 4, 2, 1]) / 100),
        types=draw.integers(0, 3, COUNT).astype(np.int8),
        positions=np.arange(COUNT) % 32,
        nats=executed.sum(0) + draw.normal(0, 1, COUNT),
        executed=executed,
        groups=np.arange(COUNT) // 100,
        grouped_by="documents",
    )


def test_branches_count_half_a_layer(made_up):
    expected = 4 - 1.0 * ~made_up.executed[0] - 0.5 * ~made_up.executed[1]
    assert (made_up.layers == expected).all()


def test_tables_add_up(made_up):
    found = tables(made_up, [str(i) for i in range(9)])
    for name in ("types", "frequency", "positions"):
        assert sum(row["tokens"] for row in found[name]) == COUNT
        assert sum(row["share"] for row in found[name]) == pytest.approx(1)
        mean = sum(row["share"] * row["layers"] for row in found[name])
        assert mean == pytest.approx(made_up.layers.mean())
    chosen = made_up.types == 1
    row = next(row for row in found["types"] if row["type"] == "continuation")
    assert row["nats"] == pytest.approx(made_up.nats[chosen].mean())
    assert row["layer 2 mlp"] == pytest.approx(made_up.executed[1, chosen].mean())
    assert [row["positions"] for row in found["positions"]][:2] == ["0-1", "2-3"]
    assert [row["density"] for row in found["units"]] == pytest.approx(made_up.executed.mean(1))
    assert found["units"][0]["nats_executed"] == pytest.approx(made_up.nats[made_up.executed[0]].mean())
    assert [row["layers"] for row in found["depth"]] == [2.5, 3.0, 3.5, 4.0]


def test_deciles_go_from_frequent_to_rare(made_up):
    decile = [int(made_up.deciles[made_up.ids == token][0]) for token in range(1, 9)]
    assert decile == sorted(decile)
    assert decile[0] in (2, 3) and decile[-1] == 9  # half of the text is token 1, whose middle is at a quarter


def test_single_tokens_are_sorted_and_frequent_enough(made_up):
    few = replace(made_up, ids=np.where(np.arange(COUNT) < 5, 99, made_up.ids))
    rows = atlas_module._tokens(few, [str(i) for i in range(100)])
    assert [row["id"] for row in rows].count(99) == 0
    assert [row["layers"] for row in rows] == sorted((row["layers"] for row in rows), reverse=True)


def test_correlation_finds_what_was_put_in_and_nothing_else(made_up):
    everything = np.ones(COUNT, dtype=bool)
    found = correlation(made_up, everything)
    assert found["spearman"] == pytest.approx(spearman(made_up.layers, made_up.nats))
    assert 0.3 < found["low"] < found["spearman"] < found["high"] < 0.7
    noise = replace(made_up, nats=np.random.default_rng(5).normal(size=COUNT))
    none = correlation(noise, everything)
    assert none["low"] < 0 < none["high"] and abs(none["spearman"]) < 0.05
    level = correlation(replace(made_up, executed=np.ones((2, COUNT), dtype=bool)), everything)
    assert level == {"count": COUNT, "spearman": None, "low": None, "high": None}


def test_interval_is_wide_where_the_documents_are_few(made_up):
    everything = np.ones(COUNT, dtype=bool)
    shift = np.array([-3.0, 0.0, 2.0, 4.0])[np.arange(COUNT) % 4]
    # Documents differ, and each has its own density: tokens of one are no independent witnesses.
    executed = np.random.default_rng(1).random((2, COUNT)) < (np.arange(COUNT) % 4 + 1) / 5
    few = replace(made_up, executed=executed, nats=made_up.nats + shift, groups=np.arange(COUNT) % 4)
    many = replace(few, groups=np.arange(COUNT))
    widths = [found["high"] - found["low"] for found in (correlation(few, everything), correlation(many, everything))]
    assert widths[0] > 3 * widths[1]


def test_atlas_of_a_model_is_what_its_evaluation_says(scorer, text_file):
    files = text_files([text_file])
    found = collect(scorer, files)
    result = bits_per_byte(scorer, files, stride=scorer.context)
    assert len(found.ids) == result["tokens"] and found.grouped_by == "documents"
    assert found.nats.mean() == pytest.approx(result["nats_per_token"], rel=1e-5)
    assert found.layers.mean() == pytest.approx(result["layers_executed"])
    assert found.positions.max() == scorer.context - 1
    assert (found.ids == scorer.tokenizer.eod).sum() == result["documents"]  # the one in front, not the one behind


def test_one_document_is_grouped_by_windows(scorer, text_file):
    long = text_file.with_name("long.txt")
    long.write_text("the router reads every token " * 20)
    assert collect(scorer, text_files([long])).grouped_by == "windows"


def test_file_without_text_is_refused(scorer, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="empty.jsonl: no document has any text, so there is nothing to show"):
        collect(scorer, text_files([tmp_path / "empty.jsonl"]))


@pytest.mark.parametrize("units", [2, 0])
def test_page_and_tables(made_up, tmp_path, units):
    atlas = replace(made_up, units=made_up.units[:units], executed=made_up.executed[:units])
    found = tables(atlas, ["<b>", *map(str, range(1, 9))])
    about = {"name": "a <run>", "step": 7, "files": ["x.jsonl"], "fewest": 20}
    page = Page(atlas_page.write(atlas, found, about, tmp_path / "new").read_text())
    assert "a <run>: which tokens get the layers" in page.text
    assert ("Units by kind of token" in page.text) == ("Routed units" in page.text) == (units > 0)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    for name, table in found.items():
        if table:
            with open(tmp_path / "new" / f"{name}.csv", newline="") as file:
                rows = list(csv.DictReader(file))
            assert len(rows) == len(table) and list(rows[0]) == list(table[0])
