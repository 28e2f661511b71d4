"""The routing picture shows what the trace says, legibly."""

import json
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from megaroute.config.units import Unit
from megaroute.metrics import passages
from megaroute.metrics.grid import EXECUTED, MOST_PER_BAND, grid
from megaroute.metrics.trace import Passage, Trace, parse_label, read_trace


def trace_of(num_layers, routed, *given):
    units = tuple(parse_label(str(label)) for label in routed)
    return Trace(step=1, num_layers=num_layers, units=units, density_target=0.5, passages=given)


def luminance(colour):
    """Relative luminance of WCAG 2.1."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("routed", [1, 4, 46])
def test_text_reads_on_every_colour_and_lightness_falls(routed):
    scale = list(passages.colours(trace_of(routed + 2, tuple(range(2, routed + 2)))).values())
    assert len(set(scale)) == routed + 1
    ink = luminance(passages.INK) + 0.05
    assert all((luminance(colour) + 0.05) / ink >= 7 for colour in scale)
    assert all(luminance(a) > luminance(b) for a, b in pairwise(scale))


def test_a_dense_model_has_one_colour():
    trace = trace_of(3, ())
    assert list(passages.colours(trace)) == passages.legend(trace) == [3]


@pytest.mark.parametrize("routed", [1, 9, 10, 46])
def test_the_legend_is_short_and_ends_with_all_layers(routed):
    trace = trace_of(routed + 2, tuple(range(2, routed + 2)))
    shown = passages.legend(trace)
    assert len(shown) <= 10
    assert shown[-1] == routed + 2
    assert shown == sorted(shown)


def test_a_token_says_what_it_skipped_and_cost():
    passage = Passage((" cat", "\n"), ((True, False), (False, False)), (2.345, None))
    first, second = passages.view(trace_of(4, (1, 3), passage), passage).tokens
    assert first.title == '" cat": 3 of 4 layers, skipped layer 3; predicting the next token cost 2.35 nats'
    assert second.title == '"\\n": 2 of 4 layers, skipped layer 1, layer 3'
    assert (first.executed, second.executed) == (3, 2)
    assert (first.ends_line, second.ends_line) == (False, True)


@pytest.mark.parametrize("text, shown", [("\n", "\u23ce"), ("\t", "\\t"), ("a\x00", "a\\x00"), ("", "\u00b7")])
def test_every_token_is_visible(text, shown):
    passage = Passage((text,), (), (None,))
    assert passages.view(trace_of(1, (), passage), passage).tokens[0].text == shown


def executed_cells(svg, num_layers):
    """Executed (row, column) of a grid, read back from its boxes."""
    root = ElementTree.fromstring(svg)
    found = []
    for band in root.findall("g"):
        columns = [float(rect.get("x")) for rect in band.findall("g/rect")]
        height = float(band.find("g/rect").get("height")) / num_layers
        for path in (p for p in band.findall("path") if p.get("fill") == EXECUTED):
            for box in path.get("d").split("M")[1:]:
                corner, rest = box.split("h", 1)
                x, y = map(float, corner.split())
                width = float(rest.split("v")[0])
                row = round(y / height)
                found += [(row, i) for i, c in enumerate(columns) if x - 0.2 <= c < x + width - 0.2]
    return found


def test_the_grid_marks_exactly_the_executed_cells():
    keep = ((True, False, True, True, False), (False, False, True, False, True))
    passage = Passage(tuple("abcde"), keep, (None,) * 5)
    svg = grid(trace_of(4, (1, 3), passage), passage, list("abcde"))
    expected = [(1, 0), (1, 2), (1, 3), (3, 2), (3, 4)]
    assert sorted(executed_cells(svg, 4)) == expected
    assert "60 %" in svg and "40 %" in svg and "100 %" in svg


def test_branches_have_rows_of_their_own():
    keep = ((True, False, True), (False, False, True), (True, True, False))
    passage = Passage(tuple("abc"), keep, (None,) * 3)
    trace = trace_of(3, ("1 attention", "1 mlp", "2 mlp"), passage)
    svg = grid(trace, passage, list("abc"))
    # Rows: L0, L1 attention, L1 mlp, L2 attention (no router), L2 mlp.
    assert sorted(executed_cells(svg, 5)) == [(1, 0), (1, 2), (2, 2), (4, 0), (4, 1)]
    root = ElementTree.fromstring(svg)
    labels = [text.text for text in root.iter("text") if text.get("class") == "end"]
    assert labels == ["L0", "L1 attention", "L1 mlp", "L2 attention", "L2 mlp"]
    first = passages.view(trace, passage).tokens[1]
    assert first.title == '"b": 4 of 6 branches, skipped layer 1 attention, layer 1 mlp'
    assert list(passages.colours(trace)) == [3, 4, 5, 6]
    assert "routed branches executed 55.6 % of them" in passages.view(trace, passage).heading


def test_a_trace_names_its_units(tmp_path, trace_json):
    del trace_json["routed_layers"]
    path = tmp_path / "routing_trace.json"
    path.write_text(json.dumps({**trace_json, "units": ["2 attention", "2 mlp"]}))
    trace = read_trace(path)
    assert trace.units == (Unit(2, "attention"), Unit(2, "mlp"))
    assert (trace.by_branch, trace.counted, trace.total) == (True, "branches", 8)


def test_a_long_passage_is_cut_into_bands():
    length = 2 * MOST_PER_BAND + 1
    passage = Passage(("a",) * length, ((True,) * length,), (None,) * length)
    root = ElementTree.fromstring(grid(trace_of(2, (1,), passage), passage, ["a"] * length))
    assert [len(band.findall("g/rect")) for band in root.findall("g")] == [MOST_PER_BAND, MOST_PER_BAND, 1]


def test_an_empty_passage_has_no_grid():
    passage = Passage((), ((),), ())
    assert grid(trace_of(2, (1,), passage), passage, []) == ""


def test_a_trace_is_read(tmp_path, trace_json):
    path = tmp_path / "routing_trace.json"
    path.write_text(json.dumps(trace_json))
    trace = read_trace(path)
    assert (trace.num_layers, trace.density_target) == (4, 0.5)
    assert trace.units == (Unit(2, "layer"), Unit(3, "layer"))
    assert trace.passages[0].keep == ((True, False, False, True), (True, True, False, False))
    assert trace.passages[0].loss == (2.5, 0.25, None, None)


@pytest.mark.parametrize(
    "damage, reason",
    [
        ({"format": 2}, "format is 2"),
        ({"routed_layers": [2, 4]}, "not all in a model of 4 layers"),
        ({"units": ["2", "4 mlp"]}, "4 mlp are not all in a model of 4 layers"),
        ({"units": ["2", "3 head"]}, "not '3 head'"),
        ({"routed_layers": [2]}, "1 routed units"),
        ({"passages": [{"tokens": ["a"], "keep": [[1, 0], [1]], "loss": [1.0]}]}, "decisions"),
        ({"passages": [{"tokens": ["a"], "keep": [[1], [1]], "loss": [1.0, 2.0]}]}, "2 losses"),
        ({"passages": 3}, "not a routing trace"),
    ],
)
def test_a_trace_that_does_not_add_up_is_refused(tmp_path, trace_json, damage, reason):
    path = tmp_path / "routing_trace.json"
    path.write_text(json.dumps(trace_json | damage))
    with pytest.raises(ValueError, match=reason):
        read_trace(path)
