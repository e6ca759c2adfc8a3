"""`linscale count`: parameters and FLOPs of the paper's 24 models, the paper's figures beside the exact ones."""

import argparse
import json

from linscale.models.sizes import ASPECTS, SIZES, paper_model
from linscale.scaling import flops, paper


def rows(sizes: tuple[str, ...], sequence: int, batch: int) -> list[dict]:
    """One dict a model, architectures in the paper's order. The keys are the interface of `--json`; raw numbers."""
    table = []
    for arch in paper.TABLE3:
        for size in sizes:
            model = paper_model(arch, size)
            parameters = flops.count_parameters(model)
            table.append(
                {
                    "arch": arch,
                    "size": size,
                    "layers": model.layers,
                    "width": model.width,
                    "heads": model.heads,
                    "ffn": model.ffn,
                    "params_nonembedding_paper": parameters.nonembedding_paper,
                    "pflops_per_step_paper": flops.paper_flops_per_step(model, batch, sequence) / 1e15,
                    "params_total": parameters.total,
                    "params_nonembedding": parameters.nonembedding,
                    "flops_per_token": flops.flops_per_token(model, sequence),
                }
            )
    return table


def text(table: list[dict], sequence: int, batch: int) -> str:
    """The table for a reader: millions of parameters, PFLOPs a step, GFLOPs a token."""
    width = max(len(row["size"]) for row in table)
    head = f"{'arch':<10}  {'size':<{width}}  layers  width  heads    ffn"
    lines = [
        f"{'':{len(head)}} | {'paper':^22} | {'exact':^44}",
        f"{head} | {'params M':>8}  {'PFLOP/step':>12} | "
        f"{'total M':>8}  {'non-emb M':>9}  {'GFLOP/token':>11}  {'PFLOP/step':>10}",
    ]
    lines.append("-" * len(lines[-1]))
    previous = table[0]["arch"]
    for row in table:
        if row["arch"] != previous:
            lines.append("")
        previous = row["arch"]
        step = row["flops_per_token"] * batch * sequence / 1e15
        lines.append(
            f"{row['arch']:<10}  {row['size']:<{width}}  {row['layers']:>6}  {row['width']:>5}  {row['heads']:>5}  "
            f"{row['ffn']:>5} | "
            f"{row['params_nonembedding_paper'] / 1e6:>8.1f}  {row['pflops_per_step_paper']:>12.1f} | "
            f"{row['params_total'] / 1e6:>8.1f}  {row['params_nonembedding'] / 1e6:>9.1f}  "
            f"{row['flops_per_token'] / 1e9:>11.3f}  {step:>10.1f}"
        )
    lines += [
        "",
        f"A step is {batch} sequences of {sequence} tokens, forward and backward; the embedding is tied.",
        "Paper: parameters without embedding; FLOPs with n x n softmax attention, ffn = 8/3 width, no output head.",
        "Exact: causal softmax attention, linear mixers at the recurrent minimum, output head; no element-wise work.",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Prints the table, or the list of objects with --json. Returns 0."""
    parser = argparse.ArgumentParser(
        prog="linscale count", description="Parameters and FLOPs of the paper's models, the paper's figures and ours."
    )
    parser.add_argument("--json", action="store_true", help="a list of objects with raw numbers")
    parser.add_argument("--aspects", action="store_true", help="also the four shapes of the 1B model (paper, table 5)")
    parser.add_argument("--sequence", type=int, default=paper.TABLE7_SEQUENCE, help="tokens a sequence (8192)")
    parser.add_argument("--batch", type=int, default=paper.TABLE7_BATCH, help="sequences a step (480)")
    options = parser.parse_args(argv)
    table = rows(SIZES + (ASPECTS if options.aspects else ()), options.sequence, options.batch)
    print(json.dumps(table, indent=1) if options.json else text(table, options.sequence, options.batch))
    return 0
