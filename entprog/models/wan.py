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

import inspect
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from diffusers.utils import logging
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from entprog import config
from entprog.blocks import bypass
from entprog.clips import Clips, Latents
from entprog.config import ClipShape, close_to
from entprog.errors import UserError
from entprog.media.color import yuv420_to_rgb
from entprog.media.skeleton import draw
from entprog.models import families, family

CLASS = "WanTransformer3DModel"
FORMAT = "entprog-model-1"
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
    def _compression(self) -> tuple[int, int]:
        """Clip frames per latent frame (after the first) and pixels per latent row or column."""
        if self.vae is None:
            return 1, 1
        return self.vae.config.scale_factor_temporal, self.vae.config.scale_factor_spatial

    def check(self, shape: ClipShape) -> None:
        """Raises UserError if clips of this shape do not fit the VAE or the network's patches."""
        temporal, spatial = self._compression
        if (shape.frames - 1) % temporal:
            fewer = shape.frames - (shape.frames - 1) % temporal
            raise UserError(
                f"data.shape.frames must be {temporal}n+1 with this VAE, given {shape.frames}: "
                f"take {fewer} or {fewer + temporal}"
            )
        patch = self.network.config.patch_size
        for name, pixels, unit in (
            ("height", shape.height, spatial * patch[1]),
            ("width", shape.width, spatial * patch[2]),
        ):
            if pixels % unit:
                raise UserError(
                    f"data.shape.{name} must be a multiple of {unit} for this network (VAE {spatial} x patch "
                    f"{unit // spatial}), given {pixels}"
                )
        _, frames, height, width = self.latent_shape(shape)
        if frames % patch[0]:
            raise UserError(
                f"data.shape.frames: {shape.frames} frames are {frames} latent frames, not a multiple of this "
                f"network's patch of {patch[0]}"
            )
        longest = self.network.config.rope_max_seq_len
        if max(frames // patch[0], height // patch[1], width // patch[2]) > longest:
            raise UserError(f"data.shape: {shape} is more than {longest} patches along one side, this network's most")

    def latent_shape(self, shape: ClipShape) -> tuple[int, int, int, int]:
        """Clip shape → C, F', H', W' of one clip's latents."""
        temporal, spatial = self._compression
        frames = 1 + (shape.frames - 1) // temporal
        return self.latent_channels, frames, shape.height // spatial, shape.width // spatial

    @torch.no_grad()
    def encode(self, clips: Clips) -> Latents:
        """Clips → latents and conditions on the network's device, no gradient.

        The VAE's mode is taken, not a sample: latents do not depend on when or where they were computed. The
        reference is encoded as a clip of one frame and repeated.
        """
        device = self.device
        clean = self._latents(yuv420_to_rgb(clips.video.to(device, non_blocking=True)).transpose(1, 2))
        conditions = {}
        if "reference" in self.conditions:
            pixels = clips.reference.to(device, non_blocking=True).permute(0, 3, 1, 2).unsqueeze(2)
            conditions["reference"] = self._latents(pixels.float() / 127.5 - 1).expand_as(clean)
        if "pose" in self.conditions:
            height, width = clips.reference.shape[1:3]
            drawn = draw(clips.pose.to(device, non_blocking=True), height, width)
            conditions["pose"] = self._latents(drawn.transpose(1, 2))
        return Latents(clean, conditions, clips.position)

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
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shape = shape or self.shape
        shift = self.shift if shift is None else shift
        about = {
            "format": FORMAT,
            "family": "wan",
            "conditions": self.conditions,
            "latent_channels": self.latent_channels,
            "input_channels": _splits(self.network.patch_embedding),
            "vae": self.vae is not None,
            "shape": shape and shape.model_dump(),
            "shift": shift,
            "provenance": self.provenance | record,
        }
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            scratch.chmod(0o755)
            self.network.save_pretrained(scratch / "transformer")
            if self.vae is not None:
                self.vae.save_pretrained(scratch / "vae")
            FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(scratch / "scheduler")
            if self.text.any():
                save_file({"prompt_embeds": self.text[0].cpu().contiguous()}, scratch / "prompt_embeds.safetensors")
            (scratch / "entprog.json").write_text(json.dumps(about, indent=2) + "\n")
            if folder.exists():
                before = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
                folder.rename(before / folder.name)
                scratch.rename(folder)
                shutil.rmtree(before)
            else:
                scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

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


def load(settings: config.Model, device: str | torch.device = "cpu", seed: int = 0) -> WanDenoiser:
    """The base, or a new network from `model.init`, its input layer widened for the conditions it lacks.

    seed: of a new network's weights; torch's own random state is left as it was.
    Raises UserError for a folder that is missing, damaged or of another family, a VAE that is missing or does not
    fit, and wrong names or values in `model.init`.
    """
    if settings.base and settings.init:
        raise UserError("model.base and model.init are both given: a base has its own configuration, drop model.init")
    if not settings.base and not settings.init:
        raise UserError("no network: set model.base (a checkpoint's folder or hub name) or model.init (a new one)")
    root = _root(settings.base, "model.base") if settings.base else None
    about = saved(root) if root else {}
    vae = _vae(settings, root, about)
    channels = vae.config.z_dim if vae is not None else 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if root:
            network = _pretrained(WanTransformer3DModel, _transformer_folder(root, settings.base), "model.base")
            network.register_to_config(_name_or_path=settings.base)  # not this machine's cache
        else:
            network = _new(settings, channels)
    _check_channels(network, vae, channels, settings)
    conditions = _widen(network, about, channels, settings)
    text, image = _tokens(network, settings, root)
    if vae is not None:
        vae.requires_grad_(False).eval().to(device)
    return WanDenoiser(
        network=network.to(device),
        vae=vae,
        conditions=conditions,
        text=text.to(device),
        image=image if image is None else image.to(device),
        autocast=None if settings.dtype == "float32" else getattr(torch, settings.dtype),
        shape=ClipShape(**about["shape"]) if about.get("shape") else None,
        shift=_shift(root, about),
        provenance={"base": settings.base, "init": settings.init, "base_provenance": about.get("provenance")}
        if about
        else {"base": settings.base, "init": settings.init},
    )


def saved(folder: str | Path) -> dict[str, Any]:
    """A saved checkpoint's `entprog.json`; {} for a foreign one. Raises UserError if it cannot be read."""
    path = Path(folder) / "entprog.json"
    if not path.is_file():
        return {}
    about = _json(path)
    if about.get("format") != FORMAT:
        raise UserError(f"{path} has format {about.get('format')!r}, this version reads {FORMAT!r}")
    if missing := {"conditions", "latent_channels", "input_channels", "vae", "shape", "shift"} - about.keys():
        raise UserError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    return about


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it does not hold a JSON object")
    return values


def _root(name: str, setting: str) -> Path:
    """The folder a checkpoint is in: given, or fetched from the hub (safetensors and JSON only)."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        above = folder.resolve().parent
        beside = (above / "entprog.json").is_file() or (above / "model_index.json").is_file()
        return above if folder.resolve().name == "transformer" and beside else folder
    # `out/base` looks like a hub name too: where `out` is a folder here, a local one was meant.
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or folder.parent.is_dir() or folder.exists():
        raise UserError(f"{setting}: no such folder: {name}")
    from huggingface_hub import snapshot_download

    weights = [f"{part}*.safetensors" for part in ("diffusion_pytorch_model", "transformer/", "vae/")]
    configs = [f"{part}*.json" for part in ("diffusion_pytorch_model", "transformer/", "vae/", "scheduler/")]
    try:
        files = [*weights, *configs, "config.json", "entprog.json", "model_index.json", "prompt_embeds.safetensors"]
        return Path(snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(f"{setting}: {name} is neither a folder here nor could it be fetched: {reason}") from None


def _transformer_folder(root: Path, given: str) -> Path:
    """The folder with the network's config.json, its class checked."""
    folder = next((f for f in (root / "transformer", root) if (f / "config.json").is_file()), None)
    if folder is None:
        raise UserError(
            f"model.base: no diffusers checkpoint in {given}: neither config.json nor transformer/config.json"
        )
    found = _json(folder / "config.json").get("_class_name")
    if found != CLASS:
        known = families()
        other = next((name for name in known if found == family(name).CLASS), None)
        hint = f"set model.family={other}" if other else f"families there are: {', '.join(known)}"
        raise UserError(f"model.base: {given} holds a {found or 'network of unknown class'}, not a {CLASS}; {hint}")
    return folder


def _pretrained(cls, folder: Path, setting: str):
    """A diffusers model of a folder, in float32; every weight must be there and fit."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it would say of the weights is an error here
    try:
        model, info = cls.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        reason = " ".join(str(_first_cause(error)).split())[:200]
        raise UserError(f"{setting}: cannot load {cls.__name__} from {folder}: {reason}") from None
    finally:
        logging.set_verbosity(verbosity)
    for keys, problem in (("missing_keys", "are missing from"), ("unexpected_keys", "have no place in")):
        if wrong := info[keys]:
            raise UserError(
                f"{setting}: {len(wrong)} weights {problem} the {cls.__name__} in {folder}, e.g. {min(wrong)}"
            )
    return model


def _first_cause(error: BaseException) -> BaseException:
    """diffusers wraps what went wrong in up to three errors that say less."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _vae(settings: config.Model, root: Path | None, about: dict[str, Any]) -> AutoencoderKLWan | None:
    """The VAE that `model.vae` asks for, in float32 (Wan's VAE loses quality in half precision)."""
    if settings.vae == "none":
        return None
    if settings.vae == "auto":
        if root is None or not (root / "vae" / "config.json").is_file():
            if about.get("vae"):
                raise UserError(f"model.base: {settings.base} was saved with a VAE, its vae/ folder is missing")
            return None
        folder, setting = root / "vae", "model.base"
    else:
        root = _root(settings.vae, "model.vae")
        folder = next((f for f in (root / "vae", root) if (f / "config.json").is_file()), None)
        if folder is None:
            raise UserError(f"model.vae: no VAE in {settings.vae}: neither config.json nor vae/config.json")
        setting = "model.vae"
    found = _json(folder / "config.json").get("_class_name")
    if found != "AutoencoderKLWan":
        raise UserError(f"{setting}: {folder} holds a {found}, Wan needs an AutoencoderKLWan")
    return _pretrained(AutoencoderKLWan, folder, setting)


def _new(settings: config.Model, channels: int) -> WanTransformer3DModel:
    """A network with Wan's own initialisation, except that its last layer is small, not zero: CEI of a prediction
    that is zero everywhere is undefined."""
    known = [name for name in inspect.signature(WanTransformer3DModel.__init__).parameters if name != "self"]
    for name in settings.init:
        if name == "in_channels":
            raise UserError("model.init.in_channels is computed from the latents and conditions: leave it out")
        if name not in known:
            raise UserError(f"unknown setting model.init.{name}{close_to(name, known)}")
    inputs = channels * (1 + len(settings.conditions))
    try:
        network = WanTransformer3DModel(**{"out_channels": channels, **settings.init, "in_channels": inputs})
        if len(network.config.patch_size) != 3:
            raise ValueError(f"patch_size needs 3 numbers (frames, height, width), given {network.config.patch_size}")
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model.init does not describe a network: {type(error).__name__}: {reason}") from None
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


def _check_channels(network, vae: AutoencoderKLWan | None, channels: int, settings: config.Model) -> None:
    outputs = network.config.out_channels or network.config.in_channels
    if outputs != channels:
        source = f"this VAE has {channels} latent channels" if vae is not None else "pixels have 3 channels"
        advice = "give the VAE it was trained with" if vae is not None or settings.vae == "none" else "give its VAE"
        raise UserError(f"the network has {outputs} output channels, {source}: {advice} as model.vae=FOLDER")


def _widen(network: WanTransformer3DModel, about: dict[str, Any], channels: int, settings: config.Model):
    """Give the input layer channels for the conditions it lacks; all conditions in the order of its channels."""
    layer = network.patch_embedding
    wanted = [name for name in CONDITIONS if name in settings.conditions]
    if settings.init:
        return tuple(wanted)
    has = list(about.get("conditions", ()))
    splits = list(about.get("input_channels", [layer.in_channels]))
    if sum(splits) != layer.in_channels or layer.in_channels < channels * (1 + len(has)):
        raise UserError(
            f"model.base: {settings.base}'s input layer has {layer.in_channels} channels, which do not fit "
            f"{channels} latent channels and the conditions it is said to have ({', '.join(has) or 'none'})"
        )
    if left_out := [name for name in has if name not in wanted]:
        raise UserError(
            f"model.conditions: {settings.base} was trained with {', '.join(has)}; add {', '.join(left_out)} "
            "to model.conditions"
        )
    new = [name for name in wanted if name not in has]
    if new:
        splits.append(channels * len(new))
    if len(splits) > 1:
        network.patch_embedding = SplitConv3d.of(layer, splits)
        network.register_to_config(in_channels=sum(splits))
    return (*has, *new)


def _splits(layer: nn.Conv3d) -> tuple[int, ...]:
    return layer.splits if isinstance(layer, SplitConv3d) else (layer.in_channels,)


def _tokens(network, settings: config.Model, root: Path | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Text tokens [1, tokens, text_dim], and zero image tokens where the network attends to an image."""
    sizes = network.config
    sees_image = sizes.added_kv_proj_dim is not None
    path = Path(settings.prompt_embeds).expanduser() if settings.prompt_embeds else None
    if path is None and root is not None and (root / "prompt_embeds.safetensors").is_file():
        path = root / "prompt_embeds.safetensors"
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
    values = _json(path) if path and path.is_file() else {}
    return float(values.get("flow_shift") or values.get("shift") or 1.0)
