"""A run's metrics on the Prometheus port of its Ray node.

Ray serves what `ray.util.metrics` is told on the port that it writes to its own service discovery
(`ray.nodes()[i]["MetricsExportPort"]`), as `ray_sepico_NAME{run="...", class_name="..."}`.
`k8s/monitoring/dashboard.json` shows them in Grafana.

A gauge is gone as soon as its process is: an alert on a run that stands still needs one of the
driver's (`cluster.progress`), as workers that are lost or wait for room say nothing.
"""

from pathlib import PurePosixPath

from ray.util.metrics import Counter, Gauge

PREFIX = "sepico_"


class RunGauges:
    """The latest value of every metric of the run at a URL; made where a Ray worker runs."""

    def __init__(self, run: str) -> None:
        self._run = PurePosixPath(run).name
        self._gauges: dict[str, Gauge] = {}

    def set(self, metrics: dict[str, float]) -> None:
        """Publish metrics; NAME/CLASS becomes NAME with the label `class_name`."""
        for key, value in metrics.items():
            name, _, class_name = key.partition("/")
            if name not in self._gauges:
                self._gauges[name] = Gauge(
                    PREFIX + name,
                    description=f"{name.replace('_', ' ')}, latest",
                    tag_keys=("run", "class_name"),
                )
            self._gauges[name].set(value, {"run": self._run, "class_name": class_name})


def prediction_counters() -> tuple[Counter, Counter]:
    """Images predicted, and images that could not be, of a worker of `jobs.predict`."""
    return (
        Counter(f"{PREFIX}predicted_images", description="images predicted"),
        Counter(f"{PREFIX}failed_images", description="images that could not be predicted"),
    )
