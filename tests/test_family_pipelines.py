"""Families against diffusers' own pipelines: from the same noise both make the same latents."""

import pytest
import torch

from helpers import parity
from helpers.families import NAMES

FORMS = {
    **{name: (name, {}) for name in NAMES if name != "cogvideox15"},  # 1.5 pads odd clips, its pipeline refuses them
    "cogvideox_rotary": ("cogvideox", {"use_rotary_positional_embeddings": True}),
}


@pytest.mark.parametrize("form", FORMS)
def test_latents_are_those_of_the_pipeline(form, tmp_path):
    name, init = FORMS[form]
    ours, theirs = parity.of(name, tmp_path, **init)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
