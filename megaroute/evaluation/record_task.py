"""ReCoRD as a task: which entity fills the gap in a query about a passage; F1 and exact match over the right ones.

The harness's own functions need a part of transformers that version 5 no longer has.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

HIGHLIGHT = "\n@highlight\n"
GAP = "@placeholder"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)

Document = Mapping[str, Any]


def text(document: Document) -> str:
    """The passage, its highlights as a list."""
    passage, *highlights = document["passage"].strip().split(HIGHLIGHT)
    return "".join([passage, "\n\n", *(f"  - {highlight}.\n" for highlight in highlights)])


def choices(document: Document) -> list[str]:
    """The query with each entity in its gap."""
    return [_filled(document, entity) for entity in document["entities"]]


def target(document: Document) -> str:
    """The query with the first right entity."""
    return _filled(document, document["answers"][0])


def _filled(document: Document, entity: str) -> str:
    return f"  - {document['query']}".replace(GAP, entity)


def prepared(dataset: Any) -> Any:
    """The data set with entities and answers sorted, each once."""
    return dataset.map(lambda document: {key: sorted(set(document[key])) for key in ("entities", "answers")})


def scores(document: Document, likelihoods: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """F1 and exact match of the likeliest entity with the right entity that it is nearest to."""
    best = max(range(len(likelihoods)), key=lambda i: likelihoods[i][0])
    guess = words(document["entities"][best])
    right = [words(answer) for answer in document["answers"]]
    return {"f1": max(f1(guess, answer) for answer in right), "em": float(guess in right)}


def words(answer: str) -> list[str]:
    """Words of an answer in lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", answer.lower().translate(_WITHOUT_PUNCTUATION)).split()


def f1(guess: Sequence[str], right: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words; 1 where both have none."""
    if not guess or not right:
        return float(guess == right)
    shared = sum((Counter(guess) & Counter(right)).values())
    return 2 * shared / (len(guess) + len(right))
