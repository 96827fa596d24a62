"""What a person sees of a run: metrics per class, TensorBoard, events, a profile, a dashboard."""

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
import ray
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.progress import start_progress
from cluster.prometheus import RunGauges, prediction_counters
from tests.jobs.training import metrics

CLASSES = [f"class{i}" for i in range(5)]
DASHBOARD = Path(__file__).parents[2] / "k8s/monitoring/dashboard.json"
ALERTS = DASHBOARD.with_name("alerts.yaml")


def test_metrics_say_what_the_teacher_believes_and_how_classes_gather(trained):
    lines = [line for line in metrics(trained[0]) if "mix_ce" in line]
    for line in lines:
        shares = [value for key, value in line.items() if key.startswith("pseudo_label_share/")]
        assert sum(shares) == pytest.approx(1)
        assert 0.2 <= line["teacher_confidence"] <= 1
        assert line["memory_bytes"] > 1e7 and line["gradient_norm"] > 0
        for domain in ("source", "target"):
            found = [v for key, v in line.items() if key.startswith(f"{domain}_similarity/")]
            assert all(-1 <= value <= 1 for value in found)
            assert bool(found) == ("target_contrast" in line)


def test_validations_say_the_iou_of_every_class(trained):
    line = [line for line in metrics(trained[0]) if "student_miou" in line][-1]
    ious = [line[f"student_iou/{name}"] for name in CLASSES if f"student_iou/{name}" in line]
    assert sum(ious) / len(ious) == pytest.approx(line["student_miou"])


def test_tensorboard_shows_scalars_and_panels(trained):
    events = EventAccumulator(str(trained[0] / "tensorboard")).Reload()
    assert events.Images("panels/step")[0].step == 3
    assert {"learning_rate", "pseudo_label_share/class0"} <= set(events.Tags()["scalars"])


def test_events_are_one_json_object_a_line(trained):
    lines = (trained[0].parent / "first.stderr").read_text().splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    names = [event["event"] for event in events]
    assert names[0] == "started" and names[-1] == "finished"
    (start,) = (event for event in events if event["event"] == "workers")
    assert (start["step"], start["workers"], start["precision"]) == (0, 2, "float32")
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [3, 6]
    assert [event["step"] for event in events if event["event"] == "validated"] == [3, 6]
    assert all(event["level"] == "info" and event["time"] for event in events)


def test_a_profile_shares_out_the_whole_step(trained):
    folder = trained[0] / "profile"
    rows = (folder / "step-00000006.txt").read_text().splitlines()[1:]
    found = dict(re.fullmatch(r"(.+?) +[\d.]+ +([\d.]+)%", row).groups() for row in rows)
    whole = float(found.pop("step"))
    assert whole == 100
    assert sum(map(float, found.values())) == pytest.approx(100, abs=1)
    assert {"data", "student forward", "backward", "pseudo-labels", "contrast"} <= set(found)
    trace = json.loads((folder / "step-00000006.trace.json").read_text())
    assert {"backward", "contrast"} <= {event.get("name") for event in trace["traceEvents"]}


@pytest.fixture(scope="module")
def scraped(ray_cluster) -> dict[tuple[str, str | None], float]:
    """(name, class): value on a Ray node's Prometheus port, of a worker of the run `watched`, of
    predictions, and of the driver of `stalled`, which has `repeated` a step at that time.

    Ray shows a gauge for as long as its worker repeats it (those of the cluster's earlier runs for
    a while longer), and not every metric in the same answer: what any answer said counts.
    """

    @ray.remote
    class Worker:
        def publish(self) -> None:
            self.gauges = RunGauges("watched")
            self.gauges.set({"mix_ce": 1.5, "student_iou/class3": 42.0})
            self.counters = prediction_counters()
            for counter in self.counters:
                counter.inc(7)

    worker = Worker.remote()
    ray.get(worker.publish.remote())
    progress = start_progress("s3://bucket/runs/stalled")
    progress.expect_steps.remote()
    ray.get(progress.update.remote(10, 20, {}))
    repeated = time.time()
    ray.get(progress.update.remote(10, 20, {}))
    (node,) = ray.nodes()
    url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 120
    found: dict[tuple[str, str | None], float] = {}
    while len(found) < 6 and time.monotonic() < deadline:
        with urllib.request.urlopen(url, timeout=5) as response:
            for line in response.read().decode().splitlines():
                ours = re.search(r'run="(watched|stalled)"|_images_total{', line)
                if line.startswith("ray_sepico_") and ours:
                    name = line.split("{")[0]
                    class_name = re.search(r'class_name="([^"]*)"|$', line)[1]
                    found[name, class_name] = float(line.split()[-1])
        time.sleep(0.2)  # leaves the node's agent time to take what workers send
    return {**found, ("repeated", None): repeated}


def test_prometheus_reads_metrics_and_counters_from_the_node(scraped):
    assert {key: value for key, value in scraped.items() if value < 100} == {
        ("ray_sepico_mix_ce", ""): 1.5,
        ("ray_sepico_student_iou", "class3"): 42,
        ("ray_sepico_predicted_images_total", None): 7,
        ("ray_sepico_failed_images_total", None): 7,
    }


def test_a_driver_says_when_its_run_got_further_and_a_repeated_step_is_no_progress(scraped):
    published = {name for name, _ in scraped if name.endswith("_time_seconds")}
    groups = yaml.safe_load(ALERTS.read_text())["spec"]["groups"]
    rules = {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}
    for alert in ("TrainingStalled", "CheckpointTooOld"):
        assert set(re.findall(r"ray_\w+", rules[alert])) <= published
    for name in published:
        assert 0 < scraped["repeated", None] - scraped[name, ""] < 3600


def test_dashboard_and_alerts_ask_for_what_a_run_publishes(trained):
    known = {key.split("/")[0] for line in metrics(trained[0]) for key in line} - {"time"}
    known |= {"predicted_images_total", "failed_images_total"}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    asked = {name for query in queries for name in re.findall(r"ray_sepico_(\w+)", query)}
    assert len(asked) > 15
    alerted = set(re.findall(r"ray_sepico_(\w+)", ALERTS.read_text()))
    # What is no line of metrics.jsonl: states, not steps.
    states = {"diverged", "progress_time_seconds", "checkpoint_time_seconds"}
    assert asked | alerted <= known | states
    assert "diverged" in alerted
