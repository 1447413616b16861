"""AdamW with smaller moments: what they come to, what resumes keep, what they take, whom they are refused to."""

import functools

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from entprog import config, optimizers
from entprog.cost import counting, measuring
from entprog.diffusion.losses import training_loss
from entprog.errors import UserError
from entprog.optimizers import eight_bit
from entprog.optimizers.rounded import RoundedAdamW, generator, rounded
from entprog.training import checkpoint, optimizer
from helpers.networks import TINY, latents, tiny_experiment
from helpers.runs import Run, comparable, course

SMALL = ("adamw_bf16", "adamw_8bit")
ANEW = [{"until": 0.7, "share": 0.34, "choose": "random", "redraw_every": 2}, {"until": 1, "share": 0.5}]
WIDE = {**TINY, "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 4}
"""So wide that its layers have moments in 8 bits."""


@pytest.fixture(autouse=True)
def _not_compiled():
    """torchao's update as it is written, not compiled shape by shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def settings(kind, **parts):
    values = {
        "model": {"init": WIDE, "dtype": "bfloat16"},
        "train": {"steps": 8, "optimizer": kind, "ema_decay": 0.9},
        "schedule": {"kind": "progressive", "table": ANEW, "backward": "residual"},
    }
    return tiny_experiment(**config.merge(values, parts))


@pytest.mark.parametrize("kind", SMALL)
def test_it_goes_where_adamw_goes(kind):
    torch.manual_seed(0)
    target, ends = torch.randn(64, 64), {}
    for each in ("adamw", kind):
        weight = nn.Parameter(torch.zeros(64, 64))
        adamw = optimizers.make(each, [weight], 1e-2, weight_decay=0.1)
        for _ in range(150):
            weight.grad = weight.detach() - target
            adamw.step()
        ends[each] = weight.detach().clone()
    apart = (ends[kind] - ends["adamw"]).norm() / ends["adamw"].norm()
    assert 0 < apart < 0.03


def test_rounding_has_the_right_mean_and_leaves_what_bfloat16_holds():
    values = torch.tensor([1.0 + 2**-10, -3.0 - 2**-9, 1e-30, 0.0, 6.5])
    many = torch.stack([rounded(values.clone(), generator(torch.device("cpu"), 0, n)) for n in range(4000)])
    assert many.dtype == torch.bfloat16 and len(many[:, 0].unique()) == 2
    torch.testing.assert_close(many.double().mean(0), values.double(), rtol=1e-3, atol=0)
    assert torch.equal(many[:, 3:].float(), values[3:].expand(4000, 2))


def test_a_second_moment_falls_once_gradients_are_small():
    """By a thousandth at a step, which rounding to the nearest bfloat16 would lose every time."""
    weight = nn.Parameter(torch.zeros(1000))
    adamw = RoundedAdamW([weight], 1e-3)
    for size in [1.0] * 200 + [0.0] * 1000:
        weight.grad = torch.full_like(weight, size)
        adamw.step()
    expected = (1 - 0.999**200) * 0.999**1000
    assert adamw.state[weight]["exp_avg_sq"].float().mean().item() == pytest.approx(expected, rel=0.02)


def test_draws_depend_on_seed_update_and_parameter_alone():
    def after(seed, updates, first=True):
        weights = [nn.Parameter(torch.ones(300)) for _ in range(2)]
        adamw = RoundedAdamW(weights, 1e-2, seed=seed)
        for update in updates:
            adamw.param_groups[0]["update"] = update
            for weight in weights[not first :]:  # whether another is trained beside it changes nothing
                weight.grad = torch.full((300,), 0.3)
            adamw.step()
        return adamw.state[weights[1]]["exp_avg"]

    same = after(0, (0, 1))
    assert torch.equal(same, after(0, (0, 1))) and torch.equal(same, after(0, (0, 1), first=False))
    assert not torch.equal(same, after(1, (0, 1))) and not torch.equal(same, after(0, (0, 2)))


@pytest.mark.parametrize("kind", SMALL)
def test_resume_equals_no_interruption_while_blocks_freeze_and_thaw(kind, tmp_path):
    whole = Run(settings(kind))
    expected = course(whole, {5: tmp_path})
    second = Run(settings(kind), tmp_path)
    assert [comparable(step) for step in second.steps()] == expected[5:]
    assert len({step["plan"].trainable for step in expected}) > 2
    kept, again = (checkpoint.contents(run.denoiser.network, run.state) for run in (whole, second))
    assert kept.keys() == again.keys() and all(torch.equal(kept[name], again[name]) for name in kept)
    moments = {t.dtype for name, t in kept.items() if name.startswith("moments/exp_avg_sq") and t.ndim > 1}
    assert moments == ({torch.bfloat16} if kind == "adamw_bf16" else {torch.uint8, torch.float32})
    plain = Run(settings("adamw"))
    losses = [step.held_out_loss for step in plain.steps()]
    assert losses[-1] == pytest.approx(expected[-1]["held_out_loss"], rel=0.02)


@pytest.mark.parametrize("kind", ("adamw", *SMALL))
def test_bytes_are_counted_and_foreseen(kind):
    run = Run(settings(kind, train={"steps": 1}, schedule={"table": [{"until": 1}]}))
    (step,) = run.steps()
    network, trained = run.denoiser.network, [p for p in run.denoiser.network.parameters() if p.requires_grad]
    loss = functools.partial(training_loss, run.denoiser, latents([0]), run.experiment.train)
    counted = counting.count(network, trained, loss, kind)
    large = [p for p in trained if p.numel() >= 4096 and p.numel() % 256 == 0]
    rest = 8 * sum(p.numel() for p in trained) - 8 * sum(p.numel() for p in large)
    if kind == "adamw_8bit":
        moments = sum(2 * p.numel() + 2 * 4 * p.numel() // 256 for p in large) + rest
    else:
        moments = counted.gradient_bytes * {"adamw": 2, "adamw_bf16": 1}[kind]
    assert step.optimizer_bytes == moments + 4 * len(trained)  # and the number of updates of each
    assert counted.moment_bytes == pytest.approx(moments, rel=0.02 if kind != "adamw_8bit" else 0.6)
    outside = [p for group in run.denoiser.outside().values() for p in group]
    model = measuring.measure(network, run.found, outside, loss, clips=1, seconds=True, optimizer=kind)
    assert model.moments == optimizers.MOMENTS[kind] and model.update_per_byte > 0
    names = [block.name for block in run.found]
    assert model.memory(names, "exact") == pytest.approx(counted.memory_bytes(1), rel=0.05)


@pytest.mark.parametrize("kind", SMALL)
def test_moments_follow_the_freeze(kind):
    weight = nn.Parameter(torch.randn(64, 64))
    adamw = optimizers.make(kind, [weight], 1e-2)
    weight.grad = torch.randn(64, 64)
    adamw.step()
    before = {n: t.clone() for n, t in optimizers.parts(adamw.state[weight]["exp_avg"]).items()}
    optimizer.follow(adamw, [], "host")
    optimizer.follow(adamw, [weight], "host")
    after = optimizers.parts(adamw.state[weight]["exp_avg"])
    assert all(torch.equal(after[name], before[name]) for name in before)
    optimizer.follow(adamw, [], "drop")
    assert optimizer.state_bytes(adamw, torch.device("cpu")) == 0


@pytest.mark.parametrize("kind", ["adamw", *SMALL])
def test_moments_come_to_their_weights_device_and_torchaos_counts_stay_on_the_host(kind):
    """Where it is compiled for them."""
    weight = nn.Parameter(torch.empty(64, 64, device="meta"))
    adamw = optimizers.make(kind, [weight], 1e-2)
    adamw.state[weight] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(64, 64)}  # as a checkpoint is loaded
    optimizer.follow(adamw, [weight], "host")
    where = {name: value.device.type for name, value in adamw.state[weight].items()}
    assert where == {"step": "cpu" if kind == "adamw_8bit" else "meta", "exp_avg": "meta"}


def test_what_cannot_be_is_refused_in_one_line(monkeypatch, tmp_path):
    from pipelines import train

    given = ["--set", "train.steps=1", "--shards", str(tmp_path / "shards"), "--output", str(tmp_path / "out")]
    wrong = CliRunner().invoke(train.app, [*given, "--set", "train.optimizer=adam"])
    assert wrong.exit_code == 2 and "train.optimizer" in wrong.output and "adamw_bf16" in wrong.output
    with pytest.raises(UserError, match=r"train\.parallel=fsdp does not go"):
        settings("adamw_8bit", train={"parallel": "fsdp"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lacking = CliRunner().invoke(train.app, [*given, "--set", "train.optimizer=adamw_8bit"])
    assert lacking.exit_code == 2 and ".[fp8]" in lacking.output and "Traceback" not in lacking.output
    with pytest.raises(UserError, match="adamw_bf16"):
        eight_bit.check_installed()
    assert not (tmp_path / "out").exists()
