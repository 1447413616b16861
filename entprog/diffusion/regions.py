"""What the loss counts inside the boxes of face and hands (`train.face_weight`, `train.hand_weight`)."""

import torch

from entprog.config import Train
from entprog.data.clips import Latents
from entprog.media import wholebody

MARGIN = 0.25
"""Room around the points on every side, over the larger side of the box around them: a face's points end at the brows,
a hand's at the bones."""


def weights(batch: Latents, train: Train) -> torch.Tensor | None:
    """What the loss at each latent counts: float32 [B, 1, F', H', W'], 1 outside the boxes. None where all count alike:
    both weights are 1, or the points are not known. Where face and hand overlap the larger counts; a clip without such
    points has 1 everywhere."""
    if batch.pose is None or not train.weighs_parts:
        return None
    chosen = {"face": train.face_weight, "hand": train.hand_weight}
    size = tuple(batch.clean.shape[2:])
    pose = wholebody.whole(batch.pose.to(batch.clean.device))
    inside = {name: covered(pose, parts, size) for name, parts in wholebody.PARTS.items()}
    out = torch.ones_like(batch.clean[:, :1], dtype=torch.float32)
    for name in sorted(chosen, key=chosen.get):  # the larger one last
        out = torch.where(inside[name], chosen[name], out)
    return out


def covered(pose: torch.Tensor, parts: tuple[slice, ...], size: tuple[int, int, int]) -> torch.Tensor:
    """Which latents show some of the parts: bool [B, 1, F', H', W'] of poses [B, F, 133, 3]. size: F', H', W'.

    A latent that a padded box touches in one of the frames that it stands for shows it.
    """
    frames, height, width = size
    cells = pose.new_tensor([width, height])
    shown = pose.new_zeros(pose.shape[0], pose.shape[1], height, width, dtype=torch.bool)
    rows, columns = (torch.arange(count, device=pose.device) for count in (height, width))
    for part in parts:
        points = pose[:, :, part]
        seen = (points[..., 2] >= wholebody.SURE) & points[..., :2].isfinite().all(-1)
        places = points[..., :2] * cells
        low = torch.where(seen[..., None], places, torch.inf).amin(2)
        high = torch.where(seen[..., None], places, -torch.inf).amax(2)
        there = seen.float().mean(2) >= wholebody.ENOUGH
        around = MARGIN * (high - low).amax(-1, keepdim=True)
        low, high = low - around, high + around
        across = (columns + 1 > low[..., :1]) & (columns < high[..., :1])
        down = (rows + 1 > low[..., 1:]) & (rows < high[..., 1:])
        shown |= down[..., :, None] & across[..., None, :] & there[..., None, None]
    out = shown.new_zeros(shown.shape[0], frames, height, width)
    # A video VAE's first latent frame is the first frame, each later one stands for the next few.
    each = (pose.shape[1] - 1) // (frames - 1) if frames > 1 else pose.shape[1]
    for frame in range(pose.shape[1]):
        out[:, min((frame + each - 1) // each, frames - 1)] |= shown[:, frame]
    return out[:, None]
