"""Gives `linscale` hundreds of malformed inputs and counts the clear errors: one sentence, exit code 2, no harm.

  python experiments/faults/malformed.py                      all of them; prints N of N by group
  python experiments/faults/malformed.py corpus -v            one group, with every sentence

The cases, and what passing means, are in tests/inputs. Exit code 0 if all pass.
"""

import argparse
import collections
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "inputs"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("group", nargs="?", default="", help="only groups that begin so")
    parser.add_argument("-v", action="store_true", help="show every sentence")
    options = parser.parse_args()
    import judging

    counts, passed, began = collections.Counter(), collections.Counter(), time.monotonic()
    for case in judging.all_cases():
        if not case.group.startswith(options.group):
            continue
        with tempfile.TemporaryDirectory() as folder:
            wrong, said = judging.judge(case, Path(folder))
            said = said.replace(folder, "")
        counts[case.group] += 1
        passed[case.group] += not wrong
        if wrong or options.v:
            print(f"{'FAIL' if wrong else 'ok  '} {case.group}: {case.name[:80]}")
            print("     " + said[:400])
            for reason in wrong:
                print(f"     {reason[:200]}")
    print(f"\n{'group':24} {'inputs':>7} {'clear errors':>13}")
    for group, count in counts.items():
        print(f"{group:24} {count:7} {passed[group]:13}")
    total = counts.total()
    print(f"{passed.total()} of {total} malformed inputs end in a clear error, in {time.monotonic() - began:.0f} s")
    return int(passed.total() < total)


if __name__ == "__main__":
    sys.exit(main())
