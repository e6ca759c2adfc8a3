"""`linscale generate`."""

import argparse
import sys
from pathlib import Path

from linscale.config import ConfigError

HELP = """\
Continue prompts with a checkpoint. The text streams to standard output; several prompts are decoded together and
printed one after another, each after a line with its number.

  linscale generate runs/demo/hgrn2-450k --prompt 'def main(' --max-tokens 200
  linscale generate runs/demo/tnl-450k --prompts prompts.txt --temperature 0.8 --top-p 0.95 --seed 1
"""


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.max_tokens < 1:
        raise ConfigError(f"--max-tokens is {args.max_tokens}; it must be at least 1.")
    if not 0 <= args.seed < 2**31:
        raise ConfigError(f"--seed is {args.seed}; it must lie between 0 and {2**31 - 1}.")
    texts = _prompts(args)
    from linscale.evaluation import generation, runs

    sampling = generation.Sampling(args.temperature, args.top_k, args.top_p)
    run = runs.open_run(args.run)
    step = run.step(args.step)
    tokenizer = run.tokenizer
    first = [tokenizer.separator_id] if args.separator else []
    prompts = [first + tokenizer.encode(text).tolist() for text in texts]
    generation.check_prompts(prompts, run.context)  # before the checkpoint is read
    end = None if args.no_end else tokenizer.separator_id
    blocks = generation.token_blocks(
        run.config.model,
        run.params(step),
        prompts,
        most=args.max_tokens,
        sampling=sampling,
        seed=args.seed,
        end=end,
        context=run.context,
    )
    pieces = generation.stream_text(tokenizer, blocks, len(prompts), args.stop or (), end)
    if len(prompts) == 1:
        _stream(pieces)
    else:
        _one_after_another(pieces, len(prompts))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "linscale generate", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("run", help="folder of a run")
    add("--prompt", action="append", metavar="TEXT", help="what to continue; give it several times for a batch")
    add("--prompts", metavar="FILE", help="a file with one prompt a line")
    add("--step", type=int, metavar="N", help="the checkpoint (default: the last)")
    add("--max-tokens", type=int, default=128, metavar="N", help="new tokens at most (default: 128)")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token (default)")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest only (default: 0, all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that sum to P (default: 1, all)")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be given several times")
    add("--seed", type=int, default=0, help="of the drawing (default: 0)")
    add("--separator", action="store_true", help="begin with the token between training documents")
    add("--no-end", action="store_true", help="go on after the token between training documents")
    return parser


def _prompts(args) -> list[str]:
    """Raises ConfigError: none at all, an empty one, a file that cannot be read."""
    texts = list(args.prompt or [])
    if args.prompts is not None:
        try:
            texts += Path(args.prompts).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ConfigError(f"--prompts {args.prompts} is not UTF-8 text ({error.reason}).") from error
        except OSError as error:
            raise ConfigError(f"--prompts {args.prompts} cannot be read ({error.strerror}).") from error
    if args.separator and not texts:
        texts = [""]  # a document from its beginning
    if not texts:
        raise ConfigError(
            "there is no prompt; give --prompt TEXT or --prompts FILE, or --separator to begin a document."
        )
    return texts


def _stream(pieces) -> None:
    for _, piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _one_after_another(pieces, rows: int) -> None:
    """Each row's text under a line with its number; the first row streams, the others wait for their turn."""
    texts = [""] * rows
    print("[1]", flush=True)
    for row, piece in pieces:
        texts[row] += piece
        if row == 0:
            sys.stdout.write(piece)
            sys.stdout.flush()
    for row in range(1, rows):
        print(f"\n[{row + 1}]\n{texts[row]}", end="")
    print(flush=True)
