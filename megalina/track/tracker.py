"""The tracker: where a run's records go.  `metrics.jsonl` always, W&B and TensorBoard as configured.

Lives on rank 0 alone.  Only `metrics.jsonl` is written by the caller's thread (a line, flushed).  Each of the others has a thread
of its own behind a bounded queue: what is slow, hangs or fails there costs one line of warning and that tracker, never a step.
"""

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megalina.config import TrackerConfig
from megalina.track.expert_load import LoadHistory, keep_snapshot, layer_numbers, load_figure, short_shares
from megalina.track.metrics import MetricsFile, Record, json_record, read_metrics, scalars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    def log(self, record: dict[str, Any]) -> None:
        """One step's record, with `step` as the key."""

    def images(self, step: int, figures: "dict[str, Figure]") -> None: ...

    def rewind(self, step: int) -> None:
        """The run has gone back to after `step`: metrics.jsonl forgets what came later; W&B and TensorBoard keep both."""

    def finish(self, *, failed: bool) -> None:
        """Write out what is queued, wait for it at most a minute.  The tracker takes nothing afterwards."""


class Backend(Protocol):
    """A tracker that may be slow.  Pictures are uint8 [height, width, 3]."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...
    def images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None: ...
    def expert_load(self, history: LoadHistory, layer_numbers: list[int], picture: np.ndarray) -> None: ...
    def finish(self, *, failed: bool) -> None: ...


Job = Callable[[Backend], None]


class Background:
    """A backend and the thread that opens, feeds and closes it."""

    def __init__(self, name: str, open_backend: Callable[[], Backend], *, queue_size: int = 4096) -> None:
        self._name = name
        self._jobs: queue.Queue[Job | None] = queue.Queue(queue_size)
        self._dropped = threading.Event()
        self._dropping = threading.Lock()  # caller and thread may both give up; one line is enough
        self._thread = threading.Thread(target=self._work, args=(open_backend,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def do(self, job: Job) -> None:
        """Never waits."""
        if self._dropped.is_set():
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._drop(f"it is {self._jobs.maxsize} records behind")

    def finish(self, job: Job, *, timeout_s: float) -> None:
        self.do(job)
        if not self._dropped.is_set():
            try:
                self._jobs.put(None, timeout=timeout_s)
            except queue.Full:
                self._drop(f"it is {self._jobs.maxsize} records behind")
                return
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self._drop(f"it did not finish in {timeout_s:g} s")

    def _work(self, open_backend: Callable[[], Backend]) -> None:
        try:
            backend = open_backend()
            while not self._dropped.is_set() and (job := self._jobs.get()) is not None:
                job(backend)
        except Exception as error:  # noqa: BLE001  (whatever a tracker does wrong must not reach the run)
            self._drop(f"{type(error).__name__}: {error}")

    def _drop(self, reason: str) -> None:
        with self._dropping:
            if not self._dropped.is_set():
                line = " ".join(reason.split())
                logger.warning("%s is not tracking this run any more (%s); the files of the run have all", self._name, line)
                self._dropped.set()  # last: who sees it set may end the process


class Picture:
    """A figure's pixels, drawn once, by the first thread that needs them.  matplotlib wants one thread at a time: `lock`."""

    def __init__(self, draw: "Callable[[], Figure]", lock: threading.Lock) -> None:
        self._draw = draw
        self._lock = lock
        self._pixels: np.ndarray | None = None

    def pixels(self) -> np.ndarray:
        with self._lock:
            if self._pixels is None:
                from matplotlib.backends.backend_agg import FigureCanvasAgg  # most of a second, which no start need wait for

                canvas = FigureCanvasAgg(self._draw())
                canvas.draw()
                self._pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
            return self._pixels


class RunTracker:
    """The tracker of a run: the metrics file, and any number of backends."""

    def __init__(
        self,
        file: MetricsFile,
        backends: list[Background],
        *,
        model: Mapping[str, Any],
        total_steps: int,
        image_interval: int,
        finish_timeout_s: float = 60.0,
    ) -> None:
        self._file: MetricsFile | None = file
        self._backends = backends
        self._model = model
        self._total_steps = total_steps
        self._image_interval = image_interval
        self._finish_timeout_s = finish_timeout_s
        # a run that continues draws the map of the whole run
        self._snapshots = [record for record in read_metrics(file.path) if record.get("expert_load")]
        self._drawn_step = -1
        self._drawing = threading.Lock()

    def log(self, record: dict[str, Any]) -> None:
        plain = json_record(record)
        load = plain.pop("expert_load", None)
        step = plain["step"]
        flat = scalars(plain, self._layers)
        for backend in self._backends:
            backend.do(lambda opened: opened.log(step, flat))
        if load is not None and keep_snapshot(step, self._total_steps):
            plain["expert_load"] = short_shares(load)
            self._snapshots.append({"step": step, "expert_load": plain["expert_load"]})
        self._write(plain)
        if self._image_interval and step % self._image_interval == 0:
            self._show_expert_load()

    def images(self, step: int, figures: "dict[str, Figure]") -> None:
        pictures = {name: Picture(lambda figure=figure: figure, self._drawing) for name, figure in figures.items()}  # type: ignore[misc]
        for backend in self._backends:
            backend.do(lambda opened: opened.images(step, {name: picture.pixels() for name, picture in pictures.items()}))

    def rewind(self, step: int) -> None:
        self._snapshots = [record for record in self._snapshots if record["step"] <= step]
        if self._file is not None:
            try:
                self._file.rewind(step)
            except OSError as error:
                logger.warning("%s is not written any more (%s)", self._file.path, error)
                self._file = None

    def finish(self, *, failed: bool) -> None:
        self._show_expert_load()
        if self._file is not None:
            self._file.close()
            self._file = None
        for backend in self._backends:
            backend.finish(lambda opened: opened.finish(failed=failed), timeout_s=self._finish_timeout_s)

    def _layers(self, num_moe_layers: int) -> list[int]:
        return layer_numbers(self._model, num_moe_layers)

    def _write(self, record: Record) -> None:
        if self._file is None:
            return
        try:
            self._file.write(record)
        except OSError as error:  # a full disk; a line that was cut off stays the last, so the file can be read
            logger.warning("%s is not written any more (%s)", self._file.path, error)
            self._file = None

    def _show_expert_load(self) -> None:
        if not self._snapshots or self._snapshots[-1]["step"] == self._drawn_step or not self._backends:
            return
        snapshots = list(self._snapshots)
        self._drawn_step = snapshots[-1]["step"]
        numbers = self._layers(len(snapshots[-1]["expert_load"]))

        def history() -> LoadHistory:
            found = LoadHistory.of(snapshots)
            assert found is not None
            return found

        picture = Picture(lambda: load_figure(history(), numbers), self._drawing)
        for backend in self._backends:
            backend.do(lambda opened: opened.expert_load(history(), numbers, picture.pixels()))


def open_trackers(tracker: TrackerConfig, *, run_dir: Path, config: dict[str, Any], resumed_step: int) -> Tracker:
    """The tracker of the run in `run_dir`, whose resolved config is `config`, that goes on after `resumed_step` (0: a new run).

    Returns at once: W&B and TensorBoard open in their threads.  OSError if metrics.jsonl can't be written.
    """
    file = MetricsFile(run_dir / "metrics.jsonl", resumed_step=resumed_step)
    backends = []
    if tracker.wandb.mode != "disabled":

        def open_wandb() -> Backend:
            from megalina.track.wandb_run import WandbRun  # a second of import, and a broken install must not fail the run

            return WandbRun(tracker.wandb, run_dir=run_dir, run_config=config)

        backends.append(Background("W&B", open_wandb))
    if tracker.tensorboard:

        def open_tensorboard() -> Backend:
            from megalina.track.tensorboard_run import TensorBoardRun

            return TensorBoardRun(run_dir, resumed_step=resumed_step)

        backends.append(Background("TensorBoard", open_tensorboard))
    return RunTracker(
        file, backends, model=config["model"], total_steps=config["train"]["steps"], image_interval=tracker.image_interval
    )
