"""Memory behind tensors of this process, on every device, as it comes and goes."""

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """The most bytes that tensors made or used inside held at once, but for those that are said to be there already;
    those on the meta device have none."""

    def __init__(self, there: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.there = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in there)}
        self.alive: dict[int, weakref.ref] = {}
        self.bytes = 0

    def live(self) -> int:
        """Bytes held now."""
        storages = [(key, reference()) for key, reference in self.alive.items()]
        self.alive = {key: self.alive[key] for key, storage in storages if storage is not None}
        return sum(storage.nbytes() for _, storage in storages if storage is not None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if id(storage) in self.there:
                    continue
                self.alive.setdefault(id(storage), weakref.ref(storage))
                if self.alive[id(storage)]() is not storage:
                    self.alive[id(storage)] = weakref.ref(storage)
        self.bytes = max(self.bytes, self.live())
        return out
