"""What the report tells of routing: units, targets, arithmetic, experts."""

import json

import pytest
import yaml
from pages import Page, only_metrics, report, routed_run, table_cells

from megaroute.metrics import drawing, formats, routing_text, routing_view, summary
from megaroute.metrics.records import to_json
from megaroute.metrics.run_view import RunView


def test_every_unit_has_its_row(tmp_path, train_record):
    routing = {"unit": "separate", "layers": [1, 3], "densities": [0.25, 0.75]}
    units = ["1 attention", "1 mlp", "3 attention", "3 mlp"]
    text = report(routed_run(tmp_path, train_record, routing, units))
    # 4096 tokens a step.
    shared = ["50.0 %", "none", "51.3 %", "2.0 %", "1.500"]
    assert table_cells(text) == [
        ["layer 1 attention", "25.0 %", *shared],
        ["layer 1 mlp", "25.0 %", *shared],
        ["layer 3 attention", "75.0 %", *shared],
        ["layer 3 mlp", "75.0 %", *shared],
    ]
    page = Page(text)
    assert "2 of 4 layers carry a router (1, 3), attention and MLP each their own" in page.text
    assert "target density 25.0 % to 75.0 %" in page.text


def test_an_annealed_target_is_a_line_over_time(tmp_path, train_record):
    routing = {"layers": [1, 2], "density_anneal": {"start": 1.0, "steps": 10, "after": 5}}
    run = RunView.open(routed_run(tmp_path, train_record, routing, ["1", "2"]))
    assert run.targets(1) == run.targets(6) == (1.0, 1.0)
    assert run.targets(11) == (0.75, 0.75)
    assert run.targets(16) == run.targets() == (0.5, 0.5)
    text = report(tmp_path)
    assert table_cells(text)[0][:3] == ["layer 1", "100.0 % to 50.0 %", "50.0 %"]
    assert "target density 50.0 %, from 100.0 % in steps 5 to 15" in Page(text).text


@pytest.mark.parametrize("router", ["highway", "moe"])
def test_what_computes_everything_has_no_target(tmp_path, train_record, router):
    run = RunView.open(routed_run(tmp_path, train_record, {"router": router, "unit": "mlp"}, ["1 mlp", "2 mlp"]))
    assert run.targets() == run.targets(3) == (None, None)
    assert "target" not in summary.shape(run)[1].value
    assert ("experts in place of the MLP" in summary.shape(run)[1].value) == (router == "moe")
    assert [row[1] for row in table_cells(report(tmp_path))] == ["none", "none"]


def test_the_arithmetic_is_told_by_part(tmp_path, train_record):
    run = RunView.open(routed_run(tmp_path, train_record, {"layers": [1, 2]}, ["1", "2"]))
    facts = {fact.label: fact for fact in routing_view.arithmetic(run)}
    assert facts["MLP"].value == formats.si(4e9 / 4096, "FLOP")
    assert facts["MLP"].note == "66.7 % of executed"
    assert facts["thrown away"].note == "8.3 % of executed"
    assert facts["executed"].note == "75.0 % of dense"
    assert facts["overflow"].value == formats.si(3e8 / 4096, "FLOP")
    parts = [facts[name] for name, _ in drawing.PARTS.values()]
    assert sum(float(fact.note.split()[0]) for fact in parts) == pytest.approx(100.0, abs=0.2)


def test_load_and_overflow_are_shown_where_there_is_any(tmp_path, train_record):
    run_dir = routed_run(tmp_path, train_record, {"layers": [1, 2]}, ["1", "2"])
    page = Page(report(run_dir))
    assert "Load of the ranks" in page.text and "Share of what the routers wanted" in page.text
    assert "Ranks 1.250" in page.text and "Stages 75.0 %, 25.0 %" in page.text
    even = {"ranks": 1.0, "units": (1.0, 1.0), "stages": (20.0,)}
    run_dir = routed_run(tmp_path, train_record, {"layers": [1, 2]}, ["1", "2"], overflow=(0, 0), load=even)
    page = Page(report(run_dir))
    assert "Load of the ranks" not in page.text and "Share of what the routers wanted" not in page.text
    assert "Ranks 1.000" in page.text and "Stages" not in page.text


def test_a_run_of_an_earlier_version_says_what_it_did_not_record(finished_page):
    assert table_cells(finished_page)[0] == [
        "layer 2",
        "50.0 %",
        "50.0 %",
        "48.0 %",
        "not recorded",
        "not recorded",
        "not recorded",
    ]
    assert "Where the arithmetic went" not in finished_page


def test_experts_have_their_shares(tmp_path, train_record):
    routing = {"router": "moe", "unit": "mlp", "layers": [1], "moe": {"experts": 2, "top_k": 2}}
    # 4096 tokens, two choices each.
    changes = {"choices": ((6144, 2048),), "overflow": (1024,), "density": (0.9,)}
    page = Page(report(routed_run(tmp_path, train_record, routing, ["1 mlp"], **changes)))
    assert "every token chooses among experts" in page.text and "skip" not in page.text
    assert "router moe, 2 experts, 2 a token, capacity factor 1.25" in page.text
    assert "Unit Expert 0 Expert 1 Uneven layer 1 mlp 75.0 % 25.0 % 1.500" in page.text
    assert "Overflow 12.5 % of what the routers wanted found no capacity" in page.text


def test_the_routing_line_names_what_shapes_the_routing(tmp_path, train_record, valid_record):
    routing = {
        "router": "gumbel",
        "layers": [1, 2],
        "dispatch": {"mode": "capacity"},
        "capacity": {"factor": 1.5, "scope": "stage"},
        "budget": {"weight": 0.02},
        "controller": {"gain": 2.0},
        "benefit": "second_order",
    }
    run_dir = routed_run(tmp_path, train_record, routing, ["1", "2"])
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(to_json(valid_record(30, density=(0.2, 0.4))) + "\n")
    run = RunView.open(run_dir)
    for said in (
        "dispatch capacity, capacity factor 1.5 of each stage",
        "estimator st_gumbel, benefit second_order, budget weight 0.02, controller gain 2",
    ):
        assert said in routing_text.routing_text(run)
    facts = {fact.label: fact.value for fact in summary.results(run)}
    assert facts["Validation density"] == "30.0 %" and facts["Overflow"] == "2.0 %"


def test_a_page_without_skipping_does_not_talk_of_it(tmp_path, train_record, trace_json):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"run": {"name": "x"}, "routing": {"router": "dense"}}))
    (tmp_path / "routing_trace.json").write_text(json.dumps({**trace_json, "routed_layers": [], "passages": []}))
    records = [train_record(step, density=(), executed_flops=8e9) for step in range(1, 4)]
    text = Page(report(only_metrics(tmp_path, records))).text
    assert "A language model without routers" in text
    assert "skip" not in text
