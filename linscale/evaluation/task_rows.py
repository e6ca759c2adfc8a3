"""Rows of the paper's tasks, from the fields in which their data sets are published.

Each function takes one row of a file and returns {query, choices, gold} with the harness's prompt in `query`, or None
where the row has none of the fields it knows. Besides the original fields, every multiple-choice task is read from
{query, choices, gold or label} as prepared by llm-foundry and others.
"""

import re


def hellaswag(row: dict) -> dict | None:
    if "ctx_a" in row:
        query = row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize()
        return _choices(_untag(query), map(_untag, row["endings"]), int(row["label"]))
    if "query" in row:  # the context as published, before capitalising its last sentence
        return _choices(_untag(row["query"]), map(_untag, row["choices"]), _gold(row))
    return None


def piqa(row: dict) -> dict | None:
    if "goal" in row:
        return _choices(_question(row["goal"]), [row["sol1"], row["sol2"]], int(row["label"]))
    if "query" in row:
        return _choices(
            _question(row["query"].removeprefix("Question: ").removesuffix("\n")), row["choices"], _gold(row)
        )
    return None


def arc(row: dict) -> dict | None:
    if "answerKey" in row:
        stem, choices, gold = _stem_choices_gold(row)
        return _choices(_question(stem), choices, gold)
    if "query" in row:
        return _choices(_question(row["query"].removeprefix("Question: ")), row["choices"], _gold(row))
    return None


def openbookqa(row: dict) -> dict | None:
    if "answerKey" in row:
        return _choices(*_stem_choices_gold(row))
    if "query" in row:
        return _choices(row["query"], row["choices"], _gold(row))
    return None


def boolq(row: dict) -> dict | None:
    if "passage" in row:
        passage, question = row["passage"], row["question"].removesuffix("?")
        gold = row["label"] if "label" in row else row["answer"]
    elif "query" in row:
        passage, _, question = row["query"].removeprefix("Passage: ").rpartition("\nQuestion: ")
        question, gold = question.removesuffix("?"), _gold(row)
    else:
        return None
    return _choices(f"{passage}\nQuestion: {question}?\nAnswer:", ["no", "yes"], int(gold))


def winogrande(row: dict) -> dict | None:
    """{contexts, ending, gold}: the ending is scored after either context."""
    if "sentence" in row:
        before, after = row["sentence"].split("_", 1)
        contexts = [before + row["option1"], before + row["option2"]]
        return {"contexts": contexts, "ending": after.strip(), "gold": int(row["answer"]) - 1}
    if "context_options" in row:
        return {"contexts": row["context_options"], "ending": row["continuation"], "gold": int(row["gold"])}
    return None


def lambada(row: dict) -> dict | None:
    return {"text": row["text"]} if "text" in row else None


def wikitext(row: dict) -> dict | None:
    page = row.get("page", row.get("text"))
    return None if page is None else {"page": page}


def _choices(query: str, choices, gold: int) -> dict:
    return {"query": query, "choices": list(choices), "gold": gold}


def _gold(row: dict) -> int:
    return int(row["gold"] if "gold" in row else row["label"])


def _question(text: str) -> str:
    return f"Question: {text}\nAnswer:"


def _stem_choices_gold(row: dict) -> tuple[str, list[str], int]:
    """Of ARC and OpenBookQA: columns as on the hub, or the nested objects of the original files."""
    question = row.get("question_stem", row.get("question"))
    if isinstance(question, dict):
        labels = [choice["label"] for choice in question["choices"]]
        return question["stem"], [c["text"] for c in question["choices"]], labels.index(row["answerKey"].strip())
    choices = row["choices"]
    return question, list(choices["text"]), list(choices["label"]).index(row["answerKey"].strip())


def _untag(text: str) -> str:
    """Removes what WikiHow left in HellaSwag: [title], [step] and the like."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
