"""Command lines, and CSV and JSONL files for fits."""

from pathlib import Path

from judging import RECIPE, Case, corpus

# command line ({} is the case's folder) -> what the sentence must hold
COMMANDS = {
    "trian": ("'trian'", "train, ladder"),
    "--config=x.py:y": ("--config=x.py:y", "not a command"),
    "--no-such": ("--no-such", "not a command"),
    "../train": ("../train", "not a command"),
    "train": ("--config",),
    "train --config": ("--config",),
    "train --config=": ("recipe",),
    "train --config={}/none.py:x": ("none.py", "does not exist"),
    "train --config={}/tiny.py": ("names no rung", "tnl"),
    "train --config={}/tiny.py:": ("names no rung", "tnl"),
    "train --config={}/tiny.py:gpt": ("'gpt'", "tnl"),
    "train --config={}/tiny.py:../tnl": ("'../tnl'", "tnl"),
    "train --config={}/texts/00.txt:tnl": ("00.txt", "recipe"),
    "train --config={}:tnl": ("recipe",),
    "train --config=configs/demo.py:tnl-1b": ("'tnl-1b'", "tnl-14k"),
    "train --config=configs/../configs/none.py:x": ("none.py", "does not exist"),
    "train --conf={}/tiny.py:tnl": ("--conf=",),
    "train {}/tiny.py:tnl": ("tiny.py:tnl", "not an option"),
    "train --config={}/tiny.py:tnl --steps=3": ("--steps=3", "not an option"),
    "train --config={}/tiny.py:tnl --config.train.steps": ("--config.train.steps", "no value"),
    "train --config={}/tiny.py:tnl --config.train.steps --config.seed=1": ("--config.train.steps", "no value"),
    "train --config={}/tiny.py:tnl config.train.steps=3": ("config.train.steps=3", "not an option"),
    "train --replay={}/none": ("--replay", "none"),
    "train --replay={}": ("--replay",),
    "train --replay=": ("--replay",),
    "train --replay={} --config={}/tiny.py:tnl": ("--replay", "nothing beside it"),
    "ladder --config={}/none.py": ("none.py", "does not exist"),
    "ladder --config={}/tiny.py:tnl": ("tiny.py:tnl", "--only=tnl"),
    "ladder --config={}/tiny.py --only=gpt-*": ("--only=gpt-*", "tnl"),
    "ladder --config={}/tiny.py --only=": ("--only=", "tnl"),
    "ladder --config={}/tiny.py --config.name=same --config.data.path=x": ("config.name", "share"),
    "ladder --config={}/tiny.py --config.data.path={}/none.txt --config.output={}/runs --config.data.cache={}/cache": (
        "config.data.path",
        "none.txt",
    ),
    "ladder extra": ("extra", "not an option"),
    "count --sequence=0": ("--sequence", "0"),
    "count --sequence=-8": ("--sequence", "-8"),
    "count --sequence=many": ("--sequence", "'many'"),
    "count --batch=0": ("--batch", "0"),
    "count --batch=1.5": ("--batch", "'1.5'"),
    "count --jsn": ("--jsn",),
    "count extra": ("extra",),
    "doctor extra": ("extra",),
    "report": ("folder",),
    "report {}/none": ("none", "not a folder"),
    "report {}/tiny.py": ("tiny.py", "not a folder"),
    "report {}/texts": ("texts", "config.json"),
    "report {}/texts --resamples=0": ("--resamples", "0"),
    "report {}/texts --loss=best": ("--loss", "'best'"),
    "fit": ("path",),
    "fit {}/none": ("none", "not a folder"),
    "fit {}/texts": ("texts", "config.json"),
    "fit {}/tiny.py": ("tiny.py", "empty line"),
    "fit {}/texts --seed=-1": ("--seed", "-1"),
    "fit {}/texts --seed=x": ("--seed", "'x'"),
    "fit {}/texts --resamples=0": ("--resamples", "0"),
    "fit {}/texts --resamples=1000000000000": ("--resamples", "1000000000000"),
    "fit {}/texts --form=cubic": ("--form", "'cubic'", "chinchilla"),
    "fit {}/texts --compute=guess": ("--compute", "'guess'"),
    "fit {}/texts --budget": ("--budget",),
    "fit {}/texts --loss=best": ("--loss", "'best'", "heldout"),
    "plan": ("--config",),
    "plan --config={}/tiny.py:tnl": ("--topology",),
    "plan --config={}/tiny.py:gpt --topology=v5e:2x2": ("'gpt'", "tnl"),
    "plan --config={}/tiny.py:tnl --topology=v9:4x4": ("--topology", "v9", "v5p"),
    "plan --config={}/tiny.py:tnl --topology=v5p:4x4": ("--topology", "v5p:4x4x8"),
    "plan --config={}/tiny.py:tnl --topology=v5e:2x2 --tries=0": ("--tries", "0"),
    "plan --config={}/tiny.py:tnl --topology=v5e:2x2 --json={}/none/p.json": ("--json", "none"),
    "launch": ("tpu",),
    "launch mars": ("'mars'", "slurm"),
    "launch slurm": ("--config",),
    "launch slurm --config={}/tiny.py:gpt": ("'gpt'",),
    "launch slurm --config={}/tiny.py:tnl --config.data.path=x --nodes=0": ("--nodes", "0"),
    "launch slurm --config={}/tiny.py:tnl --config.data.path=x --time=soon": ("--time", "'soon'"),
    "launch slurm --config={}/tiny.py:tnl --config.data.path=x --restarts=-1": ("--restarts", "-1"),
    "launch slurm --config={}/tiny.py:tnl --config.data.path=x --partition=a;b": ("--partition", "'a;b'"),
    "launch slurm --config={}/tiny.py:tnl --config.data.path=x --name=../up": ("--name", "'../up'"),
    "launch slurm --config={}/tiny.py:tnl --config.data.path=x --submit": ("--submit", "--out"),
    "launch slurm --config={}/tiny.py:tnl --config.data.path=x --out={}/tiny.py": ("tiny.py",),
    "launch tpu --config={}/tiny.py:tnl --config.data.path=x --zone=z --topology=v9:4x4": ("--topology", "v5p"),
    "launch tpu --config={}/tiny.py:tnl --config.data.path=x --zone=z --topology=v5p:4x": ("--topology", "v5p:4x"),
    "launch tpu --config={}/tiny.py:tnl --config.data.path=x --zone=z --topology=v5p:0x4x4": ("--topology", "0x4x4"),
    "launch gke --config={}/tiny.py:tnl --config.data.path=x --image=i": ("--topology",),
}  # fmt: skip

GOOD = "model,N,D,loss,C\n" + "".join(
    f"m{i},{10**6 * 2**i},{2 * 10**7 * 2**j},{1.7 + 400 / (10**6 * 2**i) ** 0.34 + 410 / (2 * 10**7 * 2**j) ** 0.28},"
    f"{6 * 10**6 * 2**i * 2 * 10**7 * 2**j}\n"
    for i in range(4)
    for j in range(3)
)
HEAD, LINES = GOOD.splitlines()[0], GOOD.splitlines()[1:]
ASK = "--n=N --d=D --loss=loss"


def _row(cells: str) -> bytes:
    """The good table with one more row."""
    return f"{GOOD}{cells}\n".encode()


# file name, content, options -> what the sentence must hold
TABLES = {
    "empty": ("t.csv", b"", ASK, ("t.csv", "no rows")),
    "only a header": ("t.csv", HEAD.encode(), ASK, ("t.csv", "no rows")),
    "only line breaks": ("t.csv", b"\n\n\n", ASK, ("t.csv", "no rows")),
    "no columns named": ("t.csv", GOOD.encode(), "", ("t.csv", "--n, --loss", "model, N, D")),
    "no such column": ("t.csv", GOOD.encode(), "--n=size --d=D --loss=loss", ("'size'", "--n", "model, N, D")),
    "no header": ("t.csv", "\n".join(LINES).encode(), ASK, ("'N'", "no column")),
    "another separator": ("t.csv", GOOD.replace(",", ";").encode(), ASK, ("'N'", "no column")),
    "a column twice": ("t.csv", GOOD.replace("model,N", "N,N").encode(), ASK, ("'N'", "twice")),
    "a word": ("t.csv", _row("m,many,1e7,3,1"), ASK, ("'N'", "row 13", "'many'")),
    "an empty cell": ("t.csv", _row("m,,1e7,3,1"), ASK, ("'N'", "row 13", "''")),
    "a short row": ("t.csv", _row("m,1e6"), ASK, ("'D'", "row 13", "None")),
    "a long row": ("t.csv", _row("m,1e6,1e7,3,1,1,1"), ASK, ("row 13", "7 cells")),
    "nan": ("t.csv", _row("m,1e6,1e7,nan,1"), ASK, ("'loss'", "row 13", "'nan'")),
    "infinity": ("t.csv", _row("m,1e6,1e7,inf,1"), ASK, ("'loss'", "row 13", "'inf'")),
    "too large": ("t.csv", _row("m,1e999,1e7,3,1"), ASK, ("'N'", "row 13", "'1e999'")),
    "zero": ("t.csv", _row("m,1e6,1e7,0,1"), ASK, ("'loss'", "row 13", "'0'")),
    "negative": ("t.csv", _row("m,1e6,-1e7,3,1"), ASK, ("'D'", "row 13", "'-1e7'")),
    "a comma in a number": ("t.csv", _row('m,"1,000",1e7,3,1'), ASK, ("'N'", "'1,000'")),
    "a unit": ("t.csv", _row("m,70M,1e7,3,1"), ASK, ("'N'", "'70M'")),
    "a huge cell": ("t.csv", _row("m," + "9" * 200_000 + ",1e7,3,1"), ASK, ("t.csv",)),
    "an open quote": ("t.csv", _row('m,"1e6,1e7,3,1'), ASK, ("row 13",)),
    "a huge open quote": ("t.csv", f'{HEAD}\n"{GOOD * 300}'.encode(), ASK, ("t.csv",)),
    "NUL bytes": ("t.csv", _row("m,1e6\0,1e7,3,1"), ASK, ("t.csv",)),
    "not UTF-8": ("t.csv", _row("m,1e6,1e7,3,1") + b"\xff\xfe", ASK, ("t.csv", "cannot be read as text")),
    "UTF-16": ("t.csv", GOOD.encode("utf-16"), ASK, ("t.csv", "cannot be read as text")),
    "binary": ("t.csv", bytes(range(256)) * 9, ASK, ("t.csv", "cannot be read as text")),
    "control characters in a column": ("t.csv", GOOD.replace("model", "x\x1b[2J").encode(), "--n=q --d=D --loss=loss", ("'q'",)),
    "a script as column": (
        "t.csv", GOOD.replace("model", "<script>alert(1)</script>").encode(), "--n=q --d=D --loss=loss", ("'q'",)
    ),
    "one row": ("t.csv", "\n".join([HEAD, LINES[0]]).encode(), ASK, ("1",)),
    "two rows": ("t.csv", "\n".join([HEAD, *LINES[:2]]).encode(), ASK, ("2",)),
    "all rows the same": ("t.csv", "\n".join([HEAD, *[LINES[0]] * 9]).encode(), ASK, ("9 runs", "1 different")),
    "one size only": ("t.csv", "\n".join([HEAD, *LINES[:3]] * 1).encode(), ASK, ("3",)),
    "drops every row": ("t.csv", GOOD.encode(), f"{ASK} --drop-worst=12", ("--drop-worst", "12")),
    "drops less than none": ("t.csv", GOOD.encode(), f"{ASK} --drop-worst=-1", ("--drop-worst", "-1")),
    "backtest of every row": ("t.csv", GOOD.encode(), f"{ASK} --backtest=12", ("--backtest", "12")),
    "backtest of less than none": ("t.csv", GOOD.encode(), f"{ASK} --backtest=-1", ("--backtest", "-1")),
    "delta zero": ("t.csv", GOOD.encode(), f"{ASK} --delta=0", ("--delta", "0")),
    "delta nan": ("t.csv", GOOD.encode(), f"{ASK} --delta=nan", ("--delta", "nan")),
    "budget negative": ("t.csv", GOOD.encode(), f"{ASK} --budget=-1e20", ("--budget", "-1e")),
    "budget infinite": ("t.csv", GOOD.encode(), f"{ASK} --budget inf", ("--budget", "inf")),
    "isoflop without compute groups": ("t.csv", GOOD.encode(), f"{ASK} --form=isoflop --backtest=2", ("--backtest",)),
    "data-constrained without unique": ("t.csv", GOOD.encode(), f"{ASK} --form=data-constrained", ("--unique",)),
    "envelope of a file without curves": ("t.csv", GOOD.encode(), f"{ASK} --form=envelope", ("t.csv", "--run COLUMN")),
    "JSON to a folder that is not there": ("t.csv", GOOD.encode(), f"{ASK} --json=none/x.json", ("--json", "none/x.json")),
    "JSON to a folder": ("t.csv", GOOD.encode(), f"{ASK} --json=.", ("--json",)),
    "JSON over the table": ("t.csv", GOOD.encode(), f"{ASK} --json=../t.csv", ("--json", "t.csv")),
    "two files": ("t.csv", GOOD.encode(), f"../t.csv {ASK}", ("t.csv", "one file")),
    "jsonl: a list": ("t.jsonl", b"[1, 2]\n", ASK, ("t.jsonl line 1", "not a JSON object")),
    "jsonl: broken": ("t.jsonl", b'{"N": 1\n', ASK, ("t.jsonl line 1", "not a JSON object")),
    "jsonl: an array over lines": ("t.json", b'[\n{"N": 1}\n]\n', ASK, ("t.json line 1",)),
    "jsonl: nested too deep": ("t.jsonl", b"[" * 100_000, ASK, ("t.jsonl line 1",)),
    "jsonl: text": ("t.jsonl", b'{"N": "a", "D": 1, "loss": 1}\n', ASK, ("'N'", "'a'")),
    "jsonl: null": ("t.jsonl", b'{"N": null, "D": 1, "loss": 1}\n', ASK, ("'N'", "None")),
    "jsonl: true": ("t.jsonl", b'{"N": true, "D": 1, "loss": 1}\n', ASK, ("'N'", "True")),
    "jsonl: NaN": ("t.jsonl", b'{"N": NaN, "D": 1, "loss": 1}\n', ASK, ("'N'", "nan")),
    "jsonl: a list as value": ("t.jsonl", b'{"N": [1], "D": 1, "loss": 1}\n', ASK, ("'N'", "[1]")),
    "jsonl: field missing in one": (
        "t.jsonl", b'{"N": 1, "D": 1, "loss": 1}\n{"N": 1, "loss": 1}\n', ASK, ("'D'", "row 2", "None")
    ),
    "jsonl: a number of 9000 digits": ("t.jsonl", b'{"N": ' + b"9" * 9000 + b"}", ASK, ("t.jsonl line 1",)),
    "jsonl: an integer past floats": ("t.jsonl", b'{"N": 1' + b"0" * 400 + b', "D": 1, "loss": 1}', ASK, ("'N'",)),
    "jsonl: empty objects": ("t.jsonl", b"{}\n{}\n", ASK, ("'N'", "no column")),
}  # fmt: skip


def _command(line: str):
    def make(folder: Path) -> list[str]:
        (folder / "tiny.py").write_text(RECIPE)
        corpus(folder, 2)
        return [word.replace("{}", str(folder)) for word in line.split(" ")]

    return make


def _table(name: str, content: bytes, options: str):
    def make(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return ["fit", str(folder / name), *options.split(), "--resamples=20"]

    return make


def cases() -> list[Case]:
    found = [Case("command line", line, _command(line), says) for line, says in COMMANDS.items()]
    return found + [
        Case("table", name, _table(file, content, options), says)
        for name, (file, content, options, says) in TABLES.items()
    ]
