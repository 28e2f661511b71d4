"""The suite on a small model: what is asked, what is answered, and that nothing else decides the result."""

import importlib
import json
import logging
import re

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `evaluate`")

from lm_eval.tasks import TaskManager

from megaroute.common import progress
from megaroute.common.errors import DataError
from megaroute.evaluation import suite, task_list
from megaroute.evaluation.harness_model import HarnessModel, _finished

FEW = ("piqa", "winogrande", "webqs", "blimp", "lambada")


@pytest.fixture(scope="module")
def tasks(task_folder):
    manager = TaskManager(
        include_path=str(suite.FOLDER), include_defaults=False, metadata={"data_dir": str(task_folder)}
    )
    return lambda name: manager.load([f"sl24_{name}_local"])["tasks"][f"sl24_{name}_local"]


NAMED = sorted(
    {name for path in suite.FOLDER.glob("*.yaml") for name in re.findall(r"!function (\S+)", path.read_text())}
)


@pytest.mark.parametrize("name", NAMED)
def test_functions_of_the_task_files_exist(name):
    module, _, function = name.rpartition(".")
    assert callable(getattr(importlib.import_module(module), function))


class Request:
    """What the harness asks."""

    def __init__(self, *args):
        self.args = args


def test_no_document_is_its_own_example(tasks):
    task = tasks("piqa")
    documents = list(task.eval_docs)
    for document in documents:
        # Of ten draws from this pool nine would give the document itself, which need not be there only once.
        task.sampler.df = [document] * 80 + documents
        prompt = task.fewshot_context(document, 1)
        assert prompt.count(f"{document['query']}\nAnswer: {document['choices'][document['gold']]}\n") == 0
        assert task.sampler.sample(1) not in ([], [document])


def test_prompt_holds_one_other_document_with_its_answer(tasks):
    task = tasks("piqa")
    for document in task.eval_docs:
        prompt = task.fewshot_context(document, 1)
        example, asked = prompt.split("\n\n")
        assert asked == f"{document['query']}\nAnswer:"
        others = [
            f"{other['query']}\nAnswer: {other['choices'][other['gold']]}"
            for other in task.eval_docs
            if other != document
        ]
        assert example in others


def test_example_depends_on_the_document_alone(tasks):
    """The harness deals documents over ranks, and its own sampler walks along with them."""
    whole, part = tasks("piqa"), tasks("piqa")
    documents = list(whole.eval_docs)
    prompts = [whole.fewshot_context(document, 1) for document in documents]
    assert [part.fewshot_context(document, 1) for document in documents[1::3]] == prompts[1::3]
    assert [part.fewshot_context(document, 1) for document in documents[::-1]] == prompts[::-1]
    assert len({prompt.split("\n\n")[0] for prompt in prompts}) > 2


def test_pool_of_nothing_but_the_document_gives_no_example(tasks):
    task = tasks("piqa")
    document = task.eval_docs[0]
    task.sampler.df, task.sampler.document = [document, document], document
    assert task.sampler.sample(1) == []


def test_likelihood_of_an_answer_is_the_sum_over_its_tokens(scorer):
    model = HarnessModel(scorer, 4)
    context, answer = "the router", " reads"
    ((value, greedy),) = model.loglikelihood([Request(context, answer)])
    before, whole = (scorer.tokenizer.encode(text) for text in (context, context + answer))
    (plain,) = scorer.score([[scorer.tokenizer.eod, *whole]], 1)
    last = len(whole) - len(before)
    assert value == pytest.approx(-plain.nats[-last:].sum(), rel=1e-5)
    assert greedy == (plain.likeliest[-last:].tolist() == whole[-last:])
    executed = plain.executed[:, -last:].sum() / last
    assert model.layers_executed() == pytest.approx(1 + executed)
    assert model.layers_executed() is None  # nothing since


def test_progress_is_told_of_named_tasks_only(scorer, caplog, monkeypatch):
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    monkeypatch.setattr(progress, "log", logging.getLogger("progress under test"))
    model = HarnessModel(scorer, 4)
    with caplog.at_level("INFO", "progress under test"):
        model.loglikelihood([Request("the", " router")] * 3)
        assert caplog.messages == []
        model.task = "PIQA"
        model.loglikelihood([Request("the", " router")] * 3)
        model.generate_until([Request("the router", {"until": ["\n"], "max_gen_toks": 1})] * 2)
    assert caplog.messages == ["PIQA, 3 of 3 questions", "PIQA, 2 of 2 questions"]


def test_text_without_a_context_starts_after_one_end_of_document(scorer):
    ((value, _),) = HarnessModel(scorer, 1).loglikelihood([Request("", "the router")])
    ids = [scorer.tokenizer.eod, *scorer.tokenizer.encode("the router")]
    assert value == pytest.approx(-scorer.score([ids], 1)[0].nats.sum(), rel=1e-5)


def test_probability_of_a_text_is_that_of_its_parts(scorer):
    model = HarnessModel(scorer, 4)
    texts = ["the router reads every token " * 4, "a layer", ""]
    rolling = model.loglikelihood_rolling([Request(text) for text in texts])
    ids = [scorer.tokenizer.eod, *scorer.tokenizer.encode(texts[1])]
    assert rolling[1] == pytest.approx(-scorer.score([ids], 1)[0].nats.sum(), rel=1e-5)
    assert rolling[0] < rolling[1] < 0 and rolling[2] == 0


def test_context_that_is_too_long_loses_its_beginning(scorer):
    model = HarnessModel(scorer, 2)
    long = "every layer is worth its time " * 6
    ((value, _),) = model.loglikelihood([Request(long, " token")])
    whole = scorer.tokenizer.encode(long.rstrip() + "  token")
    (plain,) = scorer.score([whole[-scorer.context - 1 :]], 1)
    count = len(whole) - len(scorer.tokenizer.encode(long.rstrip()))
    assert value == pytest.approx(-plain.nats[-count:].sum(), rel=1e-5)


def test_generation_is_greedy_and_stops(scorer):
    model = HarnessModel(scorer, 3)
    settings = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0}
    contexts = ["the router", "a", "every token and decides whether"]
    answers = model.generate_until([Request(context, settings) for context in contexts])
    for context, answer in zip(contexts, answers, strict=True):
        ids = [scorer.tokenizer.eod, *scorer.tokenizer.encode(context)][-(scorer.context - 6) :]
        found = []
        for _ in range(6):
            (plain,) = scorer.score([[*(ids + found)[-scorer.context :], 0]], 1)
            found.append(int(plain.likeliest[-1]))
            if found[-1] == scorer.tokenizer.eod:
                found.pop()
                break
        assert answer == scorer.tokenizer.decode(found)
    with pytest.raises(DataError, match="asks for sampling"):
        model.generate_until([Request("a", {"do_sample": True})])


@pytest.mark.parametrize(
    "text, ended, tokens, answer",
    [
        ("abc", False, 3, None),
        ("abc", True, 3, "abc"),
        ("abc", False, 9, "abc"),
        ("ab. c\n", False, 3, "ab"),
        (".", False, 1, ""),
    ],
)
def test_end_of_an_answer(text, ended, tokens, answer):
    assert _finished(text, ended, tokens, {"until": ["\n", "."], "max_gen_toks": 9}) == answer


@pytest.fixture(scope="module")
def results(scorer, task_folder):
    chosen = task_list.choose(FEW, task_folder)
    return [suite.run(scorer, chosen, task_folder, batch=batch) for batch in (1, 7)]


def test_batch_does_not_change_a_result(results):
    one, many = results
    assert one["averages"] == many["averages"]
    for name in FEW:
        assert one["tasks"][name]["scores"] == many["tasks"][name]["scores"]
        assert one["tasks"][name]["layers_executed"] == pytest.approx(many["tasks"][name]["layers_executed"])


def test_result_says_what_it_is(results):
    found = results[0]
    assert list(found["tasks"]) == list(FEW)
    assert found["averages"]["understanding"]["tasks"] == 2 and found["averages"]["understanding"]["of"] == 21
    assert found["averages"]["generation"]["tasks"] == 1 and found["averages"]["all"]["tasks"] == 3
    assert len(found["missing"]) == 24 - 3 and found["fingerprint"] == suite.fingerprint()
    for row in found["tasks"].values():
        assert row["documents"] == 9 and 0 <= row["value"] <= 1 and 1 <= row["layers_executed"] <= 4
    json.dumps(found)


def test_accuracy_is_that_of_the_likelier_answer(scorer, task_folder, results):
    model = HarnessModel(scorer, 4)
    rows = [json.loads(line) for line in (task_folder / "blimp.jsonl").read_text().splitlines()]
    good, bad = (
        [value for value, _ in model.loglikelihood([Request("", row[key]) for row in rows])]
        for key in ("sentence_good", "sentence_bad")
    )
    expected = [float(g >= b) for g, b in zip(good, bad, strict=True)]
    assert results[0]["tasks"]["blimp"]["scores"] == expected


def test_limit_takes_documents_from_the_whole_file(scorer, task_folder, results):
    found = suite.run(scorer, task_list.choose(["blimp"], task_folder), task_folder, limit=3)
    assert found["limit"] == 3
    assert found["tasks"]["blimp"]["scores"] == results[0]["tasks"]["blimp"]["scores"][::3]
