"""The same model scored by lm-evaluation-harness' own HFLM (PyTorch) and by linscale's adapter: request by request.

  python experiments/evaluation/parity.py RUN --data-dir DIR --limit 200 --out parity.json

RUN is a LLaMA that linscale trained. It is exported, HFLM loads the export, and both answer the same requests of the
paper's tasks on the CPU with the same number of threads. Prints a table: the largest difference of a log-likelihood,
greedy flags that differ, scores, and seconds (wall and processor) of both. "again" is a second pass over the same
requests, after everything has been compiled. With --float64 HFLM answers once more, its float32 logits taken to
log-likelihoods and summed in float64 (softmax_dtype), and the distance of both from that is told, instead of "again".

Needs torch, transformers and lm-eval.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")


def answers(lm, task, limit):
    """({task: what tasks.run gives}, wall seconds, processor seconds of all threads)"""
    from linscale.evaluation import tasks

    wall, processor = time.perf_counter(), time.process_time()
    result = tasks.run(lm, [task], limit)[task.config.task]
    return result, time.perf_counter() - wall, time.process_time() - processor


def numbers(result) -> list[tuple[float, bool | None]]:
    """(log-likelihood, greedy flag) of every request, in order; no flag for whole documents."""
    out = []
    for sample in result["samples"]:
        for request in sample["resps"]:
            answer = request[0]
            out.append((answer, None) if isinstance(answer, float) else (answer[0], bool(answer[1])))
    return out


class Own:
    """Requests made of the models' own greedy next token (more would be tokenised anew) after the beginnings of documents, so that greedy flags are true in
    many, and of the text of other documents. Behaves as tasks.run's result."""

    def __init__(self, documents: list[str]):
        self.contexts = [" ".join(text.split()[:40]) for text in documents]

    def texts(self, lm) -> list[str]:
        options = {"until": ["<never>"], "max_gen_toks": 1, "do_sample": False}
        return lm.generate_until([_instance("generate_until", (c, options)) for c in self.contexts])

    def score(self, lm, texts) -> dict:
        pairs = [
            (c, t) for c, mine, other in zip(self.contexts, texts, texts[1:] + texts[:1]) for t in (mine, other) if t
        ]
        found = lm.loglikelihood([_instance("loglikelihood", pair) for pair in pairs])
        return {"documents": len(self.contexts), "scores": {}, "samples": [{"resps": [[answer]]} for answer in found]}


def _instance(kind, arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


def compare(name, ours, theirs) -> dict:
    a, b = numbers(ours), numbers(theirs)
    assert len(a) == len(b), (name, len(a), len(b))
    apart = [abs(x - y) for (x, _), (y, _) in zip(a, b)]
    size = [abs(y) for y, _ in b]
    return {
        "task": name,
        "documents": ours["documents"],
        "requests": len(a),
        "largest_difference": max(apart),
        "its_relative_size": max(d / max(s, 1e-9) for d, s in zip(apart, size)),
        "greedy": sum(bool(g) for _, g in b),
        "greedy_differ": sum(x != y for (_, x), (_, y) in zip(a, b)),
        "scores_ours": ours["scores"],
        "scores_theirs": theirs["scores"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--step", type=int)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--tasks", default="")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--hf-batch", type=int, default=8)
    parser.add_argument("--float64", action="store_true", help="tell how far both are from sums in float64")
    parser.add_argument("--out", default="parity.json")
    args = parser.parse_args()

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # both libraries count the processors
    import torch

    torch.set_num_threads(args.threads)
    import jax
    import lm_eval
    import transformers
    from lm_eval.models.huggingface import HFLM

    from linscale.evaluation import runs, tasks
    from linscale.evaluation.adapter import LinscaleLM
    from linscale.evaluation.scoring import Scorer
    from linscale.interop import exporting

    run = runs.open_run(args.run)
    step = run.step(args.step)
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "model"
        print(exporting.export(Path(args.run), exported, step), flush=True)
        theirs = HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=args.hf_batch)
    ours = LinscaleLM(Scorer(run.config.model, run.params(step), run.context), run.tokenizer)

    names = [name for name in args.tasks.split(",") if name] or list(tasks.PAPER)
    rows, versions = [], {m.__name__: m.__version__ for m in (jax, torch, transformers, lm_eval)}

    def save():
        text = {"settings": vars(args) | {"step": step}, "versions": versions, "rows": rows}
        Path(args.out).write_text(json.dumps(text, indent=1) + "\n")

    for task in tasks.load(names, args.data_dir, args.limit):
        got, wall, processor = answers(ours, task, args.limit)
        want, their_wall, their_processor = answers(theirs, task, args.limit)
        row = compare(task.config.task, got, want)
        if args.float64:
            theirs.softmax_dtype = torch.float64
            exact, again, again_processor = answers(theirs, task, args.limit)
            theirs.softmax_dtype = None
            apart = [compare("", one, exact)["largest_difference"] for one in (got, want)]
            row["from_float64"] = dict(zip(("ours", "HFLM"), apart))
            print(f"from HFLM's logits summed in float64: {row['from_float64']}", flush=True)
        else:
            _, again, again_processor = answers(ours, task, args.limit)
        row |= {"wall": [wall, again, their_wall], "processor": [processor, again_processor, their_processor]}
        rows.append(row)
        print(line(row), flush=True)
        save()
    if "lambada_openai" in names:
        path = tasks.file_of("lambada_openai", args.data_dir)
        own = Own([row["text"] for row in tasks.read_rows(path, 64)])
        texts, their_texts = own.texts(ours), own.texts(theirs)
        row = compare("own greedy text", own.score(ours, texts), own.score(theirs, texts))
        row["scores_ours"] = {"same text": sum(a == b for a, b in zip(texts, their_texts))}
        rows.append(row | {"wall": [0.0] * 3, "processor": [0.0] * 3})
        print(line(rows[-1]), flush=True)
        save()
    print(table(rows))


def line(row) -> str:
    scores = "  ".join(
        f"{metric} {value:.6g} / {row['scores_theirs'].get(metric, float('nan')):.6g}"
        for metric, value in row["scores_ours"].items()
    )
    walls, processors = (" / ".join(f"{x:.1f}" for x in row[key]) for key in ("wall", "processor"))
    return (
        f"{row['task']}: {row['requests']} requests, apart at most {row['largest_difference']:.2e} nats, greedy "
        f"{row['greedy']}, {row['greedy_differ']} differ; {scores}; wall {walls} s, processor {processors} s"
    )


def table(rows) -> str:
    """Markdown."""
    out = [
        "| task | documents | requests | largest difference, nats | relative | greedy, differing | scores ours | scores "
        "HFLM | s ours, again, HFLM | processor s ours, again, HFLM |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        scores = [", ".join(f"{k} {v:.6g}" for k, v in row[key].items()) for key in ("scores_ours", "scores_theirs")]
        times = [", ".join(f"{x:.1f}" for x in row[key]) for key in ("wall", "processor")]
        out.append(
            f"| {row['task']} | {row['documents']} | {row['requests']} | {row['largest_difference']:.1e} | "
            f"{row['its_relative_size']:.1e} | {row['greedy']}, {row['greedy_differ']} | {' | '.join(scores)} | "
            f"{' | '.join(times)} |"
        )
    total = {key: [sum(row[key][i] for row in rows) for i in range(3)] for key in ("wall", "processor")}
    sums = [", ".join(f"{x:.1f}" for x in total[key]) for key in ("wall", "processor")]
    out.append(f"| all | | {sum(row['requests'] for row in rows)} | | | | | | {' | '.join(sums)} |")
    return "\n".join(out)


if __name__ == "__main__":
    main()
