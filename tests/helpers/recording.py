"""What a network is called with."""

import torch


def calls(network, work):
    """What the network is called with while something works: the keyword arguments of every call."""
    seen = []
    hook = network.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        with torch.no_grad():
            work()
    finally:
        hook.remove()
    assert not any(args for args, _ in seen)
    return [kwargs for _, kwargs in seen]
