"""The training loop of one worker."""

import json
import math
import socket
from contextlib import ExitStack, closing, suppress
from functools import partial
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from cluster.checkpoint_format import Checkpoint, list_checkpoints
from cluster.checkpoints import CheckpointWriter
from cluster.config import TrainConfig
from cluster.engine import DivergenceError, set_up_process
from cluster.environment import ENVIRONMENT, describe_environment
from cluster.inference import validate_networks
from cluster.lease import LeaseError
from cluster.loader import Batch, TrainLoader
from cluster.profiling import MEASURED, WARM_UP, StepProfiler
from cluster.reader import LostSampleError
from cluster.run_config import load_config
from cluster.start import Start, agree_on_start, begin_state
from cluster.step_metrics import StepMetrics
from cluster.storage import AccessDeniedError, Storage, open_storage
from cluster.telemetry import RunLog
from cluster.training import Ended
from cluster.watchdog import Watchdog
from sepico.network import Segmentor
from sepico.panels import step_panel
from sepico.schedule import ema_decay, is_due
from sepico.step import AdaptationStep
from sepico.teacher import class_weights

# Between questions whether the group is about to end: calls to actors, a barrier of all workers.
POLL_STEPS = 5


def train_worker(payload: dict[str, Any]) -> dict[str, float] | Ended:
    """Train until step `until`, from the newest checkpoint of the run if there is one.

    Runs on every worker of a Ray Train group; `payload` holds `config` (TrainConfig with absolute
    URLs and a resolved number of CPUs), `run_url`, `until` (the step to end after), `pauses` (steps
    to wait at), `lease` and `progress` (a ProgressActor). Returns the last validation's metrics, or
    `Ended` of a run that diverged, that lost a sample, that may not be written, or that has another
    writer: Ray starts the workers again after any error. Raises LeaseError where another writer
    took the run meanwhile.
    """
    config: TrainConfig = payload["config"]
    progress = payload["progress"]
    if reason := ray.get(progress.end_reason.remote()):
        return Ended(reason)
    device = set_up_process(config.cpus_per_worker)
    run = open_storage(payload["run_url"], config.storage)
    with Watchdog(config.hang_timeout, run, dist.get_rank(), progress) as watchdog:
        try:
            start = agree_on_start(config, run, payload["lease"])
        except (LeaseError, AccessDeniedError) as error:
            return Ended(str(error))
        try:
            trainer = _Trainer(config, device, run, start, progress, watchdog)
            with closing(trainer):
                return trainer.train(payload["until"], payload["pauses"])
        except (LostSampleError, AccessDeniedError) as error:
            # The others wait for this rank in a collective: only a new start ends all of them.
            ray.get(progress.end.remote(str(error)))
            raise


class _Trainer:
    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        run: Storage,
        start: Start,
        progress: Any,
        watchdog: Watchdog,
    ) -> None:
        self.config, self.device, self.progress = config, device, progress
        self.run, self.watchdog = run, watchdog
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.steps = config.optimization.steps

        self.state, self.start = begin_state(config, device, start)
        self.engine, self.teacher = self.state.engine, self.state.teacher
        # A group that begins at its end, or at a pause, has no step left to measure at.
        self.validated = start.checkpoint.metrics if start.checkpoint else {}
        self.loader = TrainLoader(
            config.data,
            config.storage,
            seed=config.seed,
            global_batch=config.optimization.global_batch,
            rank=self.rank,
            world_size=self.world_size,
            start_step=self.start,
            targets=self.teacher is not None,
            references=config.teacher.day_night,
            warn=self._warn_of_cache,
        )
        pixel_counts = torch.from_numpy(self.loader.source.pixel_counts.sum(axis=0))
        network = self.engine.module.module
        self.step = AdaptationStep(
            config,
            network.normalize,
            self.teacher,
            self.state.contrast,
            class_weights(pixel_counts, config.teacher.class_weight_std).to(device),
        )
        self.log, origin = None, {}
        if self.rank == 0:
            environment = describe_environment(device, self.world_size, config.cpus_per_worker)
            run.put(ENVIRONMENT, json.dumps(environment, indent=1).encode())
            origin = {"config": load_config(run), "versions": environment["versions"]}
            self.log = RunLog(run, start.lease, self.start, self._warn_of_upload)
        self.checkpoints = CheckpointWriter(
            run,
            start.lease,
            config.keep_last,
            config.keep_best,
            origin,
            # A resume cannot write the lines before it again.
            before_commit=partial(self.log.upload, needed=True) if self.log else lambda: None,
            committed=self._committed,
        )
        self.metrics = StepMetrics(
            config, self.step, self.engine, self.loader, self.log, progress, self.start
        )
        if self.rank == 0:
            self._tell_start(network.autocast_dtype)
        self.preemption: ray.train.PreemptionInfo | None = None
        self.profiler = self._profiler() if config.profile and self.rank == 0 else None

    def _profiler(self) -> StepProfiler:
        """Names the parts of a step."""
        profiler, teacher = StepProfiler(self.run, self.device), self.teacher
        profiler.part("data", self, "_next_batch")
        profiler.part("student forward", self.engine.module, "forward")
        profiler.part("backward", self.engine.module, "backward")
        profiler.part("gradient all-reduce", self.engine.module, "allreduce_gradients")
        profiler.part("optimiser", self.engine.module, "step")
        profiler.part("cross entropy", self.step, "_cross_entropy")
        profiler.part("augmentation", self.step, "_strong")
        if teacher is not None:
            profiler.part("pseudo-labels", teacher, "probabilities")
            profiler.part("source features", teacher, "embeddings")
            profiler.part("class statistics", self.step, "_start_statistics")
            profiler.part("contrast", self.state.contrast, "loss")
            profiler.part("teacher average", self.engine, "update_teacher")
        profiler.part("logging", self.metrics, "show")
        profiler.part("validation", self, "_validate")
        return profiler

    def _tell_start(self, autocast: torch.dtype | None) -> None:
        precision = str(autocast or torch.float32).removeprefix("torch.")
        fields = {"step": self.start, "workers": self.world_size, "precision": precision}
        batch = self.config.optimization.global_batch
        if batch % self.world_size:
            most = math.ceil(batch / self.world_size)
            fields["message"] = (
                f"{batch} samples are shared unevenly: all wait for those with {most}"
            )
        self.progress.event.remote("info", "workers", fields)

    def _warn_of_upload(self, message: str) -> None:
        self.progress.event.remote("warning", "upload_failed", {"message": message})

    def _warn_of_cache(self, message: str) -> None:
        fields = {"node": socket.gethostname(), "rank": self.rank, "message": message}
        self.progress.event.remote("warning", "cache_off", fields)

    def _committed(self, checkpoint: Checkpoint) -> None:
        self.progress.committed.remote(checkpoint.step, checkpoint.prefix)

    def close(self) -> None:
        self.loader.close()
        self.checkpoints.close()
        if self.log:
            self.log.close()

    def train(self, until: int, pauses: tuple[int, ...] = ()) -> dict[str, float] | Ended:
        left, needed = until - self.start, WARM_UP + MEASURED
        if self.profiler and left < needed:
            message = f"--profile takes {needed} steps, {left} are left: none is measured"
            self.progress.event.remote("warning", "not_profiled", {"message": message})
        self.batches, optimization = iter(self.loader), self.config.optimization
        for step in range(self.start, until):
            if step in pauses and not self._may_go_on(step):
                break
            self.watchdog.beat(step)
            batch = self._next_batch()
            self._seed(step)
            student = self.engine.module.module.train()
            done = step + 1
            rests = done == until or done in pauses
            logged = done % self.config.log_every == 0 or rests
            terms = self.step.terms(self.engine, batch.to(self.device), step, per_class=logged)
            try:
                self.engine.step(terms, step)
            except DivergenceError:
                return self._diverged(step, batch)
            if self.teacher is not None:
                decay = ema_decay(step, optimization, self.config.teacher.ema_alpha)
                self.engine.update_teacher(self.teacher, decay)
            if logged:
                self.metrics.show(step)
            if self.log and self.step.pictures and done % self.config.panel_every == 0:
                panel = step_panel(self.step.pictures, self.loader.source.taxonomy)
                self.log.picture("step", done, panel)
            due = is_due(done, self.config.validation.every, optimization)
            validate = self.config.validation.data and (due or rests)
            self.validated = self._validate(student, step) if validate else {}
            ends = done % POLL_STEPS == 0 and (self._is_drained(done) or self._is_resized(done))
            due = is_due(done, self.config.checkpoint_every, optimization)
            if due or rests or ends:
                self.checkpoints.save(done, self.state, self.validated, pinned=done == until)
            if ends or rests:
                self.checkpoints.wait()
            self.checkpoints.poll()
            if self.log:
                self.log.poll()
            if validate:
                ray.train.report({"step": done, **self.validated})
            if self.profiler and (table := self.profiler.step_done(done)):
                self.progress.event.remote("info", "profiled", {"step": done, "message": table})
        return self.validated

    def _may_go_on(self, step: int) -> bool:
        """Wait at a pause for the verdict on it."""
        if self.rank == 0:
            self.progress.arrive.remote(step)
        verdict = self.progress.wait_for_verdict.remote(step)
        while True:
            self.watchdog.beat()  # however long it takes, this is no hang
            with suppress(ray.exceptions.GetTimeoutError):
                return ray.get(verdict, timeout=self.config.hang_timeout / 2)

    def _next_batch(self) -> Batch:
        return next(self.batches)

    def _diverged(self, step: int, batch: Batch) -> Ended:
        """Say what is not finite and on which samples. A collective."""
        if self.log:
            self.log.diverged()
        found = [name for name, value in self.step.metrics.items() if not value.isfinite()]
        shares: list[Any] = [None] * self.world_size
        dist.all_gather_object(shares, (found, batch.samples))
        guilty = [share for share in shares if share[0]] or shares
        names = sorted({name for found, _ in guilty for name in found}) or ["the gradient"]
        keys = "; ".join(key for _, samples in guilty for key in samples)
        self.checkpoints.wait()
        saved = list_checkpoints(self.run)
        return Ended(
            f"step {step} is not finite ({', '.join(names)}), samples {keys}: nothing was updated, "
            f"the last checkpoint is of step {saved[-1].step if saved else 0}; lower "
            "optimization.lr or look at these samples"
        )

    def _is_drained(self, done: int) -> bool:
        """Whether a node of this run is newly being drained. Asks all ranks, they agree."""
        before, self.preemption = self.preemption, ray.train.get_preemption_info()
        if self.preemption in (None, before):
            return False
        if self.log:
            nodes = ", ".join(self.preemption.preempted_node_to_ranks)
            message = f"node {nodes} is being drained: checkpoint at step {done}"
            self.progress.event.remote("warning", "drained", {"step": done, "message": message})
        return True

    def _is_resized(self, done: int) -> bool:
        """Whether the group waits for a checkpoint to become larger or smaller. Ranks agree."""
        fewest, most = self.config.worker_range.min, self.config.worker_range.max
        return fewest < most and ray.get(self.progress.wants_checkpoint.remote(done))

    def _seed(self, step: int) -> None:
        """Dropout draws from torch's generator: an address a step and rank makes a resume exact."""
        torch.manual_seed(hash((self.config.seed, step, self.rank)) & 0x7FFFFFFFFFFFFFFF)

    def _validate(self, student: Segmentor, step: int) -> dict[str, float]:
        networks = {"student": student}
        if self.teacher is not None:
            networks["teacher"] = self.teacher.network
        data, storage = self.config.validation.data, self.config.storage
        with ExitStack() as hooks:
            for network in networks.values():  # a long validation is no hang
                beat = network.register_forward_pre_hook(lambda *_: self.watchdog.beat())
                hooks.enter_context(beat)
            metrics, per_class = validate_networks(networks, data, storage, self.device)
        if self.log:
            self.log.log(step, metrics | per_class)
            self.progress.event.remote("info", "validated", {"step": step + 1, **metrics})
        return metrics
