"""What MLflow loads a registered model with: reference image and pose in, clip out. MLflow runs this file itself."""

from typing import Any

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel

from entprog import config
from pipelines.generating import checkpoints, rendering
from pipelines.generating.motions import Motion


class Animator(PythonModel):
    """A checkpoint as a function of people and motions."""

    def load_context(self, context: Any) -> None:
        settings = config.Generate()
        self.checkpoint = checkpoints.find(context.artifacts["checkpoint"], settings)
        self.denoiser = checkpoints.load(self.checkpoint, settings)

    def predict(self, context: Any, model_input, params: dict[str, Any] | None = None):
        """{"reference": uint8 [B, H, W, 3], "pose": float32 [B, F, 33 or 133, 3]} → uint8 RGB [B, F, H, W, 3]; `last`,
        as `reference`, of a network that sees the clip's last frame.

        params: `seed` and `steps` of generating. MLflow would make a signature of a type hint on `model_input`.
        """
        settings = config.Generate(**(params or {}))
        people, poses = (np.asarray(model_input[name]) for name in ("reference", "pose"))
        ends = np.asarray(model_input["last"]) if self.checkpoint.last else [None] * len(people)
        each = enumerate(zip(people, poses, ends, strict=True))
        motions = [Motion(str(n), reference, pose, None, last=end) for n, (reference, pose, end) in each]
        return rendering.make(self.denoiser, motions, self.checkpoint.shape, settings)


mlflow.models.set_model(Animator())
