"""Several runs on one page: what differs is told, and the numbers are those of the runs."""

import re
from html.parser import HTMLParser

import pytest
import yaml

from megaroute import cli
from megaroute.common.errors import UserError
from megaroute.metrics import compare
from megaroute.metrics.cautions import cautions
from megaroute.metrics.compare import Comparison
from megaroute.metrics.compare_figures import plots
from megaroute.metrics.records import EventRecord, to_json
from megaroute.metrics.report import write_comparison, write_report
from megaroute.metrics.run_view import RunView


@pytest.fixture
def make_run(tmp_path, train_record, valid_record):
    """`make_run(name, routing, ..)`: the directory of a run of 20 steps."""

    def make(name, routing, units, folder=None, data=None, steps=20, bits=1.25, train=None, **changes):
        directory = tmp_path / (folder or name)
        directory.mkdir()
        density = tuple(0.5 for _ in units)
        data = {"tokenizer": "tok.model", "valid": "valid", **(data or {})}
        config = {"run": {"name": name}, "model": {"num_layers": 4}, "routing": routing, "data": data}
        (directory / "config.yaml").write_text(yaml.safe_dump({**config, "train": train or {}}))
        records = [
            EventRecord(kind="start", step=0, attempt=1, message="started", values={"units": units}),
            *(train_record(step, density=density, **changes) for step in range(1, steps + 1)),
            *(valid_record(step, density=density, bits_per_byte=bits) for step in (steps // 2, steps)),
            EventRecord(kind="end", step=steps, attempt=1, message="finished"),
        ]
        (directory / "metrics.jsonl").write_text("".join(to_json(record) + "\n" for record in records))
        return directory

    return make


def side_by_side(*directories):
    return Comparison.of([RunView.open(directory) for directory in directories])


def lines(comparison):
    return {line.label: line.values for line in compare.table(comparison)}


@pytest.fixture
def pair(make_run):
    load = {"ranks": 1.25, "units": (1.5, 1.0), "stages": (3.0, 5.0)}
    flops = {"mlp": 4e9, "attention": 1.5e9, "padding": 0.5e9}
    first = make_run("learned", {"layers": [1, 2]}, ["1", "2"], load=load, rows=(1, 1), overflow=(41, 0), flops=flops)
    second = make_run(
        "rival", {"router": "random", "unit": "mlp", "layers": [2]}, ["2 mlp"], bits=1.5, executed_flops=8e9
    )
    return first, second


def test_the_table_has_the_numbers_of_each_run(pair):
    found = lines(side_by_side(*pair))
    assert "router gumbel" not in found["Routing"][0] and "(1-2)" in found["Routing"][0]
    assert "in front of the MLP" in found["Routing"][1] and "router random" in found["Routing"][1]
    assert found["Tokens"] == ("81.9k", "81.9k")
    assert found["Executed FLOPs"] == ("120 GFLOP", "160 GFLOP")
    assert found["Executed FLOPs per token"] == ("1.46 MFLOP", "1.95 MFLOP")
    assert found["Executed arithmetic"] == ("75.0 % of dense", "100.0 % of dense")
    assert found["Validation"] == ("1.2500 bits per byte", "1.5000 bits per byte (+0.2500)")
    assert found["Load, maximum over mean"] == ("1.250", "not recorded")
    assert found["Overflow"] == ("1.0 % of what routers wanted", "not recorded")
    assert found["Density"] == ("50.0 %", "50.0 %")
    assert "Utilisation" not in found


def test_every_figure_has_every_run_that_has_the_data(pair):
    drawn = {plot.title: plot.svg for plot in plots(side_by_side(*pair))}
    assert set(drawn) == {
        "Training loss",
        "Validation against tokens",
        "Validation against executed FLOPs",
        "Density per unit",
        "Density over time",
        "Executed arithmetic by part",
        "Load of the ranks",
        "Overflow",
    }
    nothing_of_rival = {"Executed arithmetic by part", "Load of the ranks", "Overflow"}
    for title, svg in drawn.items():
        assert ">learned<" in svg, title
        assert (">rival<" in svg) == (title not in nothing_of_rival), title
    (density,) = [plot for plot in plots(side_by_side(*pair)) if plot.title == "Density per unit"]
    assert "Attention stands left" in density.text and "mlp" not in density.svg


class Balanced(HTMLParser):
    """Tags that are closed, and the ids."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.ids = [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "br"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_the_page_stands_alone_and_is_the_same_each_time(pair, tmp_path):
    path = write_comparison(pair)
    assert path == tmp_path / "comparison.html"
    text = path.read_text()
    ids = Balanced(text).ids
    assert len(ids) == len(set(ids)) > 0
    targets = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', text)
    assert "<script" not in text and all((a or b).startswith("#") for a, b in targets)
    assert write_comparison(pair, tmp_path / "new" / "page.html").read_text() == text


def test_runs_of_one_name_are_told_apart(make_run):
    runs = [make_run("same", {}, ["0"], folder=folder) for folder in ("a", "b")]
    assert side_by_side(*runs).names == ("same (a)", "same (b)")


def test_names_are_escaped(make_run, tmp_path):
    runs = [make_run(name, {}, ["0"], folder=str(i)) for i, name in enumerate(("<b>one", "<i>two"))]
    text = write_comparison(runs, tmp_path / "page.html").read_text()
    assert "<b>one" not in text and "&lt;b&gt;one" in text


def test_what_stands_in_the_way_of_a_fair_comparison_is_said(make_run):
    runs = [
        make_run("plain", {"layers": [1]}, ["1"]),
        make_run("other", {"router": "mod", "layers": [1]}, ["1"], data={"tokenizer": "large.model"}, steps=10),
        make_run("full", {"layers": [1], "dispatch": {"mode": "capacity"}}, ["1"], train={"global_batch": 64}),
        make_run("experts", {"router": "moe", "unit": "mlp", "layers": [1]}, ["1 mlp"]),
    ]
    notes = cautions(side_by_side(*runs).named)
    starts = [note.split(":")[0].split(" differs")[0] for note in notes]
    assert starts == [
        "data.tokenizer",
        "train.global_batch",
        "The runs have not seen equally many tokens, so the table compares unequal ends",
        "other",
        "full",
        "experts",
    ]
    assert "bits per byte can" in notes[0] and "large.model" in notes[0]


def test_equal_conditions_need_no_caution(make_run):
    runs = [make_run(name, {"layers": [1]}, ["1"]) for name in ("a", "b")]
    assert cautions(side_by_side(*runs).named) == []


def caution(word, *runs):
    """The one caution that has a word."""
    (found,) = [note for note in cautions(side_by_side(*runs).named) if word in note]
    return found


def set_keys(directory, **sections):
    """Change keys of a run's configuration."""
    path = directory / "config.yaml"
    config = yaml.safe_load(path.read_text())
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    path.write_text(yaml.safe_dump(config))
    return directory


def two_runs(make_run, a=None, b=None):
    first = set_keys(make_run("a", {"layers": [1]}, ["1"]), **(a or {}))
    return first, set_keys(make_run("b", {"layers": [1]}, ["1"]), **(b or {}))


@pytest.mark.parametrize(
    "section, name, values, consequence",
    [
        ("train", "seed", (1, 2), "may be chance"),
        ("data", "seed", (0, 1), "may be chance"),
        ("train", "precision", ("fp32", "bf16"), "rounding differs"),
        ("model", "init_std", (0.02, 0.1), "started from other weights"),
        ("optim", "lr", (0.001, 0.003), "may be theirs"),
        ("optim", "decay", ("cosine", "constant"), "may be theirs"),
        ("data", "valid", (None, "held-out"), "other text"),
    ],
)
def test_settings_that_differ_are_told_with_their_consequence(make_run, section, name, values, consequence):
    a, b = ({section: {name: value}} for value in values)
    note = caution(f"{section}.{name}", *two_runs(make_run, a, b))
    assert consequence in note and "None" not in note
    assert all(("not set" if value is None else str(value)) in note for value in values)


def test_other_lengths_have_other_schedules(make_run):
    a, b = {"train": {"steps": 20}}, {"train": {"steps": 40}}
    note = caution("train.steps", *two_runs(make_run, a, b))
    assert "neither ends nor curves can be compared" in note
    for section in (a, b):
        section["optim"] = {"decay": "constant"}
    runs = [set_keys(make_run(name, {"layers": [1]}, ["1"]), **section) for name, section in (("c", a), ("d", b))]
    assert "compare at equal tokens" in caution("train.steps", *runs)


def test_validation_with_every_layer_is_not_passed_over_in_silence(make_run, valid_record):
    runs = [make_run("plain", {"layers": [1]}, ["1"]), make_run("full", {"router": "random_ltd", "layers": [1]}, ["1"])]
    with open(runs[1] / "metrics.jsonl", "a") as file:
        file.write(to_json(valid_record(20, 2, density=(1.0,), flops_per_token=0.6e6)) + "\n")
    comparison = side_by_side(*runs)
    assert "full 100.0 % after 50.0 %" in caution("Validation executes another share", *runs)
    assert lines(comparison)["Validation density"] == ("50.0 %", "100.0 %")
    # Training: 6 GFLOP a step of 4096 tokens, a third of it forward.
    assert lines(comparison)["Validation FLOPs per token"] == (
        "not recorded",
        "600 kFLOP forward, 122.9 % of training's",
    )
    (figure,) = [plot for plot in plots(comparison) if plot.title == "Validation against executed FLOPs"]
    assert "validation of full executes more" in figure.text and "greedy" not in figure.text


def test_differences_are_to_the_first_run_that_has_validated(make_run):
    runs = [make_run(name, {"layers": [1]}, ["1"], bits=bits) for name, bits in (("a", 1.0), ("b", 1.25), ("c", 1.5))]
    path = runs[0] / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if '"valid"' not in line))
    found = lines(side_by_side(*runs))["Validation"]
    assert found == ("", "1.2500 bits per byte", "1.5000 bits per byte (+0.2500)")
    text = write_comparison(runs).read_text()
    assert "difference to b." in text and "None" not in text


def test_legends_have_what_is_drawn(make_run):
    capacity = {"layers": [1], "dispatch": {"mode": "capacity"}}
    runs = [
        make_run("limited", capacity, ["1"], rows=(1,), overflow=(100,)),
        make_run("free", {"layers": [1]}, ["1"], rows=(1,), overflow=(0,)),
        make_run("dense", {"router": "dense"}, []),
    ]
    drawn = {plot.title: plot.svg for plot in plots(side_by_side(*runs))}
    assert ">limited<" in drawn["Overflow"]
    assert ">free<" not in drawn["Overflow"] and ">dense<" not in drawn["Overflow"]
    assert ">limited<" in drawn["Density over time"] and ">dense<" not in drawn["Density over time"]
    assert ">dense<" not in drawn["Density per unit"]


def test_a_run_of_one_step_is_a_point(make_run):
    def markers(steps):
        runs = [make_run(f"{name}{steps}", {"layers": [1]}, ["1"], steps=steps) for name in "ab"]
        return plots(side_by_side(*runs))[0].svg.count("<use")

    assert markers(1) - markers(3) >= 2


def test_a_run_named_twice_is_refused(pair, capsys):
    first, _ = map(str, pair)
    assert cli.main(["report", first, f"{first}/"]) == 2
    assert "is named twice" in capsys.readouterr().err


def test_a_run_without_steps_has_a_column(make_run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    comparison = side_by_side(empty, make_run("dense", {"router": "dense"}, []))
    found = lines(comparison)
    assert found["Steps"] == ("0", "20") and found["Training loss"][0] == ""
    assert "Density per unit" not in {plot.title for plot in plots(comparison)}
    assert write_comparison([empty, comparison.runs[1].directory]).exists()


def test_the_command_compares_several_and_reports_one(pair, tmp_path, capsys):
    first, second = map(str, pair)
    assert cli.main(["report", first, second]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'comparison.html'}\n"
    assert cli.main(["report", first]) == 0
    assert capsys.readouterr().out == f"{first}/report.html\n"
    assert cli.main(["report", f"{first}/metrics.jsonl"]) == 0
    assert capsys.readouterr().out == f"{first}/report.html\n"
    out = tmp_path / "folder" / "one.html"
    assert cli.main(["report", first, "--out", str(out)]) == 0
    assert out.read_text() == (pair[0] / "report.html").read_text()


def test_a_page_that_cannot_be_written_is_a_sentence(pair, tmp_path):
    (tmp_path / "file").write_text("")
    for write, runs in ((write_report, pair[0]), (write_comparison, pair)):
        with pytest.raises(UserError, match=r"page\.html cannot be written .* --out"):
            write(runs, tmp_path / "file" / "page.html")


def test_a_missing_run_is_refused(pair, tmp_path, capsys):
    assert cli.main(["report", str(pair[0]), str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none'} does not exist" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "metrics.jsonl cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "comparison.html").exists()
