"""Needle in a haystack: one sentence hidden in a long text, and a question about it at the end.

Easy mode hides the question together with its answer, standard mode the answer alone. Every prompt has exactly the
length of its column in tokens, question included; the needle stands after the sentence's end next before its depth.
The answer is generated greedily and judged by whether it contains the needle's phrase, whatever its wording around it,
case and punctuation: score 10, else 1. No external model is needed. Softmax models are asked beyond their training
length too, as the paper does.

The paper's needle, haystack and judge are not published; the needle here is that of the test's first implementation,
the haystack the run's own held-out text or a file, repeated where it is too short.
"""

import json
import os
import re
import string
from pathlib import Path

import numpy as np

from linscale.config import ConfigError
from linscale.evaluation import generation, needle_scores

QUESTION = "What is the best thing to do in San Francisco?"
PHRASE = "eat a sandwich and sit in Dolores Park on a sunny day"
ANSWER = f"The best thing to do in San Francisco is to {PHRASE}."
ASK = f"\n\nQuestion: {QUESTION}\nAnswer:"
NEEDLES = {"needle_standard": f" {ANSWER}", "needle_easy": f" Question: {QUESTION} Answer: {ANSWER}"}
LENGTHS = "1000:16000:35"  # the paper's columns


def task(name: str, args):
    """command.Task of one mode. Raises ConfigError for a wrong grid or a missing haystack file."""
    from linscale.evaluation.command import Task

    lengths = parse_lengths(args.needle_lengths or LENGTHS)
    if args.needle_depths < 1:
        raise ConfigError(f"--needle-depths is {args.needle_depths}; it must be positive.")
    depths = np.linspace(0, 1, args.needle_depths).tolist() if args.needle_depths > 1 else [0.5]
    haystack = read_haystack(args.haystack) if args.haystack else None
    settings = {"lengths": lengths, "depths": len(depths), "separator": args.separator}
    settings["haystack"] = "held-out" if haystack is None else Path(args.haystack).name

    def measure(lm, run, step):
        text = heldout_tokens(run) if haystack is None else lm.tokenizer.encode(haystack)
        prefix = [lm.eot_token_id] if lm.separator else []
        scores, answers = measure_grid(lm, text, NEEDLES[name], lengths, depths, prefix)
        write_grid(run.folder / "evals", f"{name}-{step}", scores, lengths, depths, f"{run.name}, step {step}")
        right = needle_scores.accuracy(scores)
        error = float(right.std(ddof=1)) / right.size**0.5 if right.size > 1 else None
        return {
            "scores": needle_scores.summary(scores, lengths),
            "errors": {} if error is None else {"accuracy": error},
            "documents": right.size,
            "samples": answers,
        }

    return Task(name, settings, measure)


def parse_lengths(text: str) -> list[int]:
    """'1000:16000:35' -> 35 lengths, evenly spaced and rounded down as in the paper's figures. Raises ConfigError."""
    try:
        first, last, count = map(int, text.split(":"))
    except ValueError:
        first, last, count = 0, 0, 0
    if not (1 <= first <= last and count >= 1 and (count > 1 or first == last)):
        raise ConfigError(f"--needle-lengths is {text!r}; it must be FROM:TO:COUNT in tokens, as {LENGTHS}.")
    return sorted(set(np.linspace(first, last, count).astype(int).tolist()))


def read_haystack(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error.reason
        raise ConfigError(
            f"--haystack is {path}, which cannot be read as text ({reason}); name one UTF-8 file, as the essays that "
            "github.com/gkamradt/LLMTest_NeedleInAHaystack uses, joined; or leave it out for the run's held-out text."
        ) from error
    if not text.strip():
        raise ConfigError(f"--haystack is {path}, which is empty; name a file of text.")
    return text


def heldout_tokens(run) -> np.ndarray:
    """The held-out tokens of the run's corpus. Raises ConfigError where its data are not there any more."""
    from linscale.data import prepare

    try:
        return np.asarray(prepare(run.config.data, run.config.model.vocab_size, log=lambda _: None).heldout.tokens)
    except ConfigError as error:
        raise ConfigError(f"the run's held-out text is needed, but {error}") from error


def prompt(haystack, needle, ask, length: int, depth: float, ends: set[int], prefix=()) -> list[int]:
    """Token ids: prefix, haystack with the needle at `depth` (0 to 1), then the question; `length` of them.

    ends: the tokens after which a needle may stand. Raises ConfigError if needle and question do not fit.
    """
    room = length - len(needle) - len(ask) - len(prefix)
    if room < 0:
        raise ConfigError(
            f"a prompt of {length} tokens does not hold needle and question, {length - room} tokens with this "
            "tokenizer; begin --needle-lengths higher."
        )
    text = np.resize(np.asarray(haystack), room).tolist()
    place = round(depth * room)
    if place < room:
        before = next((i for i in range(place, 0, -1) if text[i - 1] in ends), 0)
        place = before or place
    return [*prefix, *text[:place], *needle, *text[place:], *ask]


def sentence_ends(tokenizer, tokens) -> set[int]:
    """The ids among `tokens` that end a sentence or a line."""
    ids = np.unique(tokens).tolist()
    return {i for i in ids if re.search(r"[.!?][\"')]*\s*$|\n$", tokenizer.decode([i]))}


def judge(text: str, phrase: str = PHRASE) -> int:
    """10 if the phrase is in the text, 1 if not; case, punctuation and spacing do not count."""
    return 10 if f" {_plain(phrase)} " in f" {_plain(text)} " else 1


def _plain(text: str) -> str:
    return " ".join("".join(c for c in text.lower() if c not in string.punctuation).split())


def measure_grid(lm, haystack, needle: str, lengths, depths, prefix=()) -> tuple[np.ndarray, list[dict]]:
    """(scores [depths, lengths], the answers)."""
    scorer, tokenizer = lm.scorer, lm.tokenizer
    hidden, ask = tokenizer.encode(needle).tolist(), tokenizer.encode(ASK).tolist()
    most = len(tokenizer.encode(f" {ANSWER}")) + 8
    ends = sentence_ends(tokenizer, haystack)
    prompt(haystack, hidden, ask, lengths[0], 0.0, ends, prefix)  # refused before any compile
    scores = np.ones((len(depths), len(lengths)))
    answers = []
    for column, length in enumerate(lengths):
        prompts = [prompt(haystack, hidden, ask, length, depth, ends, prefix) for depth in depths]
        rows = min(len(prompts), max(1, scorer.budget // (length + most)))
        for at in range(0, len(prompts), rows):
            some = prompts[at : at + rows]
            filled = some + [some[-1]] * (rows - len(some))  # one shape a column
            texts = generation.generate(scorer.model, scorer.params, tokenizer, filled, most=most, end=lm.eot_token_id)
            for row, text in enumerate(texts[: len(some)], at):
                scores[row, column] = judge(text)
                answers.append({"length": length, "depth": depths[row], "score": scores[row, column], "answer": text})
    return scores, answers


def write_grid(folder: Path, name: str, scores, lengths, depths, title: str) -> None:
    """NAME.json with the grid and NAME.png, its heat map, in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"lengths": lengths, "depths": depths, "scores": np.asarray(scores).tolist()}
    part = folder / f".{name}.tmp"
    part.write_text(json.dumps(content))
    os.replace(part, folder / f"{name}.json")
    heat_map(folder / f"{name}.png", scores, lengths, depths, title)


def heat_map(path: Path, scores, lengths, depths, title: str) -> None:
    """Lengths across, depths down, red where the needle was missed and green where it was found."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(scores, vmin=1, vmax=10, cmap="RdYlGn", aspect="auto", interpolation="nearest")
    for axis, values, form in ((axes.xaxis, lengths, "{:,.0f}"), (axes.yaxis, [100 * d for d in depths], "{:.0f}")):
        every = max(1, -(-len(values) // 18))
        axis.set_ticks(range(0, len(values), every), [form.format(v) for v in values[::every]])
    axes.tick_params(axis="x", rotation=60)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("depth of the needle, %")
    axes.set_title(title)
    figure.colorbar(image, label="score")
    FigureCanvasAgg(figure).print_png(path)
