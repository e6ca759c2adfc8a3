"""The laws L(C) = a C^b, N_opt(C) and D_opt(C) of an architecture, from the lower envelope of its training curves.

Approach 1 of Hoffmann et al. (arXiv 2203.15556), as in the paper; what the paper leaves unsaid is fixed here:

1. **Curves.** Held-out loss (default) or training loss of each finished run against compute C in PFLOP/s-days. Points
   up to twice the warm-up are left out, and so is the first SKIP_SHARE of a run's tokens: there a model is learning
   what every model learns, and the loss says nothing of its size. If most runs come onto the envelope where they
   begin to speak, this rule and not the loss chooses the sizes; Fit.late says so. Of curves in a file the share is the
   largest of SKIP_SHARES at which at most a quarter of the runs do (`settled`), unless one is given.
2. **Bins.** C is cut into BINS_PER_DECADE bins a decade; a bin's loss is the run's curve at the centre of the bin.
   Held-out loss: linear interpolation of log L in log C. Training loss is noisy, and a minimum of noisy values is too
   low: it is smoothed by a local straight line of log L in log C with Gaussian weights of sd SMOOTHING decades.
   Both numbers are options; smoothing 0 is linear interpolation.
   No extrapolation: a run speaks only for the bins it has passed through.
3. **Envelope.** The least loss of any run in each bin, from the compute at which a second run begins to speak (or the
   first ends, if that is earlier): before, a smaller model than any that was trained would be better, and the only
   run's loss is too high for its compute, which would make b too steep. A bin whose loss was reached with less
   compute is no envelope and left out: there the better run has ended and the larger one has not yet caught up.
4. **Laws.** Least squares of log L on log C over the bins, each bin with equal weight. No irreducible loss. N_opt and
   D_opt in the same way, from the size of the run on the envelope and the tokens that it has seen there, over the
   bins where that is neither the smallest nor the largest size: at the ends a size that was not trained might have
   been better, which makes N_opt too flat (measured: 0.456 where 0.5 was planted). If fewer than MIN_BINS bins are
   left, all are taken and Fit.ends_taken says so. With few sizes N_opt is a staircase and says little.
5. **Intervals.** The runs of the architecture are drawn again with replacement, and 3 and 4 repeated. A draw whose
   envelope has fewer than MIN_BINS bins cannot be fitted; it is counted as failed and left out. Of the others the
   percentiles at +-1.96 sqrt(n / (n - 2)) standard deviations of a normal, as n runs scatter too little by the two
   coefficients. Coverage: experiments/scaling/recovery.py. The envelope of fewer runs is never lower, so that bands
   lie more above the law than below it. The intervals say nothing of another seed, another corpus, or another form of
   the law, nor of rule 1 (Fit.late): where runs begin to speak near their best tokens and go on far beyond, noise picks
   runs that are trained too long, and N_opt is too low.

Curve i of R runs, bin g of G, draw s of S.
"""

import contextlib
import dataclasses
import math

import numpy as np

from linscale.config import ARCHITECTURES, ConfigError
from linscale.scaling import runs as runs_
from linscale.scaling.envelope import MIN_BINS, envelopes, least_squares, local_line

BINS_PER_DECADE = 10
SKIP_SHARES = (0.1, 0.05, 0.03, 0.02, 0.01)  # of a run's tokens
SKIP_SHARE = SKIP_SHARES[0]
SETTLED = 0.25  # of the runs may come onto the envelope where they begin to speak
SMOOTHING = 0.05  # decades of compute
MIN_RUNS = 2
ENDS_TAKEN = "N_opt and D_opt of {} rest on its smallest and largest size too, so they are too flat; train more sizes."
LATE = "Most runs of {} are best where they begin to speak: sizes are chosen by the share of a run that is left out."
LOSSES = ("heldout", "train")


@dataclasses.dataclass(frozen=True)
class Options:
    loss: str = "heldout"  # heldout | train
    compute: str = "exact"  # exact | paper
    resamples: int = 1000
    seed: int = 0
    smoothing: float | None = None  # decades of compute; None: none for held-out loss, SMOOTHING for training loss
    bins: int = BINS_PER_DECADE
    skip: float = SKIP_SHARE
    n: str = "nonembedding"  # of runs.SIZES

    @property
    def window(self) -> float:
        if self.smoothing is not None:
            return self.smoothing
        return 0.0 if self.loss == "heldout" else SMOOTHING


@dataclasses.dataclass(frozen=True)
class Curve:
    """A training curve as the envelope takes it; float64 arrays of one length, compute increasing."""

    name: str
    n: float  # parameters
    compute: np.ndarray  # PFLOP/s-days
    tokens: np.ndarray
    loss: np.ndarray  # nats per token


@dataclasses.dataclass(frozen=True)
class Line:
    """A run's curve as a figure shows it: whole, thinned, finished or not."""

    name: str
    n: float
    compute: np.ndarray  # PFLOP/s-days
    loss: np.ndarray
    finished: bool = True


@dataclasses.dataclass(frozen=True)
class Power:
    """y = coefficient C^exponent through the points of the envelope."""

    coefficient: float
    exponent: float
    coefficient_interval: tuple[float, float]  # 95 %
    exponent_interval: tuple[float, float]
    points: np.ndarray  # [G]
    band: np.ndarray  # [2, G] 95 % of the law
    draws: np.ndarray  # [S, 2] coefficient and exponent of the draws that could be fitted
    percentiles: tuple[float, float]  # of the draws, for 95 %

    def __call__(self, compute):
        return self.coefficient * compute**self.exponent

    def interval(self, compute: float) -> tuple[float, float]:
        """95 % of the law at any compute; NaN without draws."""
        if not len(self.draws):
            return np.nan, np.nan
        low, high = np.percentile(self.draws[:, 0] * compute ** self.draws[:, 1], self.percentiles)
        return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Fit:
    """L = a C^b, C in PFLOP/s-days, L in nats per token. Arrays over the G bins that the envelope covers."""

    arch: str
    a: float
    b: float
    a_interval: tuple[float, float]  # 95 %
    b_interval: tuple[float, float]
    compute: np.ndarray  # [G] bin centres, PFLOP/s-days
    envelope: np.ndarray  # [G] nats per token
    best: tuple[str, ...]  # [G] the run on the envelope
    band: np.ndarray  # [2, G] 95 % of the law's loss
    law: Power  # the same a, b, envelope and band, with draws
    rms: float  # of log L about the law; 0.01 is 1 % of the loss
    runs: tuple[str, ...]  # fitted
    draws: int
    failed: int  # draws that could not be fitted
    n_opt: Power  # parameters; NaN among the points where the bin has no part in it
    d_opt: Power  # tokens
    ends_taken: bool  # N_opt and D_opt rest on the smallest and largest size, too
    late_share: float  # of the runs: those that come onto the envelope in the first bin in which they speak

    @property
    def late(self) -> bool:
        return self.late_share > 0.5

    @property
    def coefficients(self) -> dict[str, tuple[float, tuple[float, float]]]:
        out = {"L_coefficient": (self.a, self.a_interval), "L_exponent": (self.b, self.b_interval)}
        for letter, power in (("N", self.n_opt), ("D", self.d_opt)):
            out[f"{letter}_coefficient"] = power.coefficient, power.coefficient_interval
            out[f"{letter}_exponent"] = power.exponent, power.exponent_interval
        return out

    def __call__(self, compute):
        return self.law(compute)


def fit_ladder(ladder: runs_.Ladder, options: Options = Options()) -> tuple[dict[str, Fit], list[str]]:
    """Fits by architecture, in the order of config.ARCHITECTURES, and sentences on what the reader must know.

    An architecture that cannot be fitted is missing from the fits and has its sentence.
    """
    fits, notes = {}, _notes(ladder)
    for arch in ARCHITECTURES:
        group = [run for run in ladder.runs if run.arch == arch]
        finished = [run for run in group if run.finished]
        if not group:
            continue
        if len(finished) < MIN_RUNS:
            notes.append(
                f"{arch} has {len(finished)} finished of {len(group)} runs; it gets no law, which needs at least {MIN_RUNS}."
            )
            continue
        try:
            fits[arch] = fit_runs(finished, options)
        except ConfigError as error:
            notes.append(str(error))
            continue
        if len(finished) < 4:
            notes.append(f"{arch} has only {len(finished)} finished runs: its intervals cannot be trusted.")
        if fits[arch].ends_taken:
            notes.append(ENDS_TAKEN.format(arch))
        if fits[arch].late:
            notes.append(LATE.format(arch))
        if failed := fits[arch].failed:
            notes.append(f"{failed} of {options.resamples} draws of the runs of {arch} could not be fitted.")
    return fits, notes


def fit_runs(group: list[runs_.Run], options: Options = Options()) -> Fit:
    """The laws of the finished runs of one architecture, N without embedding. Raises ConfigError for short curves."""
    return fit_curves(group[0].arch, [_curve(run, options) for run in group], options)


def fit_curves(arch: str, group: list[Curve], options: Options = Options()) -> Fit:
    """The laws of the curves of one architecture. Raises ConfigError if they are too short."""
    grid_G, loss_RG, tokens_RG = curves_in_bins(group, options)
    everyone = np.ones((1, len(group)), bool)
    covered_G = np.isfinite(envelopes(loss_RG, everyone)[0])
    if covered_G.sum() < MIN_BINS:
        raise ConfigError(
            f"{arch} cannot be fitted: the envelope of its {options.loss} curves has {covered_G.sum()} bins of "
            f"{1 / options.bins:g} decade of compute; {MIN_BINS} are needed, so train longer or evaluate more often."
        )
    grid_G, loss_RG, tokens_RG = grid_G[covered_G], loss_RG[:, covered_G], tokens_RG[:, covered_G]
    draw = np.random.default_rng(options.seed).integers(0, len(group), (options.resamples, len(group)))
    chosen_SR = np.zeros(draw.shape, bool)
    np.put_along_axis(chosen_SR, draw, True, axis=1)  # a minimum does not care how often a run is drawn
    chosen_SR = np.concatenate([everyone, chosen_SR])
    envelope_SG = envelopes(loss_RG, chosen_SR)
    best_SG = _best(loss_RG, chosen_SR)
    log_n_R = np.log10([curve.n for curve in group])
    inside_SG = np.isfinite(envelope_SG) & _between(log_n_R, chosen_SR, best_SG)
    if ends_taken := bool(inside_SG[0].sum() < MIN_BINS):
        inside_SG = np.isfinite(envelope_SG)
    gap_SG = np.where(inside_SG, 0.0, np.inf)
    tokens_SG = tokens_RG[best_SG, np.arange(len(grid_G))]
    ends = _percentiles(len(group))
    law, n_opt, d_opt = (
        _power(grid_G, y_SG, ends) for y_SG in (envelope_SG, log_n_R[best_SG] + gap_SG, tokens_SG + gap_SG)
    )
    slope_S = least_squares(grid_G, envelope_SG[1:])[1]
    return Fit(
        arch=arch,
        a=law.coefficient,
        b=law.exponent,
        a_interval=law.coefficient_interval,
        b_interval=law.exponent_interval,
        compute=10**grid_G,
        envelope=law.points,
        best=tuple(group[i].name for i in best_SG[0]),
        band=law.band,
        law=law,
        rms=float(np.sqrt(np.mean(np.log(law.points / law(10**grid_G)) ** 2))),
        runs=tuple(curve.name for curve in group),
        draws=options.resamples,
        failed=int((~np.isfinite(slope_S)).sum()),
        n_opt=n_opt,
        d_opt=d_opt,
        ends_taken=ends_taken,
        late_share=_late_share(loss_RG, best_SG[0]),
    )


def settled(groups: list[list[Curve]], options: Options) -> Options:
    """The options with the largest skipped share at which the loss chooses the sizes of every group (rule 1); with
    SKIP_SHARE where there is none. Groups that cannot be fitted have no say."""
    for share in SKIP_SHARES:
        tried = dataclasses.replace(options, skip=share, resamples=0)
        late = []
        for group in groups:
            with contextlib.suppress(ConfigError):
                late.append(fit_curves("", group, tried).late_share > SETTLED)
        if not any(late):
            return dataclasses.replace(options, skip=share)
    return dataclasses.replace(options, skip=SKIP_SHARE)


def _late_share(loss_RG, best_G) -> float:
    at = np.flatnonzero(np.diff(best_G)) + 1  # where another run takes over
    first_R = np.isfinite(loss_RG).argmax(1)
    return float(np.mean(first_R[best_G[at]] == at)) if len(at) else 0.0


def _between(log_n_R, chosen_SR, best_SG) -> np.ndarray:
    """[S, G] whether the best run is neither of the smallest nor of the largest size of those chosen."""
    low_S = np.where(chosen_SR, log_n_R, np.inf).min(1)
    high_S = np.where(chosen_SR, log_n_R, -np.inf).max(1)
    return (log_n_R[best_SG] > low_S[:, None] + 1e-9) & (log_n_R[best_SG] < high_S[:, None] - 1e-9)


def _best(loss_RG: np.ndarray, chosen_SR: np.ndarray) -> np.ndarray:
    """[S, G] which of the chosen runs has the least loss."""
    least_SG = np.full((len(chosen_SR), loss_RG.shape[1]), np.inf)
    best_SG = np.zeros(least_SG.shape, int)
    for i, (chosen_S, row_G) in enumerate(zip(chosen_SR.T, loss_RG)):
        better_SG = chosen_S[:, None] & (row_G < least_SG)
        least_SG, best_SG = np.where(better_SG, row_G, least_SG), np.where(better_SG, i, best_SG)
    return best_SG


def _percentiles(runs: int) -> tuple[float, float]:
    """Those of 95 %, further out by the two degrees of freedom of a straight line, see rule 5."""
    runs = max(3, runs)
    share = 50 * math.erfc(1.96 * math.sqrt(runs / (runs - 2) / 2))
    return share, 100 - share


def _power(grid_G: np.ndarray, y_SG: np.ndarray, ends: tuple[float, float]) -> Power:
    """Of the first row, with intervals from the others; y and grid in log10, inf where a row has no point."""
    (intercept, *intercept_S), (slope, *slope_S) = least_squares(grid_G, y_SG)
    intercept_S, slope_S = np.array(intercept_S), np.array(slope_S)
    good_S = np.isfinite(slope_S)
    intercept_S, slope_S = intercept_S[good_S], slope_S[good_S]

    def interval(values):
        if not len(values):
            return np.full((2, *values.shape[1:]), np.nan)
        return np.percentile(values, ends, axis=0)

    return Power(
        coefficient=float(10**intercept),
        exponent=float(slope),
        coefficient_interval=tuple(map(float, 10 ** interval(intercept_S))),
        exponent_interval=tuple(map(float, interval(slope_S))),
        points=np.where(np.isfinite(y_SG[0]), 10 ** np.where(np.isfinite(y_SG[0]), y_SG[0], 0.0), np.nan),
        band=10 ** interval(intercept_S[:, None] + slope_S[:, None] * grid_G),
        draws=np.stack([10**intercept_S, slope_S], 1),
        percentiles=ends,
    )


def curves_in_bins(group: list[Curve], options: Options) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log10 of the bin centres [G], of every run's loss [R, G], inf where it does not speak, and of its tokens there."""
    usable = [_usable(curve, options.skip) for curve in group]
    ends = [x for log_compute, _, _, start in usable if len(log_compute) for x in (start, log_compute[-1])]
    if not ends:
        return np.empty(0), *np.empty((2, len(group), 0))
    # Centres are multiples of the bin width, so that all architectures share them.
    first, last = np.floor(min(ends) * options.bins), np.ceil(max(ends) * options.bins)
    grid_G = np.arange(first, last + 1) / options.bins
    loss_RG = np.full((len(group), len(grid_G)), np.inf)
    tokens_RG = np.zeros(loss_RG.shape)
    for row_G, seen_G, (log_compute, log_loss, log_tokens, start) in zip(loss_RG, tokens_RG, usable):
        if len(log_compute) < 2:
            continue
        inside_G = (grid_G >= start) & (grid_G <= log_compute[-1])
        seen_G[:] = np.interp(grid_G, log_compute, log_tokens)
        if options.window:
            row_G[inside_G] = local_line(grid_G[inside_G], log_compute, log_loss, options.window)
        else:
            row_G[inside_G] = np.interp(grid_G[inside_G], log_compute, log_loss)
    return grid_G, loss_RG, tokens_RG


def _curve(run: runs_.Run, options: Options) -> Curve:
    curve = run.heldout if options.loss == "heldout" else run.train
    compute = runs_.compute(run, curve, options.compute)
    after = curve.tokens > 2 * run.config.optimizer.warmup_tokens
    return Curve(run.name, getattr(run.parameters, options.n), compute[after], curve.tokens[after], curve.loss[after])


def usable_curve(run: runs_.Run, options: Options) -> tuple[np.ndarray, np.ndarray, float]:
    """log10 C and log10 L after the warm-up, and the log10 C from which the run speaks (rule 1 above)."""
    log_compute, log_loss, _, start = _usable(_curve(run, options), options.skip)
    return log_compute, log_loss, start


def _usable(curve: Curve, skip: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """log10 C, L and tokens, and the log10 C from which the run speaks."""
    columns = tuple(map(np.log10, (curve.compute, curve.loss, curve.tokens)))
    if not len(curve.compute):
        return *columns, np.inf
    start = np.log10(max(curve.compute[-1] * skip, 1e-300))  # compute grows in proportion to tokens within a run
    return *columns, float(max(start, columns[0][0]))


def _notes(ladder: runs_.Ladder) -> list[str]:
    """What makes losses incomparable or a fit doubtful, one sentence each."""
    notes = []
    open_ = [run.name for run in ladder.runs if not run.finished] + list(ladder.missing)
    if open_:
        notes.append(f"Not finished, so not in the fit: {', '.join(open_)}.")
    if broken := [run.name for run in ladder.runs if run.unusable]:
        notes.append(f"Some logged losses are not finite and are left out, in {', '.join(broken)}.")
    runs = [run for run in ladder.runs if run.finished]
    if len({run.data.get("tokenizer") for run in runs}) > 1:
        notes.append("The runs use different tokenizers: their losses per token are not comparable.")
    if len({run.data.get("fingerprint") for run in runs}) > 1:
        notes.append("The runs use different data: their losses are not comparable.")
    if schedules := sorted({run.config.optimizer.schedule for run in runs} - {"constant"}):
        notes.append(
            f"The learning rate decays ({', '.join(schedules)}): losses inside a run are higher than those of a shorter "
            "run would be, so the envelope is too high between the ends of the runs."
        )
    return notes
