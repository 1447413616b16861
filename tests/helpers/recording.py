"""What a network is called with."""

import inspect

import torch


def calls(network, work):
    """What the network is called with while something works: the arguments of every call, by name."""
    seen = []
    hook = network.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        with torch.no_grad():
            work()
    finally:
        hook.remove()
    names = inspect.signature(network.forward)
    return [dict(names.bind(*args, **kwargs).arguments) for args, kwargs in seen]
