"""What trials say: known responses are found, noise is not taken for one, the front is the front."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import tune

import pipelines.tune
from entprog import config, files
from entprog.data import shards
from entprog.models import fingerprints
from entprog.training import curves
from helpers.networks import tiny_experiment
from pipelines.sweeping import findings, sweep, trial
from pipelines.training import steplog

SPACE = {
    "schedule.cei_threshold": tune.uniform(0.0, 0.5),
    "priority.sign": tune.choice(["signed", "absolute"]),
    "train.learning_rate": tune.loguniform(1e-5, 1e-3),
}
TUNE = config.Tune(seeds=2)


def rows(loss, count=40, noise=0.002, seed=0):
    """Trials drawn from SPACE whose loss is a function of their settings, with a spread over two seeds."""
    rng = np.random.RandomState(seed)
    out = []
    for number in range(count):
        values = {name: domain.sample(random_state=rng) for name, domain in SPACE.items()}
        losses = [loss(values) + noise * rng.randn() for _ in range(2)]
        trainings = [
            {"seed": i, "held_out_loss": y, "steps": 100, "curve": [(5.0, 2 * y), (20.0, 1.2 * y), (60.0, y)],
             "seconds": 60.0, "search_seconds": 5.0, "score_seconds": 1.0, "peak_memory_bytes": 100 + number,
             "seconds_to_target": None, "mlflow_run_id": "x"}
            for i, y in enumerate(losses)
        ]  # fmt: skip
        out.append({"id": f"t{number}", "settings": values, "status": "finished", "seeds": trainings})
        out[-1] |= trial.summary(trainings)
    return out


def found(trials):
    evidence = findings.evidence(trials, SPACE, 60.0, TUNE)
    best = min(trials, key=lambda row: row["held_out_loss"])
    return findings.findings(evidence, SPACE, best, trials, 2)


def test_a_known_response_is_found():
    """The loss rises beyond a threshold of 0.3 and hardly knows the sign; the learning rate does nothing."""
    said = found(rows(lambda v: 0.1 + max(0.0, v["schedule.cei_threshold"] - 0.3)))
    assert next(iter(said["importance"])) == "schedule.cei_threshold"
    assert sum(said["importance"].values()) == pytest.approx(1, abs=1e-3)
    response = said["responses"]["schedule.cei_threshold"]
    assert {w["value"] for w in response["worse"]} >= {v for v in response["values"] if v > 0.42}
    assert all(v in response["alike"] for v in response["values"] if v < 0.25)
    line = next(line for line in said["recommendation"] if line.startswith("schedule.cei_threshold"))
    assert "makes no difference beyond seed noise" in line and "0.5 costs" in line
    for name in ("priority.sign", "train.learning_rate"):
        line = next(line for line in said["recommendation"] if line.startswith(name))
        assert "no value makes a difference" in line


@pytest.mark.parametrize("seed", range(2))
def test_noise_alone_is_no_finding(seed):
    said = found(rows(lambda v: 0.1, noise=0.01, seed=seed))
    assert said["seed_noise"] == pytest.approx(0.01, rel=0.4)
    assert not any(response["worse"] for response in said["responses"].values())
    assert "no worse beyond seed noise" in said["recommendation"][0]


def test_the_best_of_few_equal_trials_is_seldom_called_better_than_noise():
    """Of two trials of two seeds each the noise itself is hardly known: two standard deviations are 17 % of sweeps."""
    rng = np.random.default_rng(0)
    claimed = 0
    for losses in 0.1 + 0.01 * rng.normal(size=(1000, 2, 2)):
        trials = [
            {"id": f"t{n}", "status": "finished", "held_out_loss": mean, "held_out_loss_std": std, "seeds": [{}, {}]}
            for n, (mean, std) in enumerate(zip(losses.mean(1), losses.std(1, ddof=1), strict=True))
        ]
        best = min(trials, key=lambda row: row["held_out_loss"])
        claimed += ", beyond seed noise" in findings._headline(best, trials, findings.seed_noise(trials), 2)
    assert 0.03 < claimed / 1000 < 0.07
    same = [row | {"held_out_loss_std": 0.0} for row in trials]
    assert findings.seed_noise(same) == 0.0, "known, and none"


def test_few_trials_or_one_seed_are_said():
    trials = rows(lambda v: 0.1, count=4)
    assert any("too few" in line for line in found(trials)["recommendation"])
    for row in trials:
        row["held_out_loss_std"] = None
    said = found(trials)
    assert said["seed_noise"] is None and "may be chance" in said["recommendation"][0]
    worse = {"value": "absolute", "excess": 0.005, "low": 0.001, "high": 0.01}
    response = {"alike": ["signed"], "worse": [worse], "failed": []}
    line = findings.in_words("priority.sign", response, SPACE, None, known_noise=False)
    assert "absolute in this one seed seems to cost 0.005 more loss" in line
    for row in trials:
        row["seeds"][0]["steps"] = 3
    assert any("too short" in line for line in found(rows(lambda v: 0.1, count=12) + trials)["recommendation"])


def test_stopped_trials_are_judged_where_all_have_been():
    trials = rows(lambda v: 0.1 + v["schedule.cei_threshold"], count=12)
    for row in trials[3:]:
        row["status"] = "stopped"
        row["seeds"] = [{"curve": row["seeds"][0]["curve"][:2]}]  # until 20 of 60 s
    evidence = findings.evidence(trials, SPACE, 60.0, config.Tune(rungs=2, reduction=3))
    assert "after 20 charged seconds" in evidence.label and len(evidence.losses) == 12
    assert evidence.losses[0] == pytest.approx(1.2 * trials[0]["seeds"][0]["held_out_loss"])
    assert evidence.seeds == 1 and "of their first seed" in evidence.label, "noise is not that of means of two"
    assert evidence.noise == pytest.approx(1.2 * findings.seed_noise(trials[:3]), rel=1e-6)
    every = findings.evidence(rows(lambda v: 0.1), SPACE, 60.0, TUNE)
    assert every.seeds == 2


def test_what_early_stopping_has_shown_to_be_bad_is_said_to_be():
    """Most trials of a bad rate, or of the bad sign, were stopped at the first decision: those that finished are of
    good values alone, and say nothing of the others."""

    def loss(values):
        bad = 0.05 if values["priority.sign"] == "absolute" else 0.0
        return 0.1 + 0.02 * abs(math.log(values["train.learning_rate"] / 3e-4)) + bad

    trials = sorted(rows(loss, count=36), key=lambda row: row["held_out_loss"])
    for place, row in enumerate(trials):
        for seed in row["seeds"]:
            seed["curve"] = [(5.0, seed["held_out_loss"] + 0.08), (7.0, seed["held_out_loss"] + 0.06)]
            seed["curve"] += [(60.0, seed["held_out_loss"])] if place < 10 else []
        if place >= 10:
            row |= {"status": "stopped", "seeds": row["seeds"][:1]}
    said = found(trials)
    assert {row["settings"]["priority.sign"] for row in trials[:10]} == {"signed"}
    sign, rate = said["responses"]["priority.sign"], said["responses"]["train.learning_rate"]
    assert [worse["value"] for worse in sign["worse"]] == ["absolute"]
    low, high = findings._around(rate)
    assert 1e-4 < low <= 3.2e-4 <= high < 1e-3 and rate["worse"][0]["value"] == pytest.approx(1e-5)
    lines = "\n".join(said["recommendation"])
    assert "priority.sign (explains" in lines and "take signed; absolute costs" in lines
    assert "after 11% of the budget" in lines and "36 trials" in lines


def test_values_of_which_only_failed_trials_tell_are_not_called_as_good(monkeypatch):
    """A forest goes on flat from the last trial that has a loss into where all of them diverged."""
    monkeypatch.setattr(findings, "BOOTSTRAPS", 8)

    def diverges(values):
        return values["train.learning_rate"] > 2e-4 or values["priority.sign"] == "absolute"

    trials = rows(lambda v: 0.1 + v["schedule.cei_threshold"], count=48)
    trials = [
        {"id": row["id"], "settings": row["settings"], "status": "failed"} if diverges(row["settings"]) else row
        for row in trials
    ]
    left = [row for row in trials if row["status"] == "finished"]
    evidence = findings.evidence(trials, SPACE, 60.0, TUNE)
    said = findings.findings(evidence, SPACE, min(left, key=lambda row: row["held_out_loss"]), trials, 2)
    known = [row["settings"]["train.learning_rate"] for row in left]
    rate, sign = said["responses"]["train.learning_rate"], said["responses"]["priority.sign"]
    assert rate["values"][-1] == max(known) <= 2e-4 < rate["failed"][-1] <= 1e-3
    assert rate["values"][0] <= min(known) and sign["values"] == ["signed"] and set(sign["failed"]) == {"absolute"}
    assert said["responses"]["schedule.cei_threshold"]["worse"], "what the others tell is told"
    lines = "\n".join(said["recommendation"])
    assert f"{len(trials) - len(left)} of 48 trials failed" in lines
    above = sum(value > max(known) for value in rate["failed"])
    assert f"above {max(known):.3g}, where all {above} trials failed." in lines
    assert f"take signed; not judged: absolute, with which all {len(sign['failed'])} trials failed." in lines


def test_trials_on_another_device_are_not_ranked():
    """A trial on a quicker one has a lower loss at equal seconds whatever its settings are."""
    trials = rows(lambda v: 0.1, count=6)
    ran_on = ["A100", "H100, A100", "A100", None, "H100", "H100"]
    statuses = ["finished"] * 5 + ["failed"]
    trials = [row | {"device": d, "status": how} for row, d, how in zip(trials, ran_on, statuses, strict=True)]
    judged, apart = findings.of_one_device(trials)
    assert [row["id"] for row in judged] == ["t0", "t2", "t3", "t5"] and [row["id"] for row in apart] == ["t1", "t4"]
    assert "2 of 6 trials ran on another device than A100 (t1 on H100, A100; t4 on H100)" in findings.of_devices(
        judged, apart
    )
    assert findings.of_one_device(rows(lambda v: 0.1, count=2))[1] == [], "of an earlier version's nothing is known"


def test_steps_of_a_range_may_be_rounded():
    space = {**SPACE, "train.ema_decay": tune.quniform(0, 0.4, 0.1)}
    trials = rows(lambda v: 0.1 + v["schedule.cei_threshold"], count=12)
    for number, row in enumerate(trials):
        row["settings"]["train.ema_decay"] = 0.1 * (number % 5) if number else 0.05  # as first trials had it once
    shares = findings.importance(findings.evidence(trials, SPACE, 60.0, TUNE), space)
    assert shares["schedule.cei_threshold"] > shares["train.ema_decay"]


def test_a_best_in_another_objective_is_not_called_below_the_next():
    trials = rows(lambda v: 0.1, count=10)
    worst = max(trials, key=lambda row: row["held_out_loss"])
    said = findings.findings(findings.evidence(trials, SPACE, 60.0, TUNE), SPACE, worst, trials, 2)
    assert "best in the first objective; trial" in said["recommendation"][0]


VALUES = st.one_of(st.none(), st.integers(0, 4))


@given(st.lists(st.tuples(st.integers(0, 4), VALUES), min_size=1, max_size=12))
def test_the_front_is_what_none_beats(points):
    names = ("held_out_loss", "seconds_to_target")
    found = findings.pareto([dict(zip(names, point, strict=True)) | {"n": n} for n, point in enumerate(points)], names)
    kept = {row["n"] for row in found}
    whole = [tuple(math.inf if x is None else x for x in point) for point in points]
    for n, a in enumerate(whole):
        beaten = any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in whole)
        assert (n in kept) != beaten
    assert kept


POINTS = st.tuples(st.integers(0, 10_000).map(lambda n: n / 100), st.integers(10, 2000).map(lambda n: n / 1000))
CURVES = st.lists(POINTS, min_size=1, max_size=10, unique_by=lambda point: point[0]).map(sorted)


@given(CURVES, st.floats(0, 120))
def test_loss_between_evaluations_is_between_their_losses(curve, seconds):
    loss = curves.at(curve, seconds)
    assert min(y for _, y in curve) - 1e-9 <= loss <= max(y for _, y in curve) + 1e-9
    for x, y in curve:
        assert curves.at(curve, x) == y


@given(CURVES, st.floats(0.01, 2))
def test_the_target_is_reached_where_the_curve_first_comes_down_to_it(curve, target):
    reached = curves.crossing(curve, target)
    if reached is None:
        assert all(y > target for _, y in curve)
    else:
        assert curves.at(curve, reached) <= target + 1e-6
        assert all(y > target for x, y in curve if x < reached)


@settings(max_examples=50)
@given(CURVES.filter(lambda curve: curve[-1][0] > 1), st.integers(2, 27))
def test_every_share_of_the_budget_is_reported_once_in_order(curve, of):
    message = []
    ticks = trial.Ticks(100.0, of, message.append)
    for x, y in curve:
        ticks.on_item({"step": {"charged_s": x, "held_out_loss": None}})
        ticks.on_item({"step": {"charged_s": x, "held_out_loss": y}})
    assert [r["tick"] for r in message] == list(range(1, min(int(curve[-1][0] / 100 * of + 1e-9), of - 1) + 1))
    for report in message:
        first = next(i for i, (x, _) in enumerate(curve) if x >= report["tick"] * 100 / of)
        assert report["held_out_loss"] == curves.at(curve[: first + 1], report["tick"] * 100 / of)


def test_a_search_that_goes_on_hears_again_what_a_trial_had_reported(tmp_path):
    """Its scheduler is a new one, which would take the next share for the trial's first."""
    before, after = [], []
    ticks = trial.Ticks(90.0, 9, before.append)
    log = steplog.StepLog(tmp_path / "steps.jsonl", 0)
    for number in range(1, 6):
        step = {"step": number, "charged_s": 10.0 * number, "held_out_loss": 1 / number}
        log.add(step)
        ticks.on_item({"step": step})
    log.close()
    again = trial.Ticks(90.0, 9, after.append)
    again.resume(tmp_path)
    assert after == before and [tick["tick"] for tick in after] == [1, 2, 3, 4, 5]
    again.on_item({"step": {"step": 6, "charged_s": 60.0, "held_out_loss": 0.1}})
    assert [tick["tick"] for tick in after] == [1, 2, 3, 4, 5, 6]


def test_a_sweep_that_goes_on_judges_as_one_that_was_never_ended(tmp_path):
    """Wherever it was ended. Some trials report again what they had reported, as those do that train
    when it ends."""
    chosen = config.Tune(rungs=2, reduction=2)
    random = np.random.default_rng(0)
    order = [name for name in "abcdefgh" for _ in range(3)]
    losses = {name: iter([*random.random(2), math.inf]) for name in "abcdefgh"}
    ticks = dict.fromkeys("abcdefgh", 0)
    said = []
    for name in random.permutation(order):
        ticks[name] += 1
        said.append((str(name), {"tick": ticks[name], "held_out_loss": float(next(losses[name]))}))

    def judged(scheduler, results):
        for name in "abcdefgh":  # as Ray Tune does with all trials, those that it has restored and those to come
            scheduler.on_trial_add(None, sweep._Heard(name))
        return [scheduler.on_trial_result(None, sweep._Heard(name), result) for name, result in results]

    due = judged(sweep.scheduler(chosen), said)
    assert {"STOP", "CONTINUE"} == set(due)
    records = {name: {"reports": {}} for name in "abcdefgh"}
    for number, (name, result) in enumerate(said):
        scheduler = sweep.scheduler(chosen, trial.reports(tmp_path))
        again = [each for each in said[:number] if each[0] in "abc"]
        assert judged(scheduler, again + said[number:])[len(again) :] == due[number:], number
        trial._reported(lambda tick: None, trial.folder_of(tmp_path, name), records[name], {**result, "charged_s": 1.0})
    assert trial.reports(tmp_path) == said


@pytest.mark.parametrize(("other", "said"), [("data", "other clips"), ("weights", "other weights")])
def test_a_trial_on_other_inputs_than_the_sweep_began_with_has_failed(other, said, tmp_path):
    place = Path(pipelines.tune.__file__).parent / "demo_person"
    experiment = tiny_experiment(data={"shards": str(place)})
    about = {"tables": "", "tracking_uri": "", "cluster": "local", "sweep_run_id": ""}
    about |= {"data": shards.read_dataset(place).fingerprint, "weights": fingerprints.base(experiment.model)}
    spec = trial.Spec(experiment=experiment.model_dump(mode="json"), tune=config.Tune().model_dump(mode="json"),
                      output=str(tmp_path), **about | {other: "another"})  # fmt: skip
    assert trial.run({}, spec, "a", pytest.fail)["held_out_loss"] == math.inf
    row = pipelines.tune._row(tmp_path, "a", "TERMINATED")
    assert row["status"] == "failed" and f"has got {said} since this sweep began" in row["reason"]
    assert [path.name for path in trial.folder_of(tmp_path, "a").iterdir()] == [trial.RECORD], "nothing was begun"


@pytest.mark.parametrize(
    ("losses", "said"),
    [([0.3, 0.2], None), ([0.3, math.nan], "not finite after 60 s"), ([math.inf], "not finite after 30 s")],
)
def test_a_trial_that_is_ended_for_its_loss_has_failed_whatever_it_was_before(losses, said, tmp_path):
    """Tune ends a trial between two steps: what it says of itself was written before."""
    folder = trial.folder_of(tmp_path, "a")
    (folder / "seed-0").mkdir(parents=True)
    log = steplog.StepLog(folder / "seed-0" / "steps.jsonl", 0)
    record = {"id": "a", "settings": {}, "status": "running", "seeds": [], **trial._kept(folder)}
    trial._listen(folder, record, "seed-0", None, {"about": {"entprog.device": "H100", "entprog.way": "as by default"}})
    assert trial._kept(folder)["devices"] == {"seed-0": "H100"}, "a trial that goes on knows what it ran on before"
    ticks = trial.Ticks(90.0, 3, partial(trial._reported, lambda tick: None, folder, record))
    for number, loss in enumerate(losses, 1):
        step = {
            "step": number, "charged_s": 30.0 * number, "held_out_loss": loss, "memory_bytes": 1, "stage": 0,
            "phase": "train", "seconds": 1.0, "wait_s": 0.0, "search_s": 3.0, "score_s": 1.0,
        }  # fmt: skip
        log.add(step)
        trial._listen(folder, record, "seed-0", ticks, {"step": step})
    log.close()
    row = pipelines.tune._row(tmp_path, "a", "TERMINATED")
    assert row["status"] == ("failed" if said else "stopped")
    assert said is None or said in row["reason"]
    assert said or (row["held_out_loss"], row["search_seconds"]) == (losses[-1], 3.0)
    assert row["device"] == "H100"


def test_figures_of_seeds():
    results = [
        {"held_out_loss": loss, "seconds": 1.0, "search_seconds": 0.5, "score_seconds": 0.1, "peak_memory_bytes": m,
         "seconds_to_target": reached, "mlflow_run_id": "x"}
        for loss, m, reached in ((1.0, 5, 3.0), (2.0, 7, None))
    ]  # fmt: skip
    said = trial.summary(results)
    assert (said["held_out_loss"], said["peak_memory_bytes"], said["seconds_to_target"]) == (1.5, 7, None)
    assert said["held_out_loss_std"] == pytest.approx(math.sqrt(0.5))
    assert trial.summary(results[:1])["held_out_loss_std"] is None
    assert trial.objective("seconds_to_target", said, 10.0) == 20.0


def test_two_writers_of_one_file_share_no_scratch_file(tmp_path):
    """Not even those whose processes have one number, in containers that share a disk: the last one's text is whole."""
    path = tmp_path / "a.json"
    with files.whole(path) as mine, files.whole(path) as other:
        mine.write_text("mine")
        other.write_text("other")
    assert path.read_text() == "mine" and [each.name for each in tmp_path.iterdir()] == ["a.json"]
