"""SCROLLS (arXiv 2201.03533) in the harness, from local files: the same prompts as the harness's own tasks, which need a
network for their metric.

A file is that of the benchmark: JSON lines with id, pid, input, output; rows of one id are the references of one
question. Scores are percentages: ROUGE-1, -2, -L (F measure, stemmed), F1 of words, exact match of the chosen answer,
each the best over the references. As in the paper, zero-shot and greedy, and prompts lose their left beyond the
training context (adapter.LinscaleLM, `read`). The average counts the nine ROUGE numbers and the four others alike.
"""

import collections
import dataclasses
import re
import string
from pathlib import Path

from linscale.config import ConfigError

_ORIGIN = "huggingface.co/datasets/tau/scrolls, {}.zip (validation.jsonl in it)"
_ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclasses.dataclass(frozen=True)
class Task:
    folder: str  # as in the benchmark's archives
    metrics: tuple[str, ...]
    generate: int = 256  # tokens at most; the harness's default

    @property
    def files(self) -> tuple[str, ...]:
        return (f"{self.folder}/validation.jsonl", f"scrolls_{self.folder}.jsonl", f"{self.folder}/val.jsonl")

    @property
    def origin(self) -> str:
        return _ORIGIN.format(self.folder)


TASKS = {
    "scrolls_govreport": Task("gov_report", _ROUGE),
    "scrolls_summscreenfd": Task("summ_screen_fd", _ROUGE),
    "scrolls_qmsum": Task("qmsum", _ROUGE),
    "scrolls_qasper": Task("qasper", ("f1",)),
    "scrolls_narrativeqa": Task("narrative_qa", ("f1",)),
    "scrolls_quality": Task("quality", ("em",)),
    "scrolls_contractnli": Task("contract_nli", ("em",)),
}
_VERDICTS = ["Not mentioned", "Entailment", "Contradiction"]


def build(name: str, path: Path, limit: int | None):
    """The harness's task object. Raises ConfigError where the file is not SCROLLS's (or, for QMSum, its authors')."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    rows = documents(name, path, limit)
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in TASKS[name].metrics]
    config = {
        "task": name,
        "custom_dataset": lambda **_: {"validation": datasets.Dataset.from_list(rows)},
        "validation_split": "validation",
        "num_fewshot": 0,
        "metadata": {"version": 2},
        "doc_to_text": "{{prompt}}",
        "metric_list": metrics,
    }
    if TASKS[name].metrics == ("em",):
        config |= {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
        config["process_results"] = _exact_match
    else:
        config |= {"output_type": "generate_until", "doc_to_target": "{{outputs[0]}}"}
        config["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": TASKS[name].generate, "do_sample": False}
        config["process_results"] = _rouge if TASKS[name].metrics == _ROUGE else _f1
    return (_qasper() if name == "scrolls_qasper" else ConfigurableTask)(config=config)


def _qasper():
    """A question whose answers all are yes or no is not generated: the likelier of the two counts."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask

    class Qasper(ConfigurableTask):
        def construct_requests(self, doc, ctx, chat_template=None, apply_chat_template=False, **kwargs):
            if {" ".join(_words(output)) for output in doc["outputs"]} - {"yes", "no"}:
                return super().construct_requests(doc, ctx, **kwargs)
            return [
                Instance(request_type="loglikelihood", doc=doc, arguments=(ctx, answer), idx=n, **kwargs)
                for n, answer in enumerate((" yes", " no"))
            ]

    return Qasper


def documents(name: str, path: Path, limit: int | None = None) -> list[dict]:
    """{prompt, outputs} of each question, with {choices, gold} where the answer is chosen."""
    from linscale.evaluation.tasks import read_rows

    references = collections.defaultdict(list)
    inputs = {}
    for number, row in enumerate(_benchmark_rows(read_rows(path)), 1):
        if not {"id", "input", "output"} <= row.keys():
            raise ConfigError(
                f"{path} row {number} has the fields {', '.join(sorted(row))}; a SCROLLS file has id, pid, input and "
                f"output, and comes from {TASKS[name].origin}."
            )
        inputs.setdefault(row["id"], row["input"])
        references[row["id"]].append(row["output"])
    ids = list(inputs)[:limit]
    return [_document(name, inputs[i], references[i]) for i in ids]


def _document(name: str, text: str, outputs: list[str]) -> dict:
    if name in ("scrolls_govreport", "scrolls_summscreenfd"):
        return {"prompt": f"{text}\n\nQuestion: What is a summary of the preceding text?\nAnswer:", "outputs": outputs}
    question, _, text = text.partition("\n\n")
    if name == "scrolls_contractnli":
        prompt = f"{text}\n\nHypothesis: {question}\nConclusion:"
        return {"prompt": prompt, "outputs": outputs, "choices": _VERDICTS, "gold": _VERDICTS.index(outputs[0])}
    if name == "scrolls_quality":  # the four choices stand before the text
        end = text.find("\n\n", text.find("(D)"))
        choices = [" ".join(choice.split()) for choice in re.split(r" *\([A-D]\) *", text[:end])[1:]]
        gold = choices.index(" ".join(outputs[0].split()))
        prompt = f"{text[end:].strip()}\n\nQuestion: {question}\nAnswer:"
        return {"prompt": prompt, "outputs": outputs, "choices": choices, "gold": gold}
    return {"prompt": f"{text}\n\nQuestion: {question}\nAnswer:", "outputs": outputs}


def _benchmark_rows(rows: list[dict]):
    """SCROLLS rows as they are; meetings of the QMSum authors' files as SCROLLS has them."""
    for n, row in enumerate(rows):
        if "meeting_transcripts" not in row:
            yield row
            continue
        transcript = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in row["meeting_transcripts"])
        queries = [*row["general_query_list"], *row["specific_query_list"]]
        for q, query in enumerate(queries):
            yield {"id": f"{n}-{q}", "input": f"{query['query']}\n\n{transcript}", "output": query["answer"]}


def _rouge(doc: dict, results: list) -> dict:
    return rouge(results[0], doc["outputs"])


def _f1(doc: dict, results: list) -> dict:
    if len(results) == 2:  # the likelihoods of yes and no
        prediction = "yes" if results[0] > results[1] else "no"
    else:
        prediction = results[0] if results[0].strip() else "Unanswerable"
    return {"f1": 100 * max(word_f1(prediction, reference) for reference in doc["outputs"])}


def _exact_match(doc: dict, results: list) -> dict:
    """The choice of the highest log-likelihood a character, as the harness scores these two tasks."""
    per_character = [score / len(choice) for (score, _), choice in zip(results, doc["choices"])]
    return {"em": 100.0 * (per_character.index(max(per_character)) == doc["gold"])}


def rouge(prediction: str, references: list[str]) -> dict[str, float]:
    """Percent, the best over the references."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(_ROUGE, use_stemmer=True)
    scores = [scorer.score(reference, prediction) for reference in references]
    return {kind: 100 * max(score[kind].fmeasure for score in scores) for kind in _ROUGE}


def word_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, as SQuAD counts: no case, punctuation or articles."""
    a, b = _words(prediction), _words(reference)
    common = sum((collections.Counter(a) & collections.Counter(b)).values())
    if not common:
        return float(a == b)
    return 2 * common / (len(a) + len(b))


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def average(scores: dict[str, dict]) -> float | None:
    """The paper's SCROLLS figure: the mean of all numbers of the tasks that ran; None if none did."""
    numbers = [scores[name][metric] for name, task in TASKS.items() if name in scores for metric in task.metrics]
    return sum(numbers) / len(numbers) if numbers else None
