"""The shipped tasks ask what the harness's own definitions ask, from the same rows; and their standard errors."""

import math
from pathlib import Path

import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval")
datasets = pytest.importorskip("datasets")

from linscale.evaluation import task_rows, tasks  # noqa: E402

FOLDER = Path(lm_eval.__file__).parent / "tasks"
FILES = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "wikitext": "wikitext/wikitext.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
}
CHOICES = {"text": ["a stone", "the sun", "a lamp", "snow"], "label": ["A", "B", "C", "D"]}
PUBLISHED = {  # rows with the fields of the published data sets
    "boolq": [{"passage": "Ice is cold.", "question": "is ice cold", "label": 1, "idx": 0}],
    "piqa": [{"goal": "Open the tin", "sol1": "Pull the ring.", "sol2": "Ask  it.", "label": 0}],
    "hellaswag": [
        {
            "ind": 4,
            "activity_label": "Baking",
            "ctx_a": "[header] How to bake [title] Mix the flour.",
            "ctx_b": "then she",
            "ctx": "[header] How to bake [title] Mix the flour. then she",
            "endings": ["[step] bakes  it.", "sings.", "runs to the  sea.", "is an oven."],
            "label": "0",
        }
    ],
    "winogrande": [
        {"sentence": "The cup hit the jug so _ broke.", "option1": "the cup", "option2": "the jug", "answer": "2"}
    ],
    "arc_easy": [
        {"question": "What warms the earth?", "choices": CHOICES, "answerKey": "B", "id": "q"},
        {"question": "Which?", "choices": CHOICES | {"label": ["1", "2", "3", "4"]}, "answerKey": "4", "id": "r"},
    ],
    "openbookqa": [{"question_stem": "The earth is warmed by", "choices": CHOICES, "answerKey": "B", "id": "q"}],
    "wikitext": [{"page": " = Cats = \n A cat 's tail is 1 @,@ 000 mm long ( or so ) ; it ' purrs ' \n"}],
    "lambada_openai": [{"text": "It rained all day  and then it rained"}],
}


@pytest.mark.parametrize("name", FILES)
def test_requests_are_those_of_the_harness(name):
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = dict(load_yaml(FOLDER / FILES[name], resolve_func=True))
    split = config.get("test_split") or config["validation_split"]
    config = {k: v for k, v in config.items() if k not in ("dataset_path", "dataset_name", "tag", "training_split")}
    config |= {"custom_dataset": lambda **_: {split: datasets.Dataset.from_list(PUBLISHED[name])}}
    for other in {"test_split", "validation_split"}:
        config[other] = split if config.get(other) == split else None
    theirs = ConfigurableTask(config=config)
    rows = [getattr(task_rows, tasks.TASKS[name].rows.__name__)(row) for row in PUBLISHED[name]]
    ours = tasks._build(name, rows)
    for task in (theirs, ours):
        task.build_all_requests(limit=None, rank=0, world_size=1)
    asked = [[(r.request_type, r.args, r.idx, r.doc_id) for r in task.instances] for task in (theirs, ours)]
    assert asked[0] == asked[1] and asked[0]
    answers = [
        (-float(n), n % 2 == 0) if "rolling" not in r.request_type else -30.0 for n, r in enumerate(ours.instances)
    ]
    for n, row in enumerate(rows):
        mine = [a for a, r in zip(answers, ours.instances) if r.doc_id == n]
        found = [
            {k: v for k, v in task.process_results(doc, mine).items() if k in tasks.TASKS[name].metrics}
            for task, doc in ((theirs, list(theirs.eval_docs)[n]), (ours, row))
        ]
        assert found[0] == found[1] and set(found[0]) == set(tasks.TASKS[name].metrics)


def test_prepared_rows_ask_the_same():
    """llm-foundry's rows and the published ones of one question."""
    published = PUBLISHED["boolq"][0]
    prepared = {"query": "Passage: Ice is cold.\nQuestion: is ice cold?\n", "choices": ["no", "yes"], "gold": 1}
    assert task_rows.boolq(published)["query"] == "Ice is cold.\nQuestion: is ice cold?\nAnswer:"
    assert task_rows.boolq(prepared | {"query": prepared["query"].rstrip("\n")}) == task_rows.boolq(published)
    assert task_rows.piqa(
        {"query": "Question: Open the tin\n", "choices": ["Pull the ring.", "Ask  it."], "gold": 0}
    ) == (task_rows.piqa(PUBLISHED["piqa"][0]))
    arc = {"query": "Question: What warms the earth?", "choices": CHOICES["text"], "gold": 1}
    assert task_rows.arc(arc) == task_rows.arc(PUBLISHED["arc_easy"][0])


def test_standard_errors_are_those_of_resampling():
    rng = np.random.default_rng(3)
    right = [{"acc": float(x)} for x in rng.random(400) < 0.3]
    assert tasks.standard_error("acc", 0.3, right) == pytest.approx(math.sqrt(0.21 / 400), rel=0.1)
    words = rng.integers(50, 500, size=80)
    nats = -words * (2 + 0.3 * rng.standard_normal(80))
    score = math.exp(-nats.sum() / words.sum())
    samples = [{"word_perplexity": (float(a), int(b))} for a, b in zip(nats, words)]
    drawn = [rng.integers(80, size=80) for _ in range(2000)]
    resampled = np.std([math.exp(-nats[i].sum() / words[i].sum()) for i in drawn])
    assert tasks.standard_error("word_perplexity", score, samples) == pytest.approx(resampled, rel=0.15)
    single = [{"perplexity": float(x)} for x in nats / words]
    resampled = np.std([math.exp(-(nats / words)[i].mean()) for i in drawn])
    score = math.exp(-(nats / words).mean())
    assert tasks.standard_error("perplexity", score, single) == pytest.approx(resampled, rel=0.15)
