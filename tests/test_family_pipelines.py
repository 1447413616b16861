"""Families against diffusers' own pipelines: from the same noise both make the same latents, and of those the same
frames."""

import pytest

from helpers import parity, suite
from helpers.families import NAMES

FORMS = {
    **{name: (name, {}) for name in NAMES if name != "cogvideox15"},  # 1.5 pads odd clips, its pipeline refuses them
    "cogvideox_rotary": ("cogvideox", {"use_rotary_positional_embeddings": True}),
}


@pytest.mark.parametrize("form", FORMS)
def test_clips_are_those_of_the_pipeline(form, tmp_path):
    name, init = FORMS[form]
    suite.same_clips(*parity.of(name, tmp_path, **init))
