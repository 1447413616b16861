"""The verdict in sentences that are true: a difference is one only beyond the noise of seeds."""

import math
import re
from collections.abc import Sequence

from pipelines.comparison.verdict import Estimate, Judged, Verdict
from pipelines.tracking.tracker import VERSIONS


def headline(verdict: Verdict) -> str:
    """What came out, in one sentence."""
    best, base = verdict.best, verdict.baseline.group.label
    if best is None:
        return f"Only one group has finished: nothing to compare {base} with yet"
    name = _chosen(verdict, best)
    if best.ratio is not None:
        return _sooner(name, base, best.ratio, verdict)
    runs = len(best.group.counted)
    goal = f"the final loss of {base}" if verdict.target_is.startswith("final") else "the target loss"
    if verdict.baseline.loss is None or verdict.baseline.reached < len(verdict.baseline.group.counted):
        both = (f"{j.reached} of {len(j.group.counted)} runs of {j.group.label}" for j in (verdict.baseline, best))
        return f"{goal[0].upper()}{goal[1:]} was reached by {' and '.join(both)}"
    if not best.reached:
        return f"{name} did not reach {goal} in its {seconds(best.seconds)}{_of_one_seed(runs)}"
    return f"{name} reached {goal} in {best.reached} of {runs} runs"


def _chosen(verdict: Verdict, best: Judged) -> str:
    others = sum(bool(j.group.counted) for j in verdict.judged[1:])
    return best.group.label if others == 1 else f"Best of {others}: {best.group.label}"


def _sooner(name: str, base: str, ratio: Estimate, verdict: Verdict) -> str:
    goal = "the latter's final loss" if (final := verdict.target_is.startswith("final")) else "the target loss"
    if ratio.low is not None and ratio.low <= 1 <= ratio.high:
        return f"No difference beyond seed noise between {name} and {base} in the time to {goal}"
    if ratio.value >= 1:
        where = f"the final loss of {base} {times(ratio.value)} sooner"  # labels may be long: once is enough
        said = f"{name} reached {where if final else f'{goal} {times(ratio.value)} sooner than {base}'}"
    else:
        said = f"{name} took {times(1 / ratio.value)} as long as {base} to reach {goal}"
    return said if ratio.low is not None else f"{said} – in one seed, which tells nothing about chance"


def remarks(verdict: Verdict) -> list[str]:
    """What belongs beside the headline: the interval, the loss at equal cost, what was paid for search."""
    best, said = verdict.best, []
    if best is None:
        return said
    if best.ratio is not None and best.ratio.low is not None:
        said.append(
            f"Net speed-up {times(best.ratio.value)}, {percent(verdict.level)} interval {times(best.ratio.low)} to "
            f"{times(best.ratio.high)} over {best.ratio.seeds} seeds; search and scoring are charged."
        )
    elif best.ratio is not None:
        said.append(
            "One seed has no interval: nobody can tell this from noise. Three seeds a group are the least, five better."
        )
    elif best.ratio_at_most is not None:
        said.append(f"Its net speed-up is below {times(best.ratio_at_most)}, since not every run got there.")
    if best.equal_seconds_loss_difference is not None and verdict.baseline.equal_seconds_loss is not None:
        said.append(_at_equal_seconds(verdict, best, best.equal_seconds_loss_difference))
    if best.overhead:
        said.append(
            f"Of its seconds {percent(best.overhead)} went into search and scoring: {break_even(best, verdict)}."
        )
    return said


def _at_equal_seconds(verdict: Verdict, best: Judged, difference: Estimate) -> str:
    base = verdict.baseline.equal_seconds_loss.value
    share = difference.value / base
    where = f"After {seconds(verdict.equal_s)} each its held-out loss is {percent(abs(share), 1)} "
    where += f"{'below' if share < 0 else 'above'} that of {verdict.baseline.group.label}"
    if difference.low is None:
        return f"{where}, in one seed."
    low, high = (change(value / base) for value in (difference.low, difference.high))
    beyond = "" if difference.low > 0 or difference.high < 0 else ", no difference beyond seed noise"
    return f"{where} ({percent(verdict.level)} interval {low} to {high}{beyond})."


def break_even(judged: Judged, verdict: Verdict) -> str:
    """From when on search and scoring had paid for themselves."""
    if judged.break_even_s is None:
        return f"not paid back by the end, where its mean loss is not below that of {verdict.baseline.group.label}"
    return f"paid back after {seconds(judged.break_even_s)}, from where on its mean loss is the lower one"


def warnings(verdict: Verdict) -> list[str]:
    """Runs that are shown and do not count, files that cannot be shown, and what makes the target a poor one."""
    runs = [run for judged in verdict.judged for run in judged.group.runs]
    out = [f"{run.title}: {line}" for run in runs for line in run.damage]
    for judged in verdict.judged:
        odd = [run for run in judged.group.runs if not run.counts]
        for status in dict.fromkeys(run.status for run in odd):
            names = ", ".join(run.title for run in odd if run.status == status)
            out.append(f"{judged.group.label}: {STATUS_WORDS.get(status, status)}, not counted: {names}")
    met = [
        j.group.label for j in verdict.judged if any(r.curve[0].loss <= verdict.target_loss for r in j.group.counted)
    ]
    if met:
        out.append(
            f"The target loss {loss(verdict.target_loss)} was met at the first measurement already ({'; '.join(met)}): "
            "the time to it says little; give a lower one with --target-loss"
        )
    few = {len(j.group.counted) for j in verdict.judged if j.group.counted}
    if len(few) > 1:
        out.append("The groups have unlike numbers of seeds: " + _numbers(verdict.judged))
    return [*out, *_unlike_code(verdict)]


def _unlike_code(verdict: Verdict) -> list[str]:
    """In what code and versions the groups are unlike; what was not recorded is not known to be."""
    said = []
    for name, tag in {"commit": "entprog.commit", **{name: f"version.{name}" for name in VERSIONS}}.items():
        of_groups = [{run.tags[tag] for run in j.group.counted if tag in run.tags} for j in verdict.judged]
        known = [values for values in of_groups if values]
        if any(values != known[0] for values in known):
            values = sorted(set.union(*known))
            more = f" and {len(values) - 3} more" if len(values) > 3 else ""
            said.append(f"{name} {', '.join(map(_short, values[:3]))}{more}")
    if not said:
        return []
    return [f"The groups are of unlike code or versions ({'; '.join(said)}): a difference may come from these alone"]


def _short(version: str) -> str:
    """With 12 digits of a commit, and what follows it: the + of changes."""
    return re.sub("([0-9a-f]{12})[0-9a-f]{28}", r"\1", version)


STATUS_WORDS = {
    "running": "still running",
    "failed": "failed",
    "killed": "stopped before its end",
    "diverged": "ended at a loss that is no number (NaN or infinite)",
    "empty": "ended without a held-out loss",
}


def _numbers(judged: Sequence[Judged]) -> str:
    return ", ".join(f"{j.group.label} {len(j.group.counted)}" for j in judged)


def _of_one_seed(runs: int) -> str:
    return " (one seed)" if runs == 1 else f" (none of {runs} seeds)"


# ---- numbers for people ----

GLUE = "\N{NO-BREAK SPACE}"
"""Between a number and its unit."""


def times(value: float) -> str:
    return f"{value:.2f}×"


def percent(share: float, digits: int = 0) -> str:
    shown = f"{100 * share:.{digits}f}" if digits or abs(share * 100 % 1) < 1e-6 else f"{100 * share:.3g}"
    return f"{shown}{GLUE}%"


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if value >= 3 * length:
            return f"{value / length:.1f}{GLUE}{unit}"
    return f"{value:.1f}{GLUE}s"


def loss(value: float | None) -> str:
    return "–" if value is None else f"{value:#.4g}"


def memory(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 2**30:.1f}{GLUE}GiB" if value >= 2 * 2**30 else f"{value / 2**20:.0f}{GLUE}MiB"


def flops(value: float | None) -> str:
    if value is None:
        return "–"
    power = min(max(int(math.log10(max(value, 1)) // 3), 0), 7)
    return f"{value / 1000**power:.3g}{GLUE}{['', 'k', 'M', 'G', 'T', 'P', 'E', 'Z'][power]}FLOP"


def interval(estimate: Estimate | None, form=lambda v: f"{v:#.4g}") -> str:
    """'1.20× (1.05× to 1.37×)', '1.20×' for one seed, '–' for none."""
    if estimate is None:
        return "–"
    if estimate.low is None:
        return form(estimate.value)
    return f"{form(estimate.value)} ({form(estimate.low)} to {form(estimate.high)})"


def change(share: float, digits: int = 1) -> str:
    """'−8.1 %', '+3.0 %'."""
    shown = f"{100 * share:+.{digits}f}{GLUE}%".replace("-", "−")
    return shown if any(digit in shown for digit in "123456789") else f"±0{GLUE}%"


def span(estimate: Estimate, form, level: float) -> str:
    """The interval beside a value that stands elsewhere."""
    if estimate.low is None:
        return "one seed: no interval"
    return f"{percent(level)} interval {form(estimate.low)} to {form(estimate.high)}, {estimate.seeds} seeds"
