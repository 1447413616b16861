"""Model families. One file a family, named as `model.family` names it; a file is a family when it has

    CLASS: str                                    the diffusers class of its network (config.json `_class_name`)
    DENOISER: type[VideoDenoiser]                 its class, of which what is asked without a network is asked
    inspect(settings: config.Model, shape: ClipShape | None = None, *, weights=True)
                                                  UserError for whatever can be known to be wrong without weights;
                                                  weights: whether there are to be any of the network
    files(settings: config.Model)                 what `load` reads, by part and name
    load(settings: config.Model, device="cpu", seed=0, prepare=..., *, adapt=..., sharded=0)
                                                  -> Denoiser: the base (or a new network from `init`), its input layer
                                                  widened with zeros for conditions it lacks; `adapt(network)` called
                                                  before it is split, `prepare(network)` before it goes to the device;
                                                  sharded: copies that all ranks hold together, each a part; UserError
                                                  for a wrong folder
    encoder(settings: config.Model, device="cpu") -> Denoiser
                                                  what encodes clips as it does, without the network's weights
and registers its block classes with `entprog.blocks.bypass`, and with `entprog.blocks.kind` which of them are temporal.
Its class derives from `entprog.models.denoising.VideoDenoiser`, which has all that families share, and says what
`entprog.models.interface.Family` lists; `sources` has `inspect` and `files` for it, `loading` has `load` and `encoder`.
"""

import functools
import importlib
import logging
import pkgutil
from types import ModuleType

from entprog.config import close_to
from entprog.errors import UserError

HOW_TO_ADD = "docs/families.md shows how to add one"

# diffusers imports torchao wherever it is installed, and both then speak of things that nobody asked for.
for _name in ("diffusers.quantizers.torchao", "torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


@functools.cache
def families() -> tuple[str, ...]:
    """Names of the families there are."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return tuple(name for name in names if {"CLASS", "DENOISER", "load"} <= vars(_family(name)).keys())


def family(name: str) -> ModuleType:
    """The family's module. Raises UserError for an unknown name."""
    known = families()
    if name not in known:
        raise UserError(f"unknown model.family {name!r}{close_to(name, known)}; there are: {', '.join(known)}")
    return _family(name)


def _family(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
