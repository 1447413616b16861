"""How long a checkpoint keeps training waiting, against the copy to the host that it cannot do without.

    python -m benchmarks.checkpointing

Interleaved, of one network with its gradients and moments:

    step                 a training step, nothing being saved
    copy                 every tensor of a checkpoint copied to the host: the least that a save must wait for
    save                 what `checkpoint.Saver.save` keeps training from: the rest is written by a thread
    save_and_write       the same until the checkpoint is complete: what saving without a thread would cost
    step_while_writing   a training step right after `save`, while the thread writes

Leaves benchmarks/results/checkpointing.json.
"""

import os
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import common, scaling
from entprog import config
from entprog.training import checkpoint
from pipelines import terminal
from pipelines.command import usage

SHAPE = {"frames": 2, "height": 32, "width": 32, "fps": 12}
"""Short clips: a step that is quick for the size of its network."""

app = usage.app("How long a checkpoint keeps training waiting.")


@app.command()
def main(
    layers: Annotated[list[int] | None, typer.Option(help="Blocks of the network; may be given again.")] = None,
    heads: Annotated[int, typer.Option(min=1, help="Heads of 32 channels.")] = 24,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = common.default_device(),
    folder: Annotated[Path | None, typer.Option(help="Where to save; a temporary folder if not given.")] = None,
) -> None:
    """Measure each network; print and keep the figures."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        figures = [measured(count, heads, repeats, device, place) for count in layers or (2, 8)]
    path = common.write("checkpointing", figures, device=device, repeats=repeats, more={"cores": os.cpu_count()})
    for row in figures:
        common.show(f"{row['layers']} blocks", [{"figure": key, "value": value} for key, value in row.items()])
    terminal.console.print(f"kept in {path}")


def measured(layers: int, heads: int, repeats: int, device: str, folder: str) -> dict[str, Any]:
    """One network's figures. Ratios are (median, smallest, largest) over rounds."""
    init = scaling.SETTINGS["model"]["init"]
    init = init | {"num_layers": layers, "num_attention_heads": heads, "ffn_dim": heads * 128}
    settings = config.merge(scaling.SETTINGS, {"model": {"init": init}, "data": {"shape": SHAPE, "batch_size": 1}})
    worker = scaling.Worker("full", settings, device)
    worker.step()  # from then on there are moments
    network, state = worker.denoiser.network, worker.state
    tensors = checkpoint.contents(network, state)
    with closing(checkpoint.Saver(Path(folder, str(layers)), "benchmark", keep=1, warn=_failed)) as saver:

        def prepare(arm: str) -> None:
            saver.wait()
            if arm == "step_while_writing":
                saver.save(network, state)

        def save_and_write() -> None:
            saver.save(network, state)
            saver.wait()

        arms = {
            "step": worker.step,
            "copy": lambda: [tensor.detach().to("cpu", copy=True) for tensor in tensors.values()],
            "save": lambda: saver.save(network, state),
            "save_and_write": save_and_write,
            "step_while_writing": worker.step,
        }
        found = common.interleaved(arms, repeats, device, prepare=prepare)
    return {
        "layers": layers,
        "checkpoint_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        **{f"{name}_s": each.median_s for name, each in found.items()},
        **{f"{name}_s_spread": each.spread_s for name, each in found.items()},
        "save_over_copy": common.ratio(found["save"], found["copy"]),
        "save_over_save_and_write": common.ratio(found["save"], found["save_and_write"]),
        "step_while_writing_over_step": common.ratio(found["step_while_writing"], found["step"]),
        "copy_gb_per_s": sum(t.nbytes for t in tensors.values()) / found["copy"].median_s / 1e9,
    }


def _failed(line: str) -> None:
    raise OSError(line)


if __name__ == "__main__":
    torch.set_num_threads(1)
    app()
