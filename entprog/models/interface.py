"""What a family of networks says of itself: its classes, and what its networks are given and need."""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import nn

from entprog import config
from entprog.errors import UserError
from entprog.media import styles
from entprog.models import inputs, texts
from entprog.models.geometry import Geometry


class Family:
    """What the class of a family says: what has no value here, `run`, `geometry`, `tensors` and, for captions,
    `text_tokens`; all else where the family differs."""

    FAMILY: ClassVar[str]
    """Its file's name in `entprog/models/`."""
    NETWORK: ClassVar[type[nn.Module]]
    """diffusers class of the network."""
    PART: ClassVar[str] = "transformer"
    """The network's folder in a diffusers pipeline."""
    VAES: ClassVar[tuple[type[nn.Module], ...]]
    """diffusers classes of its VAE."""
    INPUT: ClassVar[str]
    """The layer through which conditions enter, which is widened for those that a base lacks."""
    PROCESS: ClassVar[type]
    """Kind of noise process."""
    SCHEDULER: ClassVar[dict[str, Any]]
    """Scheduler configuration of a base that comes without one, and of new networks."""

    EXPERTS: ClassVar[bool] = False
    """Whether bases with two networks are known (`entprog.models.experts`)."""
    TEXT_PIPELINE: ClassVar[str | None] = None
    """diffusers pipeline that encodes captions as the base knows them; None: captions are not supported."""
    TEXT_PARTS: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    """Folders of the base that TEXT_PIPELINE encodes them with."""
    TEXT_MENDED: ClassVar[bool] = False
    """Whether TEXT_PIPELINE mends texts by ftfy (typographic quotes, broken characters) where that is installed, as the
    makers of the bases did."""
    MORE: ClassVar[dict[str, tuple[str, str]]] = {}
    """Further folders of a base's pipeline that some of its networks need → their library and class."""
    MASKS: ClassVar[bool] = False
    """Whether its networks' attention is given a mask, which not all kernels take (`model.attention`)."""
    FACES: ClassVar[bool] = False
    """Whether networks that see all that their pipeline shows them (`VideoDenoiser.native`) see faces."""
    TRAINED_WITH: ClassVar[str] = ""
    """What such networks are shown in training alone, in words."""
    SEVERAL: ClassVar[bool] = False
    """Whether its networks have a place for several reference pictures."""
    SKELETON: ClassVar[config.Skeleton] = styles.LIMBS
    """How poses are drawn for its published networks, which have seen no others; `limbs` where they have seen none."""
    FILLED: ClassVar[bool] = False
    """Whether its networks have seen every text filled up with zeros to `text_tokens`, without a mask."""
    FIXED: ClassVar[dict[str, str]] = {}
    """Fields that belong to the text beside `text` (the pooled one) → their names in the file of `model.prompt_embeds`,
    with which they are saved."""

    def run(self, inputs: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Call the network: inputs [B, all channels, F', H', W'], timestep [B] as `process.timestep` gives it, text
        [1 or B, tokens, width] (`texts.spread`) → prediction [B, C, F', H', W']."""
        raise NotImplementedError

    @classmethod
    def geometry(cls, network: Any, vae: nn.Module | None) -> Geometry:
        """Which clips fit. network: its diffusers configuration."""
        raise NotImplementedError

    @classmethod
    def tensors(cls, network: Any, settings: config.Model, root: Path | None) -> dict[str, torch.Tensor | None]:
        """Fields that hold fixed inputs, among them `text`. network: its diffusers configuration; root: of the base."""
        raise NotImplementedError

    @classmethod
    def text_tokens(cls, network: Any) -> int:
        """Tokens of an encoded caption, filled up with zeros. network: its diffusers configuration."""
        raise NotImplementedError

    @classmethod
    def text_names(cls) -> dict[str, str]:
        """Fields that belong to a text → their names in files."""
        return {"text": texts.NAME, **cls.FIXED}

    @classmethod
    def encode_text(cls, network: Any, pipeline: Any, some: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        """Texts → `text` [texts, tokens, width], zeros where a text has no tokens, and the fields of FIXED
        [texts, width]; by a TEXT_PIPELINE that has nothing but TEXT_PARTS."""
        embeds, _ = pipeline.encode_prompt(
            some, do_classifier_free_guidance=False, max_sequence_length=cls.text_tokens(network), device=device
        )
        return {"text": embeds}

    @classmethod
    def check_network(cls, network: Any) -> None:
        """Raises UserError for a configuration that diffusers takes and we cannot."""

    @classmethod
    def predicted(cls, network: Any) -> tuple[int, ...]:
        """Numbers of latent channels that a configuration's output may stand for."""
        return (network.out_channels or network.in_channels,)

    def check_type(self) -> None:
        """Raises UserError where the network does not work in its type on its device."""

    @classmethod
    def own_conditions(cls, network: Any, channels: int) -> tuple[str, ...]:
        """Conditions among the input channels of a base that we did not save. channels: of the latents."""
        return ()

    @classmethod
    def other_sees(cls, network: Any, channels: int, conditions: tuple[str, ...]) -> tuple[str, ...]:
        """Conditions that the other one of two networks sees, which we did not train. conditions: that this one does;
        network, channels: of the other one, as in `own_conditions`."""
        return cls.own_conditions(network, channels)

    @classmethod
    def new_inputs(cls, channels: int, conditions: tuple[str, ...]) -> dict[str, int]:
        """The part of a new network's configuration that latents and conditions decide."""
        return {"in_channels": channels * (1 + len(conditions))}

    @classmethod
    def planned_inputs(
        cls,
        network: Any,
        about: dict[str, Any],
        channels: int,
        settings: config.Model,
        index: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """(conditions, input channels in groups) of a network after widening (`inputs.planned`). index: of its
        pipeline. Raises UserError too for a published network with channels for something else."""
        own = cls.own_conditions(network, channels)
        conditions, splits = inputs.planned(network.in_channels, about, own, channels, settings)
        others = sum(splits) - channels * (1 + len(conditions))
        if settings.base and not about and others and not cls.form_of(splits, channels, conditions):
            raise UserError(
                f"model.base: {settings.base} takes {network.in_channels} channels, {others} of them for what family "
                f"{cls.FAMILY} does not know, beside {channels} of the clip's latents: give a base of another kind "
                "(docs/bases.md)"
            )
        return conditions, splits

    @classmethod
    def initialise(cls, network: nn.Module) -> None:
        """Weights of a new network, where the class's own constructor does not do it. Its prediction must not be zero
        everywhere: CEI of that is undefined."""

    @classmethod
    def needs(cls, network: Any, form: str, native: bool) -> tuple[str, ...]:
        """Which of MORE a network needs whose conditions have a form. native: as `VideoDenoiser.native`."""
        return ()

    @classmethod
    def form_of(cls, splits: tuple[int, ...], channels: int, conditions: tuple[str, ...]) -> str:
        """Name of the form that conditions have where a family knows several. splits: input channels, widened, in the
        groups that are summed apart; channels: of the latents."""
        return ""

    @classmethod
    def sees_native(
        cls, network: Any, trained: Mapping[str, Any], settings: config.Model, there: Collection[str]
    ) -> bool:
        """Whether a base's network sees all that its pipeline shows it, where earlier versions left something out.
        network: its configuration, not yet widened; trained: `entprog.json` of the base, under that of an adapter; {}
        where neither was trained here; there: which of MORE its pipeline has, in its folder or by its index.
        Raises UserError for settings that contradict it."""
        return False

    @classmethod
    def left_out(cls, native: bool) -> str | None:
        """What a base's network is not shown though its pipeline shows it, in words; None: nothing. native: as
        `VideoDenoiser.native`."""
        return None

    @classmethod
    def sees_around(cls, native: bool, vae: bool) -> bool:
        """Whether a network has a place for a video that a person is put into (condition `background`). native: as
        `VideoDenoiser.native`; vae: whether it has one."""
        return False

    @classmethod
    def encodes_with(cls, network: Any, native: bool) -> dict[str, nn.Module]:
        """Parts of the network that conditions are encoded by, which are never trained, by name: new, without its
        weights. network: its diffusers configuration."""
        return {}

    @classmethod
    def skeleton_of(cls, form: str) -> config.Skeleton:
        """How poses are drawn for a published base of a form."""
        return cls.SKELETON

    @classmethod
    def sees_last(cls, network: Any, trained: Mapping[str, Any], form: str, settings: config.Model) -> bool:
        """Whether the network sees the clip's last frame. trained: `entprog.json` of the adapter or the base, {} where
        neither was trained here. Raises UserError where that is wanted and there is no place for it."""
        if settings.last_frame:
            raise UserError(f"model.last_frame: networks of family {cls.FAMILY} have no place for a last frame")
        return False

    @classmethod
    def begins(cls, form: str, native: bool, last: bool) -> bool | None:
        """Whether in training the reference of a published base is each clip's own first frame (`model.first_frame`).
        None: networks like this one do not take it for what a clip begins with. form: as `form_of` gives it; native,
        last: as `VideoDenoiser`'s."""
        return None

    @classmethod
    def check_values(cls, values: Mapping[str, Any], given: str) -> None:
        """Raises UserError for a config.json that is not diffusers', though its class's name is."""

    @classmethod
    def completed(cls, denoiser: Self, parts: dict[str, Path]) -> Self:
        """A loaded denoiser with what its family makes of the folders that it needs (`needs`), by name."""
        return denoiser
