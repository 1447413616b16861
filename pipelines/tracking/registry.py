"""A trained checkpoint in MLflow's model registry: its diffusers folder, what goes in and out, and how to load it."""

import importlib.metadata
import warnings
from collections.abc import Callable
from pathlib import Path

from entprog import storage
from entprog.config import ClipShape
from entprog.masking import reason
from entprog.storage import Where
from pipelines.tracking.tracker import VERSIONS, Tracker

SERVED = Path(__file__).with_name("mlflow_model.py")


def register(
    tracker: Tracker, name: str, folder: Where, shape: ClipShape, warn: Callable[[str], None] = warnings.warn
) -> str | None:
    """Log the checkpoint to the run as a model and make it the newest version of `name`; that version's number.

    None, and a warning, where MLflow does not take it: what was trained lies in `folder` all the same.
    """
    import mlflow

    from entprog.media import drawing, styles
    from entprog.models import folders

    try:
        about = folders.saved(folder)
        points = drawing.points(about.get("skeleton", styles.LIMBS))
        versions = {package: importlib.metadata.version(package) for package in ("entprog", *VERSIONS)}
        # Networks that see all that their base's pipeline shows them may need its image encoder.
        extra = {"entprog": "[text]"} if about.get("native") else {}
        packages = [f"{package}{extra.get(package, '')}=={version}" for package, version in versions.items()]
        mlflow.set_tracking_uri(tracker.uri)
        for known in mlflow.MlflowClient(tracker.uri).search_model_versions(f"run_id = '{tracker.run_id}'"):
            if known.name == name:  # by a command that was killed before it had written that down
                return str(known.version)
        run = mlflow.start_run(run_id=tracker.run_id, log_system_metrics=False)
        with run, warnings.catch_warnings(), storage.local_copy(folder) as checkpoint:
            # Counsel on type hints and examples, for lack of which it has a signature; MLflow undoes a filter of ours.
            warnings.showwarning = lambda *args, **options: None
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(SERVED),
                artifacts={"checkpoint": str(checkpoint)},
                signature=signature(shape, points, about.get("last_frame", False)),
                pip_requirements=packages,
                registered_model_name=name,
            )
        return str(logged.registered_model_version)
    except Exception as error:  # whatever store, network or disk raise: tracking must not fail a training
        warn(f"MLflow: {folder} was not registered as {name}: {reason(error, tracker.uri)}")
        return None


def signature(shape: ClipShape, points: int = 33, last: bool = False):
    """Reference images and poses of so many points in, and last frames of networks that see them; clips out, of the
    shape that the network was trained on."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    frames, height, width = shape.frames, shape.height, shape.width
    pictures = [
        TensorSpec(np.dtype("uint8"), (-1, height, width, 3), name)
        for name in ("reference", *(["last"] if last else []))
    ]
    pose = TensorSpec(np.dtype("float32"), (-1, frames, points, 3), "pose")
    clip = TensorSpec(np.dtype("uint8"), (-1, frames, height, width, 3))
    params = ParamSchema([ParamSpec("seed", "long", 0), ParamSpec("steps", "long", 20)])
    return ModelSignature(Schema([*pictures, pose]), Schema([clip]), params)
