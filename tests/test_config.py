"""Settings: one spelling, merged part by part, wrong ones refused with the close match."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ByteSize

from entprog import config
from entprog.errors import UserError
from pipelines import cli

names = st.sampled_from(["a", "b", "c"])
nested = st.recursive(st.integers(), lambda inner: st.dictionaries(names, inner, max_size=3), max_leaves=8)
mappings = st.dictionaries(names, nested, max_size=3)


@given(mappings, mappings)
def test_merging_keeps_what_is_not_named_and_takes_what_is(base, over):
    merged = config.flat(config.merge(base, over))
    for name, value in config.flat(over).items():
        assert merged[name] == value
    assert config.merge(base, {}) == base and config.merge(base, base) == base


def test_an_empty_part_takes_nothing_away():
    assert config.merge({"data": {"shape": {"frames": 5}}}, {"data": {"shape": {}}}) == {
        "data": {"shape": {"frames": 5}}
    }


def test_parts_of_model_init_that_are_named_leave_the_others():
    """Without them a command would build a network of the class's own size, which may be 14 billion parameters."""
    file = {"model": {"init": {"num_layers": 2, "patch_size": [1, 2, 2]}}}
    over = config.parse_overrides(["model.init.patch_size=[1,8,8]", "model.init.eps=1e-5"])
    named = {"patch_size": ["1", "8", "8"], "eps": "1e-5"}
    assert config.merge(file, over)["model"]["init"] == {"num_layers": 2, **named}
    assert config.merge({}, over)["model"]["init"] == named
    assert config.merge(file, config.parse_overrides(["model.init={eps: 1}"]))["model"]["init"].keys() == {"eps"}


def test_model_init_is_one_value():
    assert config.merge({"model": {"init": {"a": 1}}}, {"model": {"init": {}}}) == {"model": {"init": {}}}


@pytest.mark.parametrize("name", config.presets(cli.PRESETS))
def test_every_preset_builds_and_survives_its_own_json(name):
    experiment = cli.settings(config.Experiment, name, None, None)
    assert experiment.name == name
    assert config.build(experiment.model_dump(mode="json")) == experiment


def test_order_of_precedence(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {steps: 7, learning_rate: 1e-3}")
    own = {"steps": 8, "seed": 3}
    experiment = cli.settings(config.Experiment, "demo", [tmp_path / "a.yaml"], ["train.steps=9"], train=own)
    assert (experiment.train.steps, experiment.train.seed, experiment.train.learning_rate) == (9, 3, 1e-3)


def test_every_setting_is_explained():
    assert all(meaning for _, _, _, meaning in config.settings_help())


def test_help_names_the_words_that_settings_take_and_explains_what_lies_in_parts():
    meanings = {name: meaning for name, _, meaning in config.explained()}
    assert meanings.keys() >= {name for name, *_ in config.settings_help()}
    for name, words in {
        "priority.kind": "cei, reverse_cei, gradient, fisher, loss_increase, random, depth_first, depth_last",
        "model.gradient_checkpointing": "true, false, on_host, keep_attention",
        "train.timestep_shift": "auto",
        "model.conditions": "reference, pose",
        "schedule.backward": "exact, residual",
        "schedule.table[].choose": "top, random, weighted",
    }.items():
        assert meanings[name].endswith(f" Words: {words}."), name
    for name in ("train.steps", "train.lora", "train.lora.rank", "schedule.table", "schedule.shapes[].shrink"):
        assert meanings[name] and "Words:" not in meanings[name], name


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["train.step=4"], "did you mean train.steps"),
        (["cei_threshold=4"], "did you mean schedule.cei_threshold"),
        (["train.steps"], "has no value"),
        (["train.steps=[1"], "not a YAML value"),
        (["train.steps=many"], "setting train.steps"),
        (["train=4", "train.steps=4"], "already given"),
        (["train.steps=!!int 4x"], "not a YAML value"),
        (["train.steps=!!python/object:os.system"], "not a YAML value"),
        (["model.init=&a {a: *a}"], "not a YAML value"),
        (["model.init=" + "[" * 2000], "not a YAML value"),
        (["train={steps: 4, seed: 1, steps: 5}"], "steps stands in line 1 and again in line 1"),
        (["train.steps=yes"], "setting train.steps"),
        (["train.steps=true"], "setting train.steps"),
        (["train.steps=1.5"], "setting train.steps"),
        (["train.learning_rate=.inf"], "setting train.learning_rate: must be a finite number"),
        (["train.learning_rate=inf"], "setting train.learning_rate: must be a finite number"),
        (["train.learning_rate=.nan"], "setting train.learning_rate: must be a finite number"),
        (["schedule.candidates=[0.5, .nan]"], "setting schedule.candidates"),
        (["train.lora.alpha=.inf"], "setting train.lora"),
        (["model.init={eps: .inf}"], "setting model.init: needs finite numbers"),
        (["priority.timestep_range=[0.9, 0.1]"], "two rising numbers within 0 and 1"),
        (["priority.timestep_range=[0.4, 0.4]"], "two rising numbers within 0 and 1"),
        (["priority.timestep_range=[-3, 7]"], "two rising numbers within 0 and 1"),
        (["priority.timestep_range=[0.1, .inf]"], "setting priority.timestep_range"),
        (["schedule.memory_budget_bytes=much"], "setting schedule.memory_budget_bytes"),
        (["schedule.memory_budget_bytes=12 elephants"], "must be a size, as 24GB: there is no byte unit elephants"),
        (["schedule.memory_budget_bytes=0GB"], "schedule.memory_budget_bytes: must be more than 0, given"),
        (["schedule.memory_budget_bytes=9GB", "train.frozen_state=keep"], "in no plan's memory"),
        (["train.steps=soon"], "setting train.steps: must be a whole number, given 'soon'"),
        (["data.latents=perhaps"], "setting data.latents: must be 'auto'"),
        (["train.drop=4"], "setting train.drop: must be a mapping of settings (--help-settings names them), given"),
        (["train.cooldown_share=2"], "setting train.cooldown_share: must be 1 or less, given 2"),
        (["schedule.table=[{share: 1}]"], "setting schedule.table.0.until: is missing, given {'share': 1}"),
        (["train.lora.rank=x"], "setting train.lora.rank: must be a whole number, given 'x'"),
        (
            ["model.gradient_checkpointing=perhaps"],
            "setting model.gradient_checkpointing: must be true or false or ",
        ),
        (["phases.one.train.step=4"], "did you mean train.steps"),
        (["schedule.candidates=[0.5,2]"], "setting schedule.candidates"),
    ],
)
def test_wrong_settings_are_one_line(pairs, message, tmp_path):
    with pytest.raises(UserError) as error:
        config.phases(cli.settings(config.Experiment, "demo", None, pairs), tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_dry_run_shows_what_differs_from_the_defaults():
    plain = cli.settings(config.Experiment, None, None, ["train.steps=3"])
    assert config.changed(plain) == {"train.steps": 3}
    pairs = ["train.steps=3", "schedule.candidates=[0.5, 1]", "train.lora.rank=4", "data.shape.fps=7", "train.seed=0"]
    changed = config.changed(cli.settings(config.Experiment, None, None, pairs))
    assert changed["schedule.candidates"] == [0.5, 1.0] and changed["data.shape.fps"] == 7
    assert changed["train.lora.rank"] == 4 and "train.seed" not in changed


WRITTEN = [
    ("train.gpus", "yes", "yes"),
    ("train.gpus", "no", "no"),
    ("train.gpus", "'no'", "no"),
    ("tracking.run_name", "2024", "2024"),
    ("tracking.run_name", "010", "010"),
    ("tracking.run_name", "1e3", "1e3"),
    ("tracking.run_name", "2024-01-31", "2024-01-31"),
    ("tracking.run_name", "12:30", "12:30"),
    ("tracking.run_name", "no", "no"),
    ("tracking.run_name", "true", "true"),
    ("tracking.run_name", "null", None),
    ("tracking.run_name", "", None),
    ("train.steps", "010", 10),
    ("train.steps", "0x10", 16),
    ("train.steps", "1_000", 1000),
    ("train.steps", "'12'", 12),
    ("train.learning_rate", "1e-4", 1e-4),
    ("train.learning_rate", "3", 3.0),
    ("train.gradient_clip", "null", None),
    ("train.gradient_clip", "~", None),
    ("schedule.monotone", "yes", True),
    ("schedule.monotone", "off", False),
    ("schedule.monotone", "true", True),
    ("schedule.backward", "[exact, residual]", ("exact", "residual")),
    ("train.lora.targets", "[no, 1e3]", ("no", "1e3")),
    ("train.lora.rank", "4", 4),
    ("model.init.norm", "no", "no"),
    ("model.init.layers", "[1, 0.5, true, null, a]", [1, 0.5, True, None, "a"]),
    ("schedule.memory_budget_bytes", "1.5 GiB", 3 * 2**29),
    ("schedule.memory_budget_bytes", "24GB", 24 * 10**9),
    ("schedule.memory_budget_bytes", "1000", 1000),
]


@pytest.mark.parametrize(("name", "text", "wanted"), WRITTEN)
def test_a_value_means_what_its_setting_wants_in_options_files_and_phases(tmp_path, name, text, wanted):
    def value(experiment):
        for part in name.split("."):
            experiment = experiment[part] if isinstance(experiment, dict) else getattr(experiment, part)
        return experiment

    nested = text
    for part in reversed(name.split(".")):
        nested = f"{{{part}: {nested}}}"
    (tmp_path / "a.yaml").write_text(nested)
    (tmp_path / "phase.yaml").write_text(f"phases: {{first: {nested}}}")
    experiment = cli.settings(config.Experiment, "demo", None, [f"{name}={text}"])
    assert value(experiment) == wanted and type(value(experiment)) in (type(wanted), ByteSize)
    assert value(cli.settings(config.Experiment, "demo", [tmp_path / "a.yaml"], None)) == wanted
    if not name.startswith("model.init"):  # the first phase's alone
        (phase,) = config.phases(
            cli.settings(config.Experiment, "demo", [tmp_path / "phase.yaml"], None), tmp_path
        ).values()
        assert name == "tracking.run_name" or value(phase) == wanted
    assert config.build(experiment.model_dump(mode="json")) == experiment


@pytest.mark.parametrize("text", ["yes", "no"])
@pytest.mark.parametrize(
    ("whole", "section"),
    [(config.Generation, "generate"), (config.Evaluation, "evaluate"), (config.Experiment, "train")],
)
def test_gpus_are_asked_for_as_documented(tmp_path, whole, section, text):
    preset = "demo" if whole is config.Experiment else None
    (tmp_path / "gpus.yaml").write_text(f"{section}: {{gpus: {text}}}")
    for chosen in (
        cli.settings(whole, preset, None, [f"{section}.gpus={text}"]),
        cli.settings(whole, preset, [tmp_path / "gpus.yaml"], None),
    ):
        assert getattr(chosen, section).gpus == text


def test_settings_of_sources_stay_names(tmp_path):
    (tmp_path / "a.yaml").write_text("prepare: {held_out: [007, no, 12.5]}")
    assert cli.settings(config.Preparation, None, [tmp_path / "a.yaml"], None).prepare.held_out == ("007", "no", "12.5")


def test_sections_given_apart_are_joined_and_the_last_value_counts():
    pairs = ["train.steps=4", "train={seed: 3, warmup_steps: 5}", "train.warmup_steps=6"]
    train = cli.settings(config.Experiment, "demo", None, pairs).train
    assert (train.steps, train.seed, train.warmup_steps) == (4, 3, 6)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("train: {steps: 3}\ndata: {batch_size: 2}\ntrain: {seed: 5}\n", ("train", 1, 3)),
        ("train:\n  steps: 3\n  seed: 1\n  steps: 4\n", ("steps", 2, 4)),
        ('{"train": {"steps": 3},\n "train": {"seed": 5}}', ("train", 1, 2)),
        ("phases:\n  one: {train: {steps: 3}}\n  one: {train: {steps: 3}}\n", ("one", 2, 3)),
        ("model:\n  init:\n    layers: 3\n    'layers': 4\n", ("layers", 3, 4)),
    ],
)
def test_a_name_twice_in_a_file_is_refused_with_both_lines(tmp_path, text, lines):
    (tmp_path / "a.yaml").write_text(text)
    name, first, second = lines
    with pytest.raises(UserError, match=f"a.yaml: {name} stands in line {first} and again in line {second}") as error:
        cli.settings(config.Experiment, "demo", [tmp_path / "a.yaml"], None)
    assert "\n" not in str(error.value)


def test_an_anchor_may_be_merged_and_an_empty_section_says_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "phases:\n  one: &common\n    train: {steps: 3}\n  two:\n    <<: *common\n    data: {batch_size: 7}\n"
        "train:\n  # steps: 5\ntracking:\n"
    )
    experiment = cli.settings(config.Experiment, "demo", [tmp_path / "a.yaml"], None)
    assert experiment.phases["two"] == {"train": {"steps": 3}, "data": {"batch_size": 7}}
    assert experiment.train.steps == 300


JOBS = [
    (config.Experiment, "demo"), (config.Sweep, "demo"), (config.Preparation, None), (config.Preparation, "demo"),
    (config.Encoding, "wan21_t2v_1_3b"), (config.Generation, None), (config.Evaluation, None),
    (config.Comparison, None),
]  # fmt: skip


@pytest.mark.parametrize(("whole", "preset"), JOBS)
def test_one_file_serves_all_jobs(tmp_path, whole, preset):
    """A file with every job's settings: each job takes its own and leaves the others'."""
    (tmp_path / "all.yaml").write_text(
        "data: {shape: {fps: 7}, batch_size: 3}\ntrain: {steps: 3, lora: {rank: 2}}\ntune: {trials: 3}\n"
        "prepare: {margin: 0.3}\ngenerate: {steps: 2}\nevaluate: {clips: 1}\ncompare: {samples: 0}\n"
        "model: {init: {num_layers: 1}}\nphases: {one: {train: {steps: 4}}}\nschedule: {shapes: [{shrink: 2}]}\n"
    )
    chosen = config.flat(cli.settings(whole, preset, [tmp_path / "all.yaml"], None).model_dump(mode="json"))
    wanted = {
        "data.shape.fps": 7, "data.batch_size": 3, "train.steps": 3, "tune.trials": 3, "prepare.margin": 0.3,
        "generate.steps": 2, "evaluate.clips": 1, "compare.samples": 0,
        "schedule.shapes": [{"frames": None, "shrink": 2}],
    }  # fmt: skip
    assert {name: chosen[name] for name in wanted if name in chosen} == {k: v for k, v in wanted.items() if k in chosen}
    assert any(name in chosen for name in wanted)
    for wrong in ("train: {step: 3}", "prepare: {marginn: 3}", "generate: {stepss: 3}", "trainn: {steps: 3}"):
        (tmp_path / "wrong.yaml").write_text(wrong)
        with pytest.raises(UserError, match=r"unknown setting .*did you mean"):
            cli.settings(whole, preset, [tmp_path / "wrong.yaml"], None)
    with pytest.raises(UserError, match="unknown setting"):  # what is said to this job alone must be its own
        cli.settings(whole, preset, None, ["nothing.of_the_kind=3"])


def test_no_setting_takes_what_is_not_finite():
    def numbers(part, prefix=""):
        for name, field in part.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, config.Part):
                yield from numbers(field.annotation, f"{prefix}{name}.")
            elif "float" in str(field.annotation):
                yield f"{prefix}{name}", "tuple" in str(field.annotation)

    for whole in (config.Sweep, config.Preparation, config.Generation, config.Evaluation, config.Comparison):
        for name, several in numbers(whole):
            for text in (".nan", ".inf", "-.inf"):
                if (name, text) == ("generate.seconds", ".inf"):  # all of the motion
                    continue
                value = f"[{text}, {text}]" if several else text
                with pytest.raises(UserError, match=name):
                    cli.settings(whole, "demo" if whole is config.Sweep else None, None, [f"{name}={value}"])


@pytest.mark.parametrize("steps", [0, 1001, 10**9])
def test_nobody_who_asks_a_served_model_keeps_it_busy_for_ever(steps):
    with pytest.raises(UserError, match=r"generate\.steps"):
        config.build({"generate": {"steps": steps}}, config.Generation)
