"""Runs of a comparison: what each is, whether it is there already, and making those that are not."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml  # type: ignore[import-untyped]

__all__ = ["FinishedRun", "Job", "callbacks_of", "end_with_parent", "run_jobs", "writing_to"]

_PARENT = "LIGHTNING_AUTOLR_PARENT"  # process that started a run


@dataclass(frozen=True)
class Job:
    """A run to make.

    Args:
        name: of the configuration.
        seed: of everything random.
        config: all that ``fit`` needs but where to write.
        folder: where to write.
    """

    name: str
    seed: int
    config: dict[str, Any]
    folder: Path

    @classmethod
    def of(cls, name: str, config: dict[str, Any], seed: int, out: Path, equal_total_steps: bool) -> Job:
        """The run of one configuration with one seed, without the configuration's own loggers and progress bar."""
        config = copy.deepcopy(config)
        trainer = config["trainer"]
        callbacks = trainer["callbacks"] = callbacks_of(config)
        config["seed_everything"] = seed
        trainer["logger"] = None
        for callback in callbacks:
            options = callback.get("init_args", {})
            if callback["class_path"].startswith("lightning_autolr."):
                options.update({k: v for k, v in (("seed", seed), ("count_search", equal_total_steps)) if k in options})
        paths = [callback["class_path"] for callback in callbacks]
        if not any("ProgressBar" in path for path in paths):
            trainer["enable_progress_bar"] = False
        if not any(path.startswith("lightning_autolr.") or "LearningRateMonitor" in path for path in paths):
            callbacks.append({"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"})
        return cls(name, seed, config, out / name / f"seed_{seed}")

    @property
    def text(self) -> str:
        """What stands in ``job.yaml``."""
        return str(yaml.safe_dump(self.config, sort_keys=False))

    @property
    def is_done(self) -> bool:
        """Whether it has been run, from this very configuration."""
        file = self.folder / "job.yaml"
        return (self.folder / "result.json").exists() and file.exists() and file.read_text() == self.text

    def read(self) -> FinishedRun:
        """What has become of it, as its folder says."""
        try:
            result = json.loads((self.folder / "result.json").read_text())
        except FileNotFoundError:
            return FinishedRun(self.name, self.seed, self.folder, error=_reason(self.folder / "log.txt"))
        costs = {name: float(result[name]) for name in FinishedRun.COSTS}
        return FinishedRun(self.name, self.seed, self.folder, metrics=result["metrics"], costs=costs)


@dataclass(frozen=True)
class FinishedRun:
    """A run that was made.

    Args:
        name: of the configuration.
        seed: its seed.
        folder: where everything about it lies.
        error: empty when it finished.
        metrics: at the end of training.
        costs: by the names in ``COSTS``.
    """

    COSTS: ClassVar[tuple[str, ...]] = ("schedule_steps", "search_steps", "seconds", "search_seconds")

    name: str
    seed: int
    folder: Path
    error: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)


def callbacks_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The callbacks of a resolved configuration, which may have none, one, or a list."""
    callbacks = config["trainer"].get("callbacks") or []
    return [callbacks] if isinstance(callbacks, dict) else list(callbacks)


def writing_to(folder: Path) -> list[str]:
    """Arguments of ``fit`` that make it write to this folder itself, for machines and for TensorBoard."""
    where = {"save_dir": str(folder.parent), "name": folder.name, "version": ""}
    kinds = ("CSVLogger", "TensorBoardLogger")
    loggers = [{"class_path": f"lightning.pytorch.loggers.{kind}", "init_args": where} for kind in kinds]
    return ["--trainer.logger", json.dumps(loggers), "--trainer.default_root_dir", str(folder)]


def run_jobs(jobs: Sequence[Job], engine: Literal["local", "ray"], parallel: int) -> Generator[FinishedRun, None, None]:
    """Make the runs that are not there, and yield all as they are finished.

    Args:
        jobs: what to run.
        engine: processes here, or tasks of a Ray cluster.
        parallel: runs at a time; 0 is no limit.
    """
    done = [job for job in jobs if job.is_done]
    yield from (job.read() for job in done)
    todo = [job for job in jobs if job not in done]
    for job in todo:
        shutil.rmtree(job.folder, ignore_errors=True)  # what an interrupted run or another configuration left
        job.folder.mkdir(parents=True)
        (job.folder / "job.yaml").write_text(job.text)
    run = _run_here if engine == "local" else _run_with_ray
    for job in run(todo, parallel):
        yield job.read()


def _run_here(jobs: Sequence[Job], parallel: int) -> Iterator[Job]:
    with ThreadPoolExecutor(max_workers=parallel) as pool:
        started: list[subprocess.Popen[bytes]] = []
        futures = {pool.submit(_fit, job.folder, parallel, started): job for job in jobs}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in started:
                process.terminate()


def end_with_parent() -> None:
    """Let a run end soon after the comparison that started it, however that ended.

    A run that outlives a killed comparison would write into the folder of its successor.
    """
    parent = os.environ.pop(_PARENT, None)  # not for the processes that the run starts itself
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _fit(folder: Path, parallel: int = 1, started: list[subprocess.Popen[bytes]] | None = None) -> None:
    """Train ``folder/job.yaml`` in a process of its own, everything it writes going to ``folder``."""
    command = [
        sys.executable,
        "-m",
        "lightning_autolr",
        "fit",
        "--config",
        str(folder / "job.yaml"),
        *writing_to(folder),
    ]
    environment = {**os.environ, _PARENT: str(os.getpid())}
    if parallel > 1:  # or each run would start as many threads as there are cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // parallel)))
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        if started is not None:
            started.append(process)
        process.wait()


def _run_with_ray(jobs: Sequence[Job], parallel: int) -> Iterator[Job]:
    """Each run as one task. Small files come back by themselves, so that no disk needs to be shared."""
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ImportError("Expected Ray for `--engine ray`, got none: pip install 'lightning-autolr[ray]'.") from error
    ray.init(ignore_reinit_error=True)
    fit = ray.remote(_fit_elsewhere)
    waiting = list(jobs)
    running: dict[Any, Job] = {}
    while waiting or running:
        while waiting and (parallel == 0 or len(running) < parallel):
            job = waiting.pop(0)
            running[fit.remote(job.text)] = job
        (finished,), _ = ray.wait(list(running))
        job = running.pop(finished)
        for name, content in ray.get(finished).items():
            (job.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (job.folder / name).write_bytes(content)
        yield job


def _fit_elsewhere(text: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "run")
        folder.mkdir()
        (folder / "job.yaml").write_text(text)
        _fit(folder)
        files = [f for f in folder.rglob("*") if f.is_file() and f.suffix != ".ckpt"]
        return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def _reason(log: Path) -> str:
    """Why a run ended: its first exception, since later ones are said to come from it, or else its last words."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    named = (line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line))
    return next(named, lines[-1].strip() if lines else "it ended without a word")
