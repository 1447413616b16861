"""Every name of MLflow's that is not part of its public interface, in one place.

An upgrade may change any of them without notice: `tests/test_internals.py` then fails, and `pyproject.toml` bounds
MLflow's version until it passes.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.entities import RunData


def latest_ms(data: "RunData") -> int | None:
    """When a run's last metric was written, in milliseconds since 1970; None without any. To ask for each metric's
    history instead would be a request each."""
    return max((metric.timestamp for metric in data._metric_objs), default=None)


class Machine:
    """MLflow's measurements of this machine (CPU, memory, disk, network, GPU if any), without its thread."""

    def __init__(self, run_id: str, uri: str):
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(run_id, tracking_uri=uri)

    def look(self) -> dict[str, float]:
        """{name: value} of now."""
        self._monitor.collect_metrics()
        values = self._monitor.aggregate_metrics()
        for each in self._monitor.monitors:
            each.clear_metrics()
        return values
