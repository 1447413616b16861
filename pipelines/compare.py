"""Compare: MLflow runs → a verdict on the terminal and one self-contained HTML page.

python -m pipelines.compare --experiment entprog --output out/compare
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from entprog import storage
from entprog.config import Comparison
from entprog.errors import UserError
from entprog.masking import masked
from entprog.storage import Where
from pipelines import cli, terminal
from pipelines.command import usage
from pipelines.comparison import drawings, page, runs, samples, words
from pipelines.comparison import groups as grouping
from pipelines.comparison.groups import Difference, Group
from pipelines.comparison.runs import Training
from pipelines.comparison.verdict import Estimate, Judged, Verdict, judge
from pipelines.outputs import claim
from pipelines.tracking.store import tracking_uri

app = usage.app("Compare training runs of an MLflow experiment: what is sooner at the target loss, beyond seed noise?")
GROUPS_BESIDE = 4
"""Groups that a terminal has room for side by side."""


@app.command()
def main(
    experiment: Annotated[str, typer.Option(help="MLflow experiment of the runs.")] = "entprog",
    runs: Annotated[
        str | None,
        typer.Option(
            metavar="ID,NAME,OUTPUT,…",
            help="Only these runs: ids, names, outputs of trainings, or a sweep's run or output for all its trials.",
        ),
    ] = None,
    output: Annotated[str, typer.Option(help="Folder of the page, also s3:// or gs://.")] = "out/compare",
    target_loss: Annotated[
        float | None,
        typer.Option(help="Held-out loss whose reaching is timed; unless given the baseline's (compare.target_loss)."),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Run or group that the others are compared with (compare.baseline).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compare unlike runs too; the page says so.")] = False,
    config_file: cli.ConfigFile = None,
    set_: cli.Set = None,
    dry_run: cli.DryRun = False,
    verbose: cli.Verbose = False,
    help_settings: cli.help_settings(Comparison) = False,
) -> None:
    """Put runs side by side: held-out loss at equal seconds, time to a target loss with its interval over seeds,
    memory, what search and scoring cost and when they had paid off, trained blocks, scores, quality, samples.

    Runs that differ only in train.seed are one group. Runs that were made on other data, held-out clips, base or
    device, or judged by other protocol cards, are refused unless --force. Leaves in OUTPUT: comparison.html (one file,
    no network needed), result.json.
    """

    def work() -> dict[str, Any]:
        own = {"target_loss": target_loss, "baseline": baseline}
        wanted = [word.strip() for word in (runs or "").split(",") if word.strip()]
        chosen = cli.settings(Comparison, None, config_file, set_, compare=own)
        folder = cli.output_of(output)
        return run(experiment, folder, chosen, wanted=wanted, force=force, dry_run=dry_run)

    cli.run("compare", None if dry_run else output, work, verbose=verbose)


def run(
    experiment: str,
    output: str | Where,
    settings: Comparison | None = None,
    *,
    wanted: Sequence[str] = (),
    force: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Compare; returns the figures of result.json: `runs`, `groups`, `target_loss`, `time_to_target_ratio`, `page`, ….

    wanted: run ids, names and outputs, none for all of the experiment. Raises UserError if the runs are unlike and not
    `force`.
    """
    chosen, output = (settings or Comparison()).compare, storage.at(output, "the output")
    # A page is drawn anew from the store: to what target, and against which baseline, may change in the same output.
    identity = {"--experiment": experiment, "--runs": sorted(wanted)}
    claim.check(output, "compare", identity)
    with runs.read(experiment, wanted, lambda line: terminal.complain("note", line)) as trainings:
        evaluations = {t.run_id: found for t in trainings if (found := t.evaluation())}
        unlike = grouping.differences(trainings, {key: _cards(e) for key, e in evaluations.items()})
        if unlike and not force:
            more = f" (and {len(unlike) - 1} more)" if len(unlike) > 1 else ""
            raise UserError(
                f"{unlike[0]}{more}: choose runs that are alike with --runs (outputs, names or ids), or mark it in "
                "the page with --force"
            )
        found = grouping.grouped(trainings, chosen.baseline, unlike)
        if dry_run:
            return _explain(found, output)
        verdict = judge(found, chosen.target_loss, chosen.confidence)
        facts = page.Facts(
            experiment=experiment, store=masked(tracking_uri()), command=cli.command(), commit=cli.commit(),
            made_s=time.time(),
        )  # fmt: skip
        shown = [judged.group for judged in verdict.judged][: drawings.COLOURS]
        clips = samples.rows(shown, chosen.samples, chosen.sample_bytes)
        previews = samples.over_time(shown, chosen.sample_bytes) if chosen.samples else []
        html = page.render(verdict, unlike, evaluations, clips, previews, facts)
    claim.take(output, "compare", identity)
    path = output / "comparison.html"
    path.write_bytes(html.encode())
    _show(verdict, unlike, path)
    return figures(verdict, unlike) | {"page": str(path)}


def _cards(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """{metric: the card that goes with its figure}."""
    return {name: evaluation["cards"][figure["card"]] for name, figure in evaluation["figures"].items()}


def figures(verdict: Verdict, unlike: Sequence[Difference]) -> dict[str, Any]:
    """What result.json says."""
    best = verdict.best
    return {
        "headline": words.headline(verdict),
        "target_loss": verdict.target_loss,
        "target_is": verdict.target_is,
        "baseline": verdict.baseline.group.label,
        "time_to_target_ratio": _ratio(best) if best else None,
        "groups": [_group(judged) for judged in verdict.judged],
        "runs": [_run(training, judged.group) for judged in verdict.judged for training in judged.group.runs],
        "forced": [asdict(difference) for difference in unlike],
        "confidence": verdict.confidence,
        "confidence_against_baseline": verdict.level,
    }


def _ratio(judged: Judged) -> dict[str, Any]:
    """A group's speed-up: the baseline's seconds to the target divided by the group's."""
    ratio = judged.ratio or Estimate(None, None, None, len(judged.group.counted))
    return {"group": judged.group.label, **asdict(ratio), "at_most": judged.ratio_at_most}


def _group(judged: Judged) -> dict[str, Any]:
    plain = {k: v for k, v in vars(judged).items() if k != "group" and not isinstance(v, Estimate)}
    estimates = {k: asdict(v) for k, v in vars(judged).items() if isinstance(v, Estimate)}
    about = {"label": judged.group.label, "settings": judged.group.settings}
    return about | {"run_ids": [run.run_id for run in judged.group.runs]} | plain | estimates


def _run(training: Training, group: Group) -> dict[str, Any]:
    about = {"run_id": training.run_id, "name": training.name, "group": group.label, "status": training.status}
    known = {name: value if math.isfinite(value) else None for name, value in training.figures.items()}  # strict JSON
    return about | {"seed": training.seed, "counts": training.counts} | known


def _explain(found: Sequence[Group], output: Where) -> dict[str, Any]:
    rows = [
        (group.label, ", ".join(f"{run.title} seed {run.seed} {run.status}" for run in group.runs)) for group in found
    ]
    terminal.show("Groups, the baseline first", rows, ("group", "runs"))
    terminal.console.print(f"Would compare them and write {output / 'comparison.html'}.")
    return {}


def _show(verdict: Verdict, unlike: Sequence[Difference], path: Where) -> None:
    table = page.summary(verdict)
    names, labels = [name for name, _ in table["columns"]], [row["key"]["label"] for row in table["rows"]]
    cells = [row["cells"] for row in table["rows"]]
    if len(labels) <= GROUPS_BESIDE:
        columns, rows = ("", *labels), [(name, *column) for name, *column in zip(names, *cells, strict=True)]
    else:
        kept = [names.index(name) for name in ("Runs", "Held-out loss", "Time to target", "Net speed-up")]
        columns = ("group", *(names[place] for place in kept))
        rows = [(label, *(row[place] for place in kept)) for label, row in zip(labels, cells, strict=True)]
    compared = [judged.group for judged in verdict.judged]
    if len(compared) <= GROUPS_BESIDE and any(group.is_named for group in compared):
        differing = page.settings_table(compared)
        settings = zip(differing["names"], *(row["cells"] for row in differing["rows"]), strict=True)
        terminal.show("What the groups differ in", list(settings), ("setting", *labels))
    terminal.console.print(f"\n{words.headline(verdict)}", style="bold")
    for line in words.remarks(verdict):
        terminal.console.print(line)
    for difference in unlike:
        terminal.complain("forced", f"these runs are not alike: {difference}")
    for line in words.warnings(verdict):
        terminal.complain("note", line)
    terminal.show(f"Target: held-out loss {verdict.target_loss:.5g} ({verdict.target_is})", rows, columns)
    terminal.console.print(f"Page: {path}")


if __name__ == "__main__":
    app()
