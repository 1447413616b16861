"""docs/study.md and its charts: from the study's result files, and nothing else."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import study_charts, study_figures
from benchmarks.study_arms import ARMS
from benchmarks.study_figures import spread

ROOT = Path(__file__).parents[1]
FRAME = Path(__file__).with_suffix(".md")
"""What the document says beside its figures."""
FEWEST_SEEDS = 3
"""With fewer an interval says nothing."""
SCALES = ("gpu", "cpu", "cpu_seconds", "small", "first")
"""Of result files, the one that counts more first. `first` is what the scale `cpu` once was: smaller clips, every arm's
rate tuned and its batch not, schedules over blocks alone."""
PAPER = (
    ("Bilibili", "full training", "132.06", ".128", "72", "–"),
    ("Bilibili", "Ent-Prog", "119.77", ".121", "53", "2.17"),
    ("TikTok", "full training", "385.64", ".316", "72", "–"),
    ("TikTok", "Ent-Prog", "264.03", ".268", "44", "1.52"),
    ("TikTok", "no adaptive schedule", "382.41", ".272", "", "2.11"),
    ("TikTok", "no CEI", "285.94", ".270", "", "1.95"),
)
"""The paper's own: data, training, FVD, LPIPS, GB, times as fast."""


def leave(results: Path, docs: Path = ROOT / "docs") -> Path | None:
    """Write the document and its charts; None where no study has been run yet."""
    found = {
        scale: json.loads(path.read_text()) for scale in SCALES if (path := results / f"study_{scale}.json").exists()
    }
    if not found:
        return None
    sections = "\n\n".join(section(scale, record, docs / "study") for scale, record in found.items())
    path = docs / "study.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    first = results / "small_first.json"
    page = FRAME.read_text().replace("<!-- figures -->", sections)
    path.write_text(page.replace("<!-- small first -->", small_first(first) if first.exists() else "Not measured yet."))
    return path


SMALL_FIRST = {
    "small_full": "half resolution for half of the budget, then whole clips; all blocks (`progressive`)",
    "small4": "half resolution for nine tenths of it, then whole clips; all blocks",
    "small_res": "half resolution for half of it, half of the blocks, residual",
    "small_full_res": "half resolution (all blocks), then a quarter and half of the blocks, residual",
    "small_rot": "half resolution for two thirds, a quarter of the blocks drawn anew 24 times, residual",
    "rot_res": "a quarter of the blocks drawn anew 24 times, residual",
    "rot_cei": "a quarter of the blocks drawn anew 24 times in proportion to CEI, residual",
    "rot_ex": "a quarter of the blocks drawn anew 24 times, exact",
    "lin_res": "linear over blocks, residual",
    "res25": "the best quarter of the blocks throughout, residual",
    "badam": "BAdam",
    "paper": "Ent-Prog as in the paper",
    "ent_shapes": "a search over clip shapes and blocks",
    "ent_shapes_only": "a search over clip shapes",
}
"""Runs of results/small_first.json, by the word in their names."""


def small_first(path: Path) -> str:
    """The table of clip shapes against blocks: each run against plain training of its seed, rate and batch."""
    runs: dict[tuple[str, str, str], dict[int, Mapping[str, Any]]] = {}
    for name, run in json.loads(path.read_text())["runs"].items():
        data, rest = name.replace(", search", "").rsplit(", ", 1)
        word, _, seed = rest.split(" rate ")[0].split(" ")
        curve = [{**point, "spent": point["spent_flops"]} for point in run["curve"]]
        runs.setdefault((data, f"{run['rate']:g}", word), {})[int(seed)] = {**run, "curve": curve}
    rows = []
    for (data, rate, word), mine in runs.items():
        if word == "full":
            continue
        pairs = [(run, runs[data, rate, "full"][seed]) for seed, run in mine.items()]
        curves = [(run["curve"], plain["curve"]) for run, plain in pairs]
        never = not all(study_figures.reached(own, plain) for own, plain in curves)
        rows.append(
            {
                "clips": data,
                "rate": rate,
                "schedule": SMALL_FIRST[word],
                "× as soon": "never" if never else _each([study_figures.sooner(*both, "spent") for both in curves]),
                "by CPU time": "never" if never else _each([study_figures.sooner(*both, "cpu_s") for both in curves]),
                "final loss": _each([own[-1]["loss"] for own, _ in curves], ".3f"),
                "plain's": _each([plain[-1]["loss"] for _, plain in curves], ".3f"),
                "PSNR": _each([run["psnr"] for run, _ in pairs], ".1f"),
                "plain's PSNR": _each([plain["psnr"] for _, plain in pairs], ".1f"),
            }
        )
    return _markdown(rows)


def _each(values: Sequence[float | None], digits: str = ".2f") -> str:
    return ", ".join("–" if value is None else format(value, digits) for value in values)


# ---- the document ----


def section(scale: str, record: Mapping[str, Any], folder: Path) -> str:
    """All that one result file says."""
    arms, lines = record["arms"], []
    sizes = ", ".join(
        f"{family} {base['parameters'] / 1e6:.2g} M parameters in {base['blocks']} blocks"
        for family, base in record["bases"].items()
    )
    lines.append(f"## Scale `{scale}`")
    lines.append(
        f"`benchmarks/results/study_{scale}.json`: {record['device']}, commit {_short(record['commit'])} (runs: "
        f"{', '.join(map(_short, record['commits']))}; +: with changes that were not committed). Networks: {sizes}. "
        f"Every run may spend {record['budget']}; the clock is {record['clock_is']}."
        + (f" {record['units_left']} of the study's units have not been run." if record["units_left"] else "")
    )
    tuned = edges(record["tuning"], "Learning rates") + edges(record.get("tuning_batches", {}), "Batches")
    lines.append(verdict(arms) + tuned)
    lines.append("### Fine-tuning on rendered people, new motions and bodies (Wan's shape)\n\n" + table(arms))
    study_charts.loss_chart(arms, record["clock"], folder / f"{scale}_loss.png")
    study_charts.ratio_chart(arms, folder / f"{scale}_ratio.png")
    lines.append(
        f"![held-out loss of some arms over the budget](study/{scale}_loss.png)\n\n"
        f"![how much sooner than full training each arm reached its loss](study/{scale}_ratio.png)"
    )
    if compared := beside_own(arms):
        lines.append(compared)
    for name, others in record["tasks"].items():
        lines.append(f"### {TASKS_IN_WORDS.get(name, name)}\n\n" + table(others))
    lines.append(scores(record["cei"], folder / f"{scale}_cei.png", scale))
    lines.append(choices(record["hindsight"]))
    lines.append(gradients(record["residual"]))
    lines.append(beside_paper(arms))
    return "\n\n".join(lines)


def _short(commit: str) -> str:
    return commit[:8] + ("+" if commit.endswith("+") else "")


TOLD = ("paper", "progressive", "rotating", "rotating_tokens", "rotating_routed", "past")
"""Arms that the page describes in sentences."""


def verdict(arms: Mapping[str, Any]) -> str:
    """What the numbers say, in sentences made of them."""
    losses = {name: arm["held_out_loss"] for name, arm in arms.items()}
    titles = {name: arm["title"].removeprefix("… ") for name, arm in arms.items()}
    said = [f"**{titles[name]}**: {in_words(arms[name])}." for name in TOLD if name in arms]
    others = [name for name, arm in arms.items() if name != "full" and len(arm["seeds"]) >= FEWEST_SEEDS]
    if others:
        best = min(others, key=losses.get)
        said.append(
            f"Lowest mean loss of all arms but full training with {FEWEST_SEEDS} seeds or more: {titles[best]}, "
            f"{losses[best]:.4f} against {losses['full']:.4f}"
            f"{'' if losses[best] < losses['full'] else ': no arm beat plain training'}."
        )
    changes = [name for name in arms if name.startswith("past_")]
    if "past" in arms and changes:
        worse = ", ".join(titles[name] for name in changes if losses[name] > losses["past"])
        better = ", ".join(titles[name] for name in changes if losses[name] <= losses["past"])
        said.append(
            f"Single changes to *past the paper* that made it worse: {worse or 'none'}; that did not: "
            f"{better or 'none'} (means over seeds; see the intervals before believing an order)."
        )
    return "\n".join(f"- {line}" for line in said)


def edges(tuning: Mapping[str, Any], what: str) -> str:
    """How many arms' best learning rate, or batch, lay at an end of what was tried."""
    lowest = highest = arms = 0
    for tried in (rates for of_task in tuning.values() for rates in of_task.values()):
        best = min(tried, key=tried.get)
        arms += 1
        lowest += float(best) == min(map(float, tried))
        highest += float(best) == max(map(float, tried))
    if not arms:
        return ""
    return (
        f"\n- {what}: of {arms} tunings {lowest} chose the lowest tried and {highest} the highest; a better one may "
        "lie beyond an end. Tries were shorter than the runs."
    )


def in_words(arm: Mapping[str, Any]) -> str:
    """One arm against full training."""
    ratio = arm["time_to_full_loss_ratio"]
    if ratio["median"] is None:
        return "full training itself ended no lower than it began: there is nothing to time"
    if len(arm["seeds"]) < FEWEST_SEEDS:
        found = "too few seeds to tell"
    elif ratio["low"] > 1 and ratio["reached"] < len(arm["seeds"]):
        found = "where a run never got there, both are timed at its own lowest loss, which flatters it"
    elif ratio["low"] > 1:
        found = "sooner than full training in every resample"
        if (arm["time_to_full_loss_ratio_cpu"]["median"] or 1) < 1:
            found += " by the clock, and later by CPU time"
    elif ratio["high"] < 1:
        found = "later than full training in every resample: plain training wins"
    else:
        found = "not distinguishable from full training by these seeds"
    if arm["loss_minus_full"]["low"] > 0 and len(arm["seeds"]) >= FEWEST_SEEDS:
        found += "; it ends above full training in every resample"
    own, final = spread(arm["time_to_full_loss_ratio_cpu"], ".2f"), spread(arm["loss_minus_full"])
    return (
        f"{spread(ratio, '.2f')} times as soon at full training's final loss, which {ratio['reached']} of "
        f"{len(arm['seeds'])} runs reached (by CPU time {own}); final loss {final} against it; {found}"
    )


def table(arms: Mapping[str, Any]) -> str:
    """Every arm, a row each."""
    metrics, full = list(arms["full"]["quality"]), arms["full"]
    rows = [
        {
            "arm": arm["title"],
            "loss": f"{arm['held_out_loss']:.4f}",
            "− full's": spread(arm["loss_minus_full"]),
            "× as soon": spread(arm["time_to_full_loss_ratio"], ".2f"),
            "reached": f"{arm['time_to_full_loss_ratio']['reached']}/{len(arm['seeds'])}",
            "by CPU time": _of_seeds(arm["time_to_full_loss_ratio_cpu"], len(arm["seeds"])),
            "steps": f"{arm['steps']:.0f}",
            "memory": f"{arm['memory_over_full']:.2f}",
            "at the same batch": "–" if (same := arm.get("memory_over_full_of_same_batch")) is None else f"{same:.2f}",
            "overhead": f"{arm['overhead']:.0%}",
            "CPU s": _over(arm["cpu_seconds"], full["cpu_seconds"]),
            "rate": f"{arm['learning_rate']:.0e}",
            **({"batch": arm["batch_size"]} if "batch_size" in full else {}),
            **{name: f"{arm['quality'][name]['mean']:.3g}" for name in metrics},
        }
        for arm in arms.values()
    ]
    cards = ", ".join(f"{name} {full['quality'][name]['card']['id']}" for name in metrics)
    return (
        _markdown(rows)
        + "\n\nLoss: mean over seeds, on clips that neither searches nor tuning saw. − full's, × as soon: median over "
        f"seeds [interval]. Memory: peak "
        "over full training's, each with its own batch, and over what full training takes with the arm's batch (–: "
        "never tried). "
        "–: full training ended no lower than it began, so that there is nothing to time. "
        "Overhead: share of the budget that search and scoring took. CPU s: over full training's, for the same budget "
        "(–: others worked on the machine, so that no seconds were kept). "
        f"Cards: {cards}."
    )


def _over(seconds: float | None, full: float | None) -> str:
    return "–" if None in (seconds, full) else f"{seconds / full:.2f}"


def _of_seeds(figure: Mapping[str, Any], seeds: int) -> str:
    """A median, with the number of seeds behind it where it is not that of all."""
    known = sum(value is not None for value in figure["by_seed"])
    return "–" if not known else f"{figure['median']:.2f}" + (f" ({known} of {seeds} seeds)" if known < seeds else "")


def beside_own(arms: Mapping[str, Any]) -> str:
    """Arms that took another one's rate and batch, seed by seed beside it; empty where there is none."""
    pairs = [(arm, arms.get(ARMS[name].tuned_as)) for name, arm in arms.items() if name in ARMS]
    rows = [_beside(arm, other) for arm, other in pairs if other]
    if not rows:
        return ""
    return (
        "Arms that took another arm's rate and batch, beside it: values are one a seed, in brackets the other arm's "
        "with the same seed.\n\n" + _markdown(rows)
    )


def _beside(arm: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, str]:
    places = [other["seeds"].index(seed) for seed in arm["seeds"]]

    def each(of: Callable[[Mapping[str, Any]], Sequence[float]], digits: str) -> str:
        return f"{_each(of(arm), digits)} ({_each([of(other)[place] for place in places], digits)})"

    against = [(curve, other["curves"][place]) for curve, place in zip(arm["curves"], places, strict=True)]
    return {
        "arm": arm["title"].removeprefix("… "),
        "seeds": ", ".join(map(str, arm["seeds"])),
        "× as soon as full training": each(lambda of: of["time_to_full_loss_ratio"]["by_seed"], ".2f"),
        "× as soon as the other at its final loss": _each([study_figures.sooner(*both, "spent") for both in against]),
        "loss": each(lambda of: of["held_out_losses"], ".4f"),
        "steps": each(lambda of: [curve[-1]["step"] for curve in of["curves"]], ".0f"),
        **{name: each(lambda of, name=name: of["quality"][name]["by_seed"], ".4g") for name in arm["quality"]},
    }


TAUS = {
    "tau_signed_to_loss": "τ(π, loss)",
    "tau_absolute_to_loss": "τ(|π|, loss)",
    "tau_signed_to_absolute": "τ(π, |π|)",
    "tau_halves": "τ of halves",
}


def scores(found: Mapping[str, Any], path: Path, scale: str) -> str:
    """CEI against the loss increase on skip."""
    if not found:
        return ""
    study_charts.cei_chart(found, path)
    rows = [
        {
            "network, clips": name.replace("_", ", "),
            "blocks": len(of["blocks"]),
            "draws": of["draws"],
            **{title: f"{of[tau]['median']:+.2f}" for tau, title in TAUS.items()},
            "blocks with π < 0": sum(value < 0 for value in of["pi"]),
        }
        for name, of in found.items()
    ]
    return (
        "### Does CEI say what a block is worth?\n\nKendall's τ between rankings of the blocks on the base, median "
        "over seeds of draws. Loss: how much the loss grows when the block is skipped.\n\n"
        + _markdown(rows)
        + f"\n\n![π and loss increase of every block](study/{scale}_cei.png)"
    )


def choices(found: Mapping[str, Any]) -> str:
    """How good the searches' choices were in hindsight."""
    title = "### Did the search choose well?\n\n"
    if not found:
        return title + "Not measured yet."
    rows = [
        {
            "arm": arm,
            "choices": of["choices"],
            "of them searched": sum(one["searched"] for one in of["decisions"]),
            "chose the best": of["best"],
            "by chance": f"{of['by_chance']:.1f}",
            "loss given away": f"{of['regret']:.4f}",
            "best to worst": f"{of['spread']:.4f}",
            "places": ", ".join(f"{one['place']}/{one['candidates']}" for one in of["decisions"]),
            "the best were": ", ".join(_plan(one["best"], one.get("shapes", 1)) for one in of["decisions"]),
        }
        for arm, of in found.items()
    ]
    return (
        title + "After a search each of its candidates was trained from the same weights for the rest of the stage's "
        "budget, and judged on clips that the search had not seen.\n\n" + _markdown(rows)
    )


def _plan(one: Mapping[str, Any], shapes: int) -> str:
    return f"{one['m']} {one['backward']}" + (f" of {one['shape']}" if shapes > 1 else "")


def gradients(found: Mapping[str, Any]) -> str:
    """What the residual gradient costs."""
    title = "### What does the residual gradient cost?\n\n"
    if not found["pairs"]:
        return title + "Not measured yet."
    return (
        title + f"{found['pairs']} pairs of candidates that train the same blocks from the same weights with either "
        f"backward. Loss of the residual one minus the exact one's: {spread(found['loss_minus_exact_at_same_steps'])} "
        f"at equal steps; {spread(found['loss_minus_exact_at_same_cost'])} at equal cost, where it takes "
        f"{found['steps_over_exact_at_same_cost']:.2f} times the steps (intervals over pairs)."
    )


IN_THE_PAPERS_WORDS = {
    "full": "full training",
    "paper": "Ent-Prog",
    "past": "past the paper",
    "past_linear": "past the paper, no adaptive schedule",
    "past_random": "past the paper, no CEI",
}


def beside_paper(arms: Mapping[str, Any]) -> str:
    """The paper's table, and ours in its shape."""
    head = ("data", "training", "FVD", "LPIPS", "memory, GB", "times as fast")
    rows = [dict(zip(head, row, strict=True)) for row in PAPER]
    for name, title in IN_THE_PAPERS_WORDS.items():
        if name in arms:
            perceptual = arms[name]["quality"].get("stlpips")
            lpips = f"{perceptual['mean']:.3f}*" if perceptual else "–"
            ratio, same = arms[name]["time_to_full_loss_ratio"], arms[name].get("memory_over_full_of_same_batch")
            fast = "–" if name == "full" or ratio["median"] is None else f"{ratio['median']:.2f}"
            ours = ("ours", title, "–", lpips, "–" if same is None else f"{same:.2f}×", fast)
            rows.append(dict(zip(head, ours, strict=True)))
    return (
        "### The paper's table beside ours\n\n"
        + _markdown(rows)
        + "\n\nIn shape alone: other networks, data and hardware; the paper's times are of one run each, until it "
        "judged quality equal, without the costs of scoring and search. *: stlpips, another distance. Ours: memory "
        "over full training's with as many clips a step (–: never tried); times as fast to full training's final "
        "held-out loss, everything charged."
    )


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


TASKS_IN_WORDS = {
    "latte_rendered": "The same with Latte's shape: spatial and temporal blocks apart",
    "wan_real": "Real clips, the fourth camera held out (the learning rates of the rendered task)",
}
