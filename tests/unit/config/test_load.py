"""Reading configurations: merging, round trips, and what is said about bad input."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaroute.common.errors import ConfigError
from megaroute.config.load import config_schema, dump_config, load_config


def test_overrides_replace_scalars_and_lists_and_merge_mappings(small):
    config = small("routing.budget={weight: 0.2}", "routing.layers=[2, 5]", "routing.layers=[3]", "train.steps=20")
    assert config.routing.budget.weight == 0.2
    assert config.routing.budget.estimator == "global"
    assert config.routing.layers == (3,)
    assert config.train.steps == 20


@pytest.mark.parametrize("text, value", [("1e-4", 1e-4), ("2E-3", 2e-3), ("1.5e-4", 1.5e-4), ("1", 1.0)])
def test_numbers_with_exponents_are_numbers(small, text, value):
    assert small(f"optim.lr={text}").optim.lr == value


def test_integer_may_be_written_with_an_exponent(small):
    assert small("train.steps=1e5").train.steps == 100_000


def test_nothing_after_the_equals_sign_is_null(small):
    assert small("data.valid=").data.valid is None


def test_file_extends_another_relative_to_itself(tmp_path, small_file, monkeypatch):
    (tmp_path / "sub").mkdir()
    child = tmp_path / "sub" / "child.yaml"
    child.write_text("extends: ../small.yaml\nrun: {name: child}\noptim: {lr: 1e-4}\n")
    monkeypatch.chdir(tmp_path / "sub")
    config = load_config(child, ["optim.lr=2e-4"])
    assert config.run.name == "child"
    assert config.model.num_layers == 8
    assert config.optim.lr == 2e-4


def test_second_level_of_extends_is_refused(tmp_path, small_file):
    (tmp_path / "child.yaml").write_text("extends: small.yaml\n")
    (tmp_path / "grandchild.yaml").write_text("extends: child.yaml\n")
    with pytest.raises(ConfigError, match=r"grandchild.yaml extends .*child.yaml, which itself extends small.yaml"):
        load_config(tmp_path / "grandchild.yaml")


def test_extended_file_that_is_missing_is_named_with_the_one_that_wants_it(tmp_path):
    (tmp_path / "child.yaml").write_text("extends: nowhere.yaml\n")
    with pytest.raises(ConfigError, match=r"nowhere.yaml \(extended by .*child.yaml\) cannot be read: No such file"):
        load_config(tmp_path / "child.yaml")


@pytest.mark.parametrize(
    "key, suggestion",
    [
        ("model.sequence_length", "did you mean data.sequence_length?"),
        ("train.microbatch", "did you mean train.micro_batch?"),
        ("trian", "did you mean train?"),
        ("seed", "did you mean data.seed or train.seed?"),
        ("routing.budget.wieght", "did you mean routing.budget.weight?"),
        ("optim.micro_batches", "did you mean train.micro_batch?"),
        ("model.hidden_size.x", "model.hidden_size takes a plain value"),
        ("routing.dispatch.zzz", "routing.dispatch has: mode"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_right_one(small, key, suggestion):
    with pytest.raises(ConfigError) as refused:
        small(f"{key}=1")
    assert str(refused.value).startswith(f"{key} (on the command line) is not a configuration key; ")
    assert suggestion in str(refused.value)


def test_unknown_key_of_the_extended_file_names_that_file(tmp_path):
    (tmp_path / "parent.yaml").write_text("run: {nmae: x}\n")
    (tmp_path / "child.yaml").write_text("extends: parent.yaml\nrun: {name: y}\n")
    with pytest.raises(ConfigError, match=r"run.nmae \(in .*parent.yaml\)"):
        load_config(tmp_path / "child.yaml")


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("train.steps=many", "train.steps is 'many' (on the command line), must be an integer"),
        ("train.steps=0", "train.steps is 0 (on the command line), must be greater than 0"),
        ("train.steps=true", "train.steps (on the command line): true is not a value for this key"),
        ("train.steps=1.5", "train.steps is 1.5 (on the command line), must be an integer"),
        ("optim.lr=.nan", "optim.lr is nan (on the command line), must be"),
        ("parallel.data=some", "parallel.data is 'some' (on the command line), must be an integer or 'auto'"),
        ("run.device=tpu", "run.device is 'tpu' (on the command line), must be 'auto', 'cpu' or 'cuda'"),
        ("run.name=7", "run.name is 7 (on the command line), must be a string; put it in quotes"),
        ("run.directory=a/{date}", "run.directory (on the command line): 'a/{date}' has braces other than {name}"),
        ("routing.layers=[1, x]", "routing.layers.1 is 'x' (on the command line), must be an integer"),
        ("routing.layers=3", "routing.layers is 3 (on the command line), must be a list"),
        ("routing=", "routing is empty (on the command line), must be a mapping of keys"),
        ("model.num_attention_heads=7", "model (on the command line): hidden_size 64 % num_attention_heads 7 = 1"),
        ("train.rampup.start=3", "train.rampup.increment is missing in"),
        ("train.steps", "'train.steps' on the command line is not an override; write section.key=value"),
        ("train..steps=1", "'train..steps=1' on the command line is not an override"),
        ("routing.layers=[1", "routing.layers on the command line: '[1' is not a YAML value"),
    ],
)
def test_bad_value_is_named_with_its_key_and_what_was_expected(small, override, sentence):
    with pytest.raises(ConfigError) as refused:
        small(override)
    assert sentence in str(refused.value).splitlines()[0]


def test_every_problem_has_its_line(small):
    with pytest.raises(ConfigError) as refused:
        small("train.steps=x", "checkpoint.keep=0", "model.num_layers=-1")
    lines = str(refused.value).splitlines()
    assert [line.split(" is ")[0] for line in lines] == ["model.num_layers", "train.steps", "checkpoint.keep"]


def test_every_unknown_key_has_its_line(tmp_path):
    (tmp_path / "run.yaml").write_text("run: {nmae: x}\ntrian: {}\n")
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "run.yaml")
    assert [line.split()[0] for line in str(refused.value).splitlines()] == ["run.nmae", "trian"]


def test_bad_value_names_the_file_it_stands_in(tmp_path, small_file):
    (tmp_path / "child.yaml").write_text("extends: small.yaml\ntrain: {steps: -2}\n")
    with pytest.raises(ConfigError, match=r"train.steps is -2 \(in .*child.yaml\)"):
        load_config(tmp_path / "child.yaml", ["train.seed=3"])


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("", "is empty; it needs at least"),
        ("- a\n- b\n", "holds a list, must be a mapping"),
        ("run: {name: [}", "is not valid YAML"),
        ("run: {name: a}\nrun: {name: b}\n", "key 'run' appears twice at line 2, column 1"),
        ("run: {name: a, name: b}\n", "key 'name' appears twice"),
        ("extends: [a, b]\n", r"extends is \['a', 'b'\], must be one path"),
        ("run: !!python/object/apply:os.system [ls]\n", "is not valid YAML"),
        ("run: {name: a}\n", "model is missing in"),
        ("1: x\n", r"1 \(in .*\) is not a configuration key"),
    ],
)
def test_bad_file_is_named(tmp_path, content, sentence):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=sentence) as refused:
        load_config(path)
    assert "bad.yaml" in str(refused.value)


@pytest.mark.parametrize("path, reason", [("none.yaml", "No such file"), (".", "Is a directory")])
def test_file_that_cannot_be_read_is_named(tmp_path, path, reason):
    with pytest.raises(ConfigError, match=f"cannot be read: {reason}"):
        load_config(tmp_path / path)


def test_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bad.yaml is not valid YAML"):
        load_config(tmp_path / "bad.yaml")


positive = st.floats(min_value=1e-300, max_value=1e300)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    lr=positive,
    density=st.floats(min_value=0, max_value=1, exclude_min=True),
    layers=st.none() | st.lists(st.integers(0, 100), max_size=5),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True),
    text=st.text(st.characters(exclude_characters="{}", exclude_categories=["Cs", "Cc"]), min_size=1),
)
def test_dump_loads_back_equal(small, tmp_path, lr, density, layers, name, text):
    config = small()
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"name": name, "directory": text}),
            "optim": config.optim.model_copy(update={"lr": lr}),
            "routing": config.routing.model_copy(
                update={"density": density, "layers": None if layers is None else tuple(layers)}
            ),
        }
    )
    (tmp_path / "dump.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dump.yaml") == config


def test_dump_shows_every_key(small):
    assert "norm_eps: 1.0e-05" in dump_config(small())
    assert "trace_samples: 4" in dump_config(small())


def test_schema_documents_keys_and_allows_extends():
    schema = json.loads(json.dumps(config_schema()))
    assert "extends" in schema["properties"]
    density = schema["$defs"]["RoutingConfig"]["properties"]["density"]
    assert density["description"].startswith("Target share P of tokens")
    assert density["maximum"] == 1
    assert math.isclose(density["default"], 0.5)
