"""What weights, gradients and moments take on a device: counted on the real classes of Wan, without their weights.

    python -m benchmarks.memory               # seconds

Bytes that each plan holds whatever its clips are (`entprog.cost.holding`), of networks with input channels for
reference and pose. Plans train all blocks, the first quarter of them, or adapters of rank 16 in all of them; what lies
outside blocks is trained too, with adapters the input layer alone. Leaves benchmarks/results/memory.json.
"""

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from benchmarks import common
from entprog import config, models
from entprog.blocks import blocks
from entprog.config import Experiment
from entprog.cost.holding import held
from entprog.models import lora
from entprog.schedule import plans
from pipelines import terminal
from pipelines.command import usage

app = usage.app("What weights, gradients and moments take on a device.")

NETWORKS = {
    "Wan 2.1 1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "in_channels": 3 * 16},
    "Wan 2.2 TI2V 5B": {
        "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 3 * 48, "out_channels": 48,
    },
    "Wan 14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "in_channels": 3 * 16},
}  # fmt: skip
WAYS = {"float32": ("full", "adamw"), "auto": ("auto", "adamw")}
WAYS |= {name: ("auto", name) for name in ("adamw_bf16", "adamw_8bit")}
WAYS |= {f"{precision}, adamw_8bit": (precision, "adamw_8bit") for precision in ("fp8_alone", "nf4")}
"""What frozen layers are stored in, and the optimizer."""
PLANS = ("all blocks", "a quarter", "LoRA")


@app.command()
def main() -> None:
    """Count, print and keep the bytes."""
    figures = [
        row(name, sizes, way, plan) for name, sizes in NETWORKS.items() for way in WAYS for plan in PLANS
    ]  # fmt: skip
    shown = ("network", "stored", "plan", "device_bytes")
    common.show("bytes", [{name: figure[name] for name in shown} for figure in figures])
    terminal.console.print(f"kept in {common.write('memory', figures, device='cpu', repeats=1)}")


def row(name: str, sizes: dict[str, Any], way: str, plan: str) -> dict[str, Any]:
    """The bytes of one plan of one network."""
    precision, optimizer = WAYS[way]
    experiment = settings(precision, optimizer, adapters=plan == "LoRA")
    models.family("wan")  # its blocks are known from then on
    with torch.device("meta"):
        network = WanTransformer3DModel(**sizes)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        found = blocks(network)
        if experiment.train.lora:
            lora.add(network, found, experiment.train.lora, seed=0)
    names = [block.name for block in found]
    trained = names[: plans.count(0.25, len(names))] if plan == "a quarter" else names
    bytes_held = held(network, found, trained, outside(network, plan), experiment)
    return {
        "network": name, "parameters": parameters, "stored": way, "plan": plan, "device_bytes": bytes_held.device,
        "weights_bytes": bytes_held.weights, "gradients_bytes": bytes_held.gradients,
        "moments_bytes": bytes_held.moments, "host_bytes": bytes_held.host,
    }  # fmt: skip


def settings(precision: str, optimizer: str, *, adapters: bool) -> Experiment:
    return config.build(
        {
            "model": {"dtype": "bfloat16"},
            "train": {"steps": 1, "optimizer": optimizer, "lora": {"rank": 16} if adapters else None},
            "schedule": {"kind": "progressive", "frozen_precision": precision},
        }
    )


def outside(network: nn.Module, plan: str) -> list[nn.Parameter]:
    """What is trained outside blocks."""
    if plan == "LoRA":
        return list(network.patch_embedding.parameters())
    inside = {parameter for block in blocks(network) for parameter in block.module.parameters()}
    return [parameter for parameter in network.parameters() if parameter not in inside]


if __name__ == "__main__":
    app()
