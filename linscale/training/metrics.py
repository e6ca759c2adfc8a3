"""What a run says while it trains: metrics.jsonl, TensorBoard, optionally Weights & Biases, and a progress line.

metrics.jsonl is the record; the others are views of it. Its lines up to a checkpoint are on disk before the checkpoint
is begun, and a resumed run cuts what lies after its checkpoint, so that the file of a run that was killed equals that
of one that was not, except for the timing fields.
"""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

from linscale.config import Config, ConfigError

TIMING = ("tokens_per_s", "mfu", "seconds")  # fields that differ between two runs of one config
PLAIN_LINE_EVERY = 10.0  # seconds between progress lines where there is no terminal
TENSORBOARD_EVERY = 30.0  # seconds between flushes of its files


def cut(path: Path, step: int) -> list[dict]:
    """Keeps the lines of steps <= step, atomically, and returns them. A line half-written by a killed process is cut."""
    kept = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                break
            if line["step"] <= step:
                kept.append(line)
        whole = path.with_suffix(".tmp")
        whole.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(whole, path)
    return kept


class Log:
    """Appends the lines of one run. `run` is the content of config.json; `first` the step that training starts after.

    peak: FLOP/s of all devices together, None if unknown.
    """

    def __init__(self, folder: Path, config: Config, run: dict, first: int, peak: float | None):
        self._tokens_per_step, self._peak = config.tokens_per_step, peak
        self._flops_per_token, self._bytes_per_token = run["flops_per_token"], run["data"]["bytes_per_token"]
        kept = cut(folder / "metrics.jsonl", first)
        self.last_heldout = next((line for line in reversed(kept) if "heldout_loss" in line), None)
        self._file = open(folder / "metrics.jsonl", "a")  # noqa: SIM115
        self._views = [_tensorboard(folder, first)] if config.log.tensorboard else []
        if config.log.wandb_project:
            self._views.append(_wandb(folder, config))
        self._before = next((line["seconds"] for line in reversed(kept) if "seconds" in line), 0.0)
        self._started = self._interval = time.perf_counter()
        self._logged = first

    @property
    def seconds(self) -> float:
        """Wall time of the run, that of earlier processes up to the restored checkpoint included."""
        return self._before + time.perf_counter() - self._started

    def training(self, step: int, values: dict[str, float]) -> None:
        """values: metrics of the train step. What is not finite is written as null; skipped steps once there are any."""
        now = time.perf_counter()
        rate = (step - self._logged) * self._tokens_per_step / max(now - self._interval, 1e-9)
        self._logged, self._interval = step, now
        self._write(
            self._totals(step)
            | {name: value if math.isfinite(value := values[name]) else None for name in ("loss", "grad_norm", "lr")}
            | ({"skipped": int(values["skipped"])} if values["skipped"] else {})
            | {
                "tokens_per_s": round(rate, 1),
                "mfu": rate * self._flops_per_token / self._peak if self._peak else None,
                "seconds": round(self.seconds, 3),
            }
        )

    def heldout(self, step: int, loss: float) -> None:
        self.last_heldout = self._totals(step) | {
            "heldout_loss": loss,
            "heldout_bpb": loss / math.log(2) / self._bytes_per_token,
        }
        self._write(self.last_heldout)

    def paused(self, seconds: float) -> None:
        """Takes an evaluation or a save out of the training speed."""
        self._interval += seconds

    def sync(self) -> None:
        """Returns when all lines so far are on disk, also if the machine loses power after this.

        From any thread, also after `close`, which a save in the background may outlast.
        """
        with open(self._file.name, "rb") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        for _, close in self._views:
            with contextlib.suppress(OSError):  # only views, and the disk is full for the record, too
                close()
        self._file.close()

    def _totals(self, step: int) -> dict:
        tokens = step * self._tokens_per_step
        return {"step": step, "tokens": tokens, "flops": tokens * self._flops_per_token}

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for show, _ in self._views:
            show(line)


class Silent:
    """In place of Log and Progress in the other processes of a run: every method does nothing."""

    def __getattr__(self, name: str):
        return lambda *_: None


def _tensorboard(folder: Path, first: int):
    """Event files without TensorFlow, and without tensorboardX's writer thread: once that has died of a full disk, the
    next lines would wait for it for ever."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    folder = folder / "tensorboard"
    folder.mkdir(exist_ok=True)
    writer, flushed = EventsWriter(str(folder / "events"), f".{os.getpid()}"), time.monotonic()
    # Hides what an earlier process wrote of the steps that are done again.
    writer.write_event(Event(wall_time=time.time(), step=first + 1, session_log=SessionLog(status=SessionLog.START)))

    def show(line):
        nonlocal flushed
        shown = {
            name: value
            for name, value in line.items()
            if name not in ("step", "tokens", "flops", "seconds") and value is not None
        }
        values = [Summary.Value(tag=name, simple_value=value) for name, value in shown.items()]
        writer.write_event(Event(wall_time=time.time(), step=line["step"], summary=Summary(value=values)))
        if time.monotonic() - flushed > TENSORBOARD_EVERY:
            writer.flush()
            flushed = time.monotonic()

    return show, writer.close


def check_wandb(config: Config) -> None:
    if config.log.wandb_project:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"config.log.wandb_project is {config.log.wandb_project!r}, but wandb is not installed; "
                "run pip install 'linscale[wandb]' or leave the field empty."
            ) from error


def _wandb(folder: Path, config: Config):
    import dataclasses
    import zlib

    import wandb

    key = f"{config.name}-{zlib.crc32(str(folder.absolute()).encode()):08x}"  # a resumed run continues its curve
    run = wandb.init(
        project=config.log.wandb_project, name=config.name, id=key, resume="allow", dir=str(folder),
        config=dataclasses.asdict(config),
    )  # fmt: skip
    return (lambda line: run.log(line, step=line["step"])), run.finish


class Progress:
    """One line that moves on a terminal, one plain line at most every ten seconds elsewhere. On stderr.

    note(step) -> text is added at the end, as the time left of a whole ladder.
    """

    def __init__(self, label: str, steps: int, first: int, tokens_per_step: int, note=None):
        self._label, self._steps, self._first, self._note = label, steps, first, note
        self._tokens_per_step, self._started, self._said = tokens_per_step, time.perf_counter(), -math.inf
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=first, desc=label, unit="step", dynamic_ncols=True, leave=False)

    def update(self, step: int, loss: float) -> None:
        now = time.perf_counter()
        rate = (step - self._first) / max(now - self._started, 1e-9)
        note = f"; {self._note(step)}" if self._note else ""
        speed = f"{rate * self._tokens_per_step:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {speed}{note}", refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._said >= PLAIN_LINE_EVERY or step == self._steps:
            self._said = now
            left = duration((self._steps - step) / rate)
            say(f"{self._label}: step {step}/{self._steps}, loss {loss:.3f}, {speed}, {left} left{note}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


speaks = True  # false in all processes of a run but the first


def say(text: str) -> None:
    if speaks:
        print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """75 -> '1:15', 3700 -> '1:01:40'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
