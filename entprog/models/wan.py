"""Wan: diffusers' `WanTransformer3DModel`, with reference image and pose as extra input channels.

Where the network comes from (`model.base`): a transformer's own folder, a diffusers pipeline's folder, a hub name, or
a folder that `WanDenoiser.save` wrote. Of a pipeline only `transformer/`, `vae/` and the scheduler's shift are read;
of Wan 2.2's two networks that is the one for high noise, `transformer_2` is left alone (give its folder to train it).

What the network sees, channel by channel: the noisy latents; the base's own further inputs, fed zeros (a Wan I2V
checkpoint's mask and image: as if no image was given; its image tokens are zeros too); then `reference` and `pose`,
as many channels each as the latents. A condition that the base lacks starts with zero weights, and its part of the
input layer is computed apart and added (`SplitConv3d`): y + 0 = y, so step 0 equals the base bit for bit.

Text cross-attention sees `model.prompt_embeds`, or zeros. Attention over equal tokens does not depend on how many
they are, so one zero token does what 512 would.
"""

import inspect as python_inspect
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from entprog import config, folders
from entprog.blocks import bypass
from entprog.clips import Clips, Latents
from entprog.config import ClipShape, close_to
from entprog.errors import UserError
from entprog.geometry import Geometry
from entprog.media.color import yuv420_to_rgb
from entprog.media.skeleton import draw
from entprog.models import families, family

CLASS = "WanTransformer3DModel"
CONDITIONS = ("reference", "pose")
"""Order in which new conditions enter the input layer."""
I2V_TEXT_TOKENS = 512
"""Number of text tokens that diffusers' Wan attention assumes where image tokens come before them."""


@bypass.register
def _(module: WanTransformerBlock, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    return hidden_states


class SplitConv3d(nn.Conv3d):
    """A Conv3d as a sum over groups of input channels: y = Σ_g w_g * x_g + b.

    In exact arithmetic a plain Conv3d with the same parameters. Summing group by group makes a group whose weights
    are zero leave the others' bits alone, whatever order of summation the device's kernels choose.
    """

    splits: tuple[int, ...]
    """Input channels of each group."""

    @classmethod
    def of(cls, conv: nn.Conv3d, splits: Sequence[int]) -> "SplitConv3d":
        """The same layer, its input channels grouped; channels that `conv` lacks come last, with zero weights."""
        total = sum(splits)
        new = cls(total, conv.out_channels, conv.kernel_size, stride=conv.stride, device="meta")
        zeros = conv.weight.new_zeros(conv.out_channels, total - conv.in_channels, *conv.kernel_size)
        new.weight = nn.Parameter(torch.cat([conv.weight.detach(), zeros], dim=1))
        new.bias = nn.Parameter(conv.bias.detach().clone())
        new.splits = tuple(splits)
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = zip(x.split(self.splits, dim=1), self.weight.split(self.splits, dim=1), strict=True)
        first, *others = parts
        y = self._conv_forward(*first, self.bias)
        for part in others:
            y = y + self._conv_forward(*part, None)
        return y


@dataclass(frozen=True)
class WanDenoiser:
    """A Wan network with its VAE, conditions and text (`entprog.models.Denoiser`)."""

    network: WanTransformer3DModel
    vae: AutoencoderKLWan | None
    """None: the network works on pixels."""
    conditions: tuple[str, ...]
    """In the order of the network's input channels."""
    text: torch.Tensor
    """Text tokens [1, tokens, text_dim]."""
    image: torch.Tensor | None
    """Zero image tokens [rows, tokens, image_dim] of one clip for I2V networks."""
    autocast: torch.dtype | None
    """Type of the forward pass; None: float32."""
    shape: ClipShape | None
    """Clip shape that a saved checkpoint was trained on, if it says so."""
    shift: float
    """Timestep shift for sampling."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where it came from: kept in `entprog.json`."""

    @property
    def device(self) -> torch.device:
        return self.network.proj_out.weight.device

    @property
    def latent_channels(self) -> int:
        return self.network.config.out_channels

    @property
    def _geometry(self) -> Geometry:
        return Geometry.of(self.network.config, self.vae and self.vae.config)

    def check(self, shape: ClipShape) -> None:
        """Raises UserError if clips of this shape do not fit the VAE or the network's patches."""
        self._geometry.check(shape)

    def latent_shape(self, shape: ClipShape) -> tuple[int, int, int, int]:
        """Clip shape → C, F', H', W' of one clip's latents."""
        return self.latent_channels, *self._geometry.latents(shape)

    @torch.no_grad()
    def encode(self, clips: Clips) -> Latents:
        """Clips → latents and conditions on the network's device, no gradient.

        The VAE's mode is taken, not a sample: latents do not depend on when or where they were computed.
        """
        planes = clips.video.to(self.device, non_blocking=True)
        clean = self._latents(yuv420_to_rgb(planes).transpose(1, 2))
        return Latents(clean, self.condition(clips.reference, clips.pose), clips.position)

    @torch.no_grad()
    def condition(self, reference: torch.Tensor, pose: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the network sees beside the noisy clip: {name: float32 [B, C, F', H', W']}, on the network's device.

        reference uint8 [B, H, W, 3] is encoded as a clip of one frame and repeated; pose float [B, F, 33, 3] is drawn
        and encoded as a video.
        """
        frames, (height, width) = pose.shape[1], reference.shape[1:3]
        out = {}
        if "reference" in self.conditions:
            pixels = reference.to(self.device, non_blocking=True).permute(0, 3, 1, 2).unsqueeze(2)
            repeated = self._geometry.latent_frames(frames)
            out["reference"] = self._latents(pixels.float() / 127.5 - 1).expand(-1, -1, repeated, -1, -1)
        if "pose" in self.conditions:
            drawn = draw(pose.to(self.device, non_blocking=True), height, width)
            out["pose"] = self._latents(drawn.transpose(1, 2))
        return out

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        """Velocity ε - x_0, float32 [B, C, F', H', W'], of noisy latents [B, C, F', H', W'] at flow times t [B]."""
        given = [noisy, *(conditions[name] for name in self.conditions)]
        unused = self.network.config.in_channels - self.latent_channels * len(given)
        if unused:
            given.insert(1, noisy.new_zeros(1).expand(len(noisy), unused, *noisy.shape[2:]))
        half = self.autocast is not None
        with torch.autocast(noisy.device.type, self.autocast) if half else nullcontext():
            (velocity,) = self.network(
                hidden_states=torch.cat(given, dim=1) if len(given) > 1 else noisy,
                timestep=t.float() * 1000,
                encoder_hidden_states=self.text.expand(len(noisy), -1, -1),
                encoder_hidden_states_image=None if self.image is None else self.image.repeat(len(noisy), 1, 1),
                return_dict=False,
            )
        return velocity.float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, F', H', W'] → video float32 [B, F, 3, H, W] in -1..1."""
        if self.vae is not None:
            mean, std = self._scale
            latents = self.vae.decode(latents.float() * std + mean, return_dict=False)[0]
        return latents.float().clamp(-1, 1).transpose(1, 2)

    def outside(self) -> dict[str, list[nn.Parameter]]:
        """Parameters outside blocks: the input layer, through which conditions enter, and all others."""
        rest = [
            parameter
            for name, parameter in self.network.named_parameters()
            if not name.startswith(("blocks.", "patch_embedding."))
        ]
        return {"conditions": list(self.network.patch_embedding.parameters()), "rest": rest}

    def save(self, folder: str | Path, shape: ClipShape | None = None, shift: float | None = None, **record) -> None:
        """Write a diffusers folder: `transformer/`, `vae/` if any, `scheduler/`, and `entprog.json` beside.

        `transformer/` loads with plain diffusers; `load` reads the whole. shape: the clips it was trained on; shift:
        timestep shift for sampling; record: JSON values to keep under `provenance`. An existing folder is replaced,
        whole or not at all.
        """
        shape = shape or self.shape
        shift = self.shift if shift is None else shift
        about = {
            "format": folders.FORMAT,
            "family": "wan",
            "conditions": self.conditions,
            "latent_channels": self.latent_channels,
            "input_channels": _splits(self.network.patch_embedding),
            "vae": self.vae is not None,
            "shape": shape and shape.model_dump(),
            "shift": shift,
            "provenance": self.provenance | record,
        }
        with folders.replacing(Path(folder)) as scratch:
            self.network.save_pretrained(scratch / "transformer")
            if self.vae is not None:
                self.vae.save_pretrained(scratch / "vae")
            FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(scratch / "scheduler")
            if self.text.any():
                save_file({"prompt_embeds": self.text[0].cpu().contiguous()}, scratch / folders.PROMPT)
            (scratch / "entprog.json").write_text(json.dumps(about, indent=2) + "\n")

    def _latents(self, video: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, F, H, W] in -1..1 → what the network works on, contiguous."""
        if self.vae is None:
            return video.contiguous()
        mean, std = self._scale
        return (self.vae.encode(video, return_dict=False)[0].mode() - mean) / std

    @cached_property
    def _scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's latents, each [1, C, 1, 1, 1]."""
        values = (self.vae.config.latents_mean, self.vae.config.latents_std)
        mean, std = (torch.tensor(v, device=self.device).view(1, -1, 1, 1, 1) for v in values)
        return mean, std


@dataclass(frozen=True)
class Source:
    """What `inspect` found: everything about a network but its weights."""

    root: Path | None
    """Folder of the base; None: a new network."""
    transformer: Path | None
    about: dict[str, Any]
    """The base's `entprog.json`; {} if it has none."""
    network: WanTransformer3DModel
    """The base or new network on the meta device, not yet widened: its configuration without its weights."""
    vae_folder: Path | None
    """None: pixels."""
    vae_setting: str
    """Setting that named the VAE, for messages."""
    conditions: tuple[str, ...]
    """In the order of the input channels."""
    splits: tuple[int, ...]
    """Input channels, in the groups that are summed apart."""
    text: torch.Tensor
    image: torch.Tensor | None


def inspect(settings: config.Model, shape: ClipShape | None = None) -> Source:
    """Everything that can be known before weights are read.

    Raises UserError for a folder that is missing, damaged or of another family, a VAE that is missing or does not
    fit, conditions or prompt that do not fit, wrong names or values in `model.init`, and clips that do not fit.
    """
    if settings.base and settings.init:
        raise UserError("model.base and model.init are both given: a base has its own configuration, drop model.init")
    if not settings.base and not settings.init:
        raise UserError("no network: set model.base (a checkpoint's folder or hub name) or model.init (a new one)")
    root = folders.locate(settings.base, "model.base") if settings.base else None
    about = folders.saved(root) if root else {}
    vae_folder, setting = _vae_folder(settings, root, about)
    vae_config = None
    if vae_folder is not None:
        vae_config = _on_meta(AutoencoderKLWan, folders.read_json(vae_folder / "config.json"), setting).config
        folders.check_weights(vae_folder, setting)
    channels = vae_config.z_dim if vae_config else 3
    transformer = None
    if root:
        transformer = _transformer_folder(root, settings.base)
        folders.check_weights(transformer, "model.base")
        values = folders.read_json(transformer / "config.json")
    else:
        values = _new_configuration(settings, channels)
    network = _on_meta(WanTransformer3DModel, values, "model.base" if root else "model.init")
    if len(network.config.patch_size) != 3:
        raise UserError(f"patch_size needs 3 numbers (frames, height, width), given {network.config.patch_size}")
    outputs = network.config.out_channels or network.config.in_channels
    if outputs != channels:
        has = f"this VAE has {channels} latent channels" if vae_config else "pixels have 3 channels"
        raise UserError(f"the network has {outputs} output channels, {has}: give its own VAE as model.vae=FOLDER")
    conditions, splits = _inputs(network.config.in_channels, about, channels, settings)
    if shape is not None:
        Geometry.of(network.config, vae_config).check(shape)
    text, image = _tokens(network.config, settings, root)
    return Source(root, transformer, about, network, vae_folder, setting, conditions, splits, text, image)


def load(settings: config.Model, device: str | torch.device = "cpu", seed: int = 0) -> WanDenoiser:
    """The base, or a new network from `model.init`, its input layer widened for the conditions it lacks.

    seed: of a new network's weights; torch's own random state is left as it was.
    Raises UserError as `inspect` does, and for weights that are missing or do not fit.
    """
    source = inspect(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if source.transformer is not None:
            network = folders.pretrained(WanTransformer3DModel, source.transformer, "model.base")
            network.register_to_config(_name_or_path=settings.base)  # not this machine's cache
        else:
            network = _new(source.network.config)
    if len(source.splits) > 1:
        network.patch_embedding = SplitConv3d.of(network.patch_embedding, source.splits)
        network.register_to_config(in_channels=sum(source.splits))
    vae = None
    if source.vae_folder is not None:  # in float32: Wan's VAE loses quality in half precision
        vae = folders.pretrained(AutoencoderKLWan, source.vae_folder, source.vae_setting)
        vae.requires_grad_(False).eval().to(device)
    shape = source.about.get("shape")
    provenance = {"base": settings.base, "init": settings.init}
    if source.about:
        provenance["of_base"] = source.about.get("provenance")
    return WanDenoiser(
        network=network.to(device),
        vae=vae,
        conditions=source.conditions,
        text=source.text.to(device),
        image=None if source.image is None else source.image.to(device),
        autocast=None if settings.dtype == "float32" else getattr(torch, settings.dtype),
        shape=ClipShape(**shape) if shape else None,
        shift=_shift(source.root, source.about),
        provenance=provenance,
    )


def _transformer_folder(root: Path, given: str) -> Path:
    """The folder with the network's config.json, its class checked."""
    folder = folders.part(root, "transformer")
    if folder is None:
        missing = "neither config.json nor transformer/config.json"
        raise UserError(f"model.base: no diffusers checkpoint in {given}: {missing}")
    found = folders.read_json(folder / "config.json").get("_class_name")
    if found != CLASS:
        known = families()
        other = next((name for name in known if found == family(name).CLASS), None)
        hint = f"set model.family={other}" if other else f"families there are: {', '.join(known)}"
        raise UserError(f"model.base: {given} holds a {found or 'network of unknown class'}, not a {CLASS}; {hint}")
    return folder


def _vae_folder(settings: config.Model, root: Path | None, about: dict[str, Any]) -> tuple[Path | None, str]:
    """The VAE's folder that `model.vae` asks for (None: pixels), and the setting that named it."""
    setting = "model.base" if settings.vae == "auto" else "model.vae"
    if settings.vae == "none":
        return None, setting
    if settings.vae == "auto":
        folder = root / "vae" if root and (root / "vae" / "config.json").is_file() else None
        if folder is None:
            if about.get("vae"):
                raise UserError(f"model.base: {settings.base} was saved with a VAE, its vae/ folder is missing")
            return None, setting
    else:
        folder = folders.part(folders.locate(settings.vae, "model.vae"), "vae")
        if folder is None:
            raise UserError(f"model.vae: no VAE in {settings.vae}: neither config.json nor vae/config.json")
    found = folders.read_json(folder / "config.json").get("_class_name")
    if found != "AutoencoderKLWan":
        raise UserError(f"{setting}: {folder} holds a {found}, Wan needs an AutoencoderKLWan")
    return folder, setting


def _new_configuration(settings: config.Model, channels: int) -> dict[str, Any]:
    known = [name for name in python_inspect.signature(WanTransformer3DModel.__init__).parameters if name != "self"]
    for name in settings.init:
        if name == "in_channels":
            raise UserError("model.init.in_channels is computed from the latents and conditions: leave it out")
        if name not in known:
            raise UserError(f"unknown setting model.init.{name}{close_to(name, known)}")
    return {"out_channels": channels, **settings.init, "in_channels": channels * (1 + len(settings.conditions))}


def _on_meta(cls: type, values: dict[str, Any], setting: str):
    """A network of a configuration without weights: shows whether it is one, and fills in defaults."""
    try:
        with torch.device("meta"):
            return cls.from_config(values)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{setting} does not describe a {cls.__name__}: {type(error).__name__}: {reason}") from None


def _new(configuration: dict[str, Any]) -> WanTransformer3DModel:
    """A network with Wan's own initialisation, except that its last layer is small, not zero: CEI of a prediction
    that is zero everywhere is undefined."""
    network = WanTransformer3DModel.from_config(configuration)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(network.patch_embedding.weight.data.flatten(1))
    embedder = network.condition_embedder
    for part in (embedder.text_embedder, embedder.time_embedder):
        nn.init.normal_(part.linear_1.weight, std=0.02)
        nn.init.normal_(part.linear_2.weight, std=0.02)
    nn.init.normal_(network.proj_out.weight, std=0.02)
    return network.eval()  # as from_pretrained gives it


def _inputs(
    inputs: int, about: dict[str, Any], channels: int, settings: config.Model
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(conditions in the order of the input channels, input channels in groups), those that are new last."""
    wanted = [name for name in CONDITIONS if name in settings.conditions]
    if settings.init:
        return tuple(wanted), (inputs,)
    has, splits = about.get("conditions", []), about.get("input_channels", [inputs])
    if sum(splits) != inputs or inputs < channels * (1 + len(has)):
        raise UserError(
            f"model.base: {settings.base}'s input layer has {inputs} channels, which do not fit {channels} latent "
            f"channels and the conditions it is said to have ({', '.join(has) or 'none'})"
        )
    if left_out := [name for name in has if name not in wanted]:
        raise UserError(
            f"model.conditions: {settings.base} was trained with {', '.join(has)}; add {', '.join(left_out)} "
            "to model.conditions"
        )
    new = [name for name in wanted if name not in has]
    return (*has, *new), (*splits, *[channels * len(new)] * bool(new))


def _splits(layer: nn.Conv3d) -> tuple[int, ...]:
    return layer.splits if isinstance(layer, SplitConv3d) else (layer.in_channels,)


def _tokens(sizes: Any, settings: config.Model, root: Path | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Text tokens [1, tokens, text_dim], and zero image tokens where the network attends to an image."""
    sees_image = sizes.added_kv_proj_dim is not None
    path = Path(settings.prompt_embeds).expanduser() if settings.prompt_embeds else None
    if path is None and root is not None and (root / folders.PROMPT).is_file():
        path = root / folders.PROMPT
    text = torch.zeros(1, 1, sizes.text_dim) if path is None else _prompt(path, sizes.text_dim)
    if not sees_image:
        return text, None
    if text.shape[1] > I2V_TEXT_TOKENS:
        raise UserError(f"model.prompt_embeds: {text.shape[1]} tokens, this network takes {I2V_TEXT_TOKENS}")
    text = nn.functional.pad(text, (0, 0, 0, I2V_TEXT_TOKENS - text.shape[1]))
    if sizes.pos_embed_seq_len is None:
        return text, torch.zeros(1, 1, sizes.image_dim)
    # First and last image arrive as two rows of the batch, which diffusers joins (Wan FLF2V).
    return text, torch.zeros(2, sizes.pos_embed_seq_len // 2, sizes.image_dim)


def _prompt(path: Path, width: int) -> torch.Tensor:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.prompt_embeds: cannot read {path}: {' '.join(str(error).split())}") from None
    if "prompt_embeds" not in tensors:
        raise UserError(f"model.prompt_embeds: {path} has no tensor named prompt_embeds, only {', '.join(tensors)}")
    embeds = tensors["prompt_embeds"].float()
    if embeds.ndim == 2:
        embeds = embeds[None]
    if embeds.ndim != 3 or embeds.shape[0] != 1 or not embeds.shape[1] or embeds.shape[2] != width:
        raise UserError(f"model.prompt_embeds: {path} has shape {list(embeds.shape)}, needed is [tokens, {width}]")
    return embeds


def _shift(root: Path | None, about: dict[str, Any]) -> float:
    """Timestep shift for sampling: the checkpoint's own, or its scheduler's."""
    if about:
        return float(about["shift"])
    path = root and root / "scheduler" / "scheduler_config.json"
    values = folders.read_json(path) if path and path.is_file() else {}
    return float(values.get("flow_shift") or values.get("shift") or 1.0)
