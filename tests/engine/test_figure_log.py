"""Figures and accounts reach every kind of logger, and never end a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lightning_autolr import RangeTestCallback
from lightning_autolr.core.requests import Train
from lightning_autolr.engine import figure_log
from lightning_autolr.engine.driver import SearchCallback
from lightning_autolr.engine.figure_log import FigureLog, log_account, log_figure, options_of
from lightning_autolr.search.base import AbstractSearch
from tests.engine.small import Stages, Tiny, fit_tiny
from tests.report.traces import by_hand, entries_of, segments_of

PNG = b"\x89PNG"


def picture() -> Figure:
    figure = Figure(figsize=(6.4, 4.2), dpi=100)
    figure.subplots().plot([1, 2], [1, 2])
    return figure


def events(folder: str | Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def hyperparameters(folder: str | Path) -> dict[str, Any]:
    content = events(folder).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}


class Recorder:
    """Notes every call, whatever it is, as (name, args, kwargs)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def logger_of(name: str, **attributes: Any) -> Any:
    """A stand-in for a logger whose package is not there: ours are told apart by the names of their classes."""
    methods = {k: staticmethod(v) if callable(v) else v for k, v in attributes.items()}
    return type(name, (), {"experiment": Recorder(), **methods})()


# -- one figure ---------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_an_image_at_its_step(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    for step in (3, 3, 7):
        assert log_figure([logger], "stage", picture(), step, tmp_path / "files") is None
    logger.experiment.flush()
    images = events(logger.log_dir).Images("autolr/stage")
    assert [image.step for image in images] == [3, 3, 7]
    assert [(image.width, image.height) for image in images] == [(640, 420)] * 3
    assert not (tmp_path / "files").exists()


def test_without_a_logger_that_takes_it_there_is_a_file(tmp_path: Path) -> None:
    path = log_figure([CSVLogger(tmp_path)], "stage", picture(), 12, tmp_path / "files")
    assert path == tmp_path / "files" / "stage_0000012.png"
    assert path.read_bytes().startswith(PNG)
    assert log_figure([], "stage", picture(), 12, None) is None


def test_weights_and_biases_get_pixels() -> None:
    calls = Recorder()
    logger = logger_of("WandbLogger", log_image=calls.log_image)
    log_figure([logger], "stage", picture(), 5, None)
    ((name, _, given),) = calls.calls
    assert (name, given["key"], given["step"]) == ("log_image", "autolr/stage", 5)
    assert (given["images"][0].size, given["images"][0].mode) == ((640, 420), "RGB")


def test_mlflow_and_comet_get_the_figure(tmp_path: Path) -> None:
    mlflow, comet, figure = logger_of("MLFlowLogger", run_id="r"), logger_of("CometLogger"), picture()
    assert log_figure([mlflow, comet], "stage", figure, 5, tmp_path) is None
    assert mlflow.experiment.calls == [("log_figure", ("r", figure, "autolr/stage_0000005.png"), {})]
    assert comet.experiment.calls == [("log_figure", (), {"figure_name": "autolr/stage", "figure": figure, "step": 5})]


def test_subclasses_of_a_logger_count(tmp_path: Path) -> None:
    logger = type("Mine", (TensorBoardLogger,), {})(tmp_path)
    assert log_figure([logger], "stage", picture(), 0, tmp_path / "files") is None


# -- the figures of a run -----------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Names and steps of the figures that were logged; none is drawn."""
    names: list[tuple[str, int]] = []
    monkeypatch.setattr(figure_log, "log_figure", lambda _, name, figure, step, folder: names.append((name, step)))
    monkeypatch.setattr(
        figure_log, "drawings_of_search", lambda search: {"stage": picture} if len(search.candidates) > 1 else {}
    )
    return names


def test_only_the_search_that_has_ended_is_drawn(drawn: list[tuple[str, int]], tmp_path: Path) -> None:
    pairs = by_hand()
    trace, segments = entries_of(pairs), segments_of(pairs)
    log, train = FigureLog([], str(tmp_path)), pairs[5][0]
    log.after_search(trace[:5], [], train, 0)
    log.after_search(trace[:7], segments[:1], train, 4)  # no more than a look
    log.after_search(trace[:6], segments[:1], None, 4)  # nothing
    assert drawn == [("stage", 0)]


def test_a_long_run_is_drawn_thirty_times(drawn: list[tuple[str, int]], tmp_path: Path) -> None:
    log, trace = FigureLog([], str(tmp_path)), entries_of(by_hand())
    for step in range(100):
        log.after_search(trace[:5], [], None, step)
    assert drawn == [("stage", step) for step in range(30)]


def test_a_figure_that_fails_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: Any) -> dict[str, Any]:
        return {"stage": lambda: 1 / 0}

    monkeypatch.setattr(figure_log, "drawings_of_search", broken)
    log, trace = FigureLog([], str(tmp_path)), entries_of(by_hand())
    with pytest.warns(UserWarning, match="'stage' at step 8 could not be drawn or logged: ZeroDivisionError"):
        log.after_search(trace[:5], [], None, 8)


def test_without_matplotlib_there_is_one_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    log, trace = FigureLog([], str(tmp_path)), entries_of(by_hand())
    with caplog.at_level("INFO"):
        for step in range(3):
            log.after_search(trace[:5], [], None, step)
        log.at_end(trace, segments_of(by_hand()), 10)
    (message,) = [r.message for r in caplog.records if "figures" in r.message]
    assert message.startswith("There will be no figures.")
    assert 'pip install "lightning-autolr[plots]"' in message
    assert not list(tmp_path.iterdir())


# -- the account --------------------------------------------------------------------------------------------------------

OPTIONS = {"autolr/method": "AutoLRS", "autolr/tau": 100, "autolr/min_lr": None}
METRICS = {"autolr/search_steps": 30.0}


def test_tensorboard_shows_options_with_the_final_score(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    log_account([logger], OPTIONS, METRICS, 0.5, 10)
    logger.experiment.flush()
    assert hyperparameters(logger.log_dir) == {"autolr/method": "AutoLRS", "autolr/tau": 100, "autolr/min_lr": "None"}
    assert [(x.step, x.value) for x in events(logger.log_dir).Scalars("hp_metric")] == [(10, 0.5)]


def test_the_users_hyperparameters_stay_and_ours_stand_below(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"width": 8})
    log_account([logger], OPTIONS, METRICS, 0.5, 10)
    logger.experiment.flush()
    assert hyperparameters(logger.log_dir) == {"width": 8}
    below = Path(logger.log_dir) / "autolr"
    assert hyperparameters(below)["width"] == 8
    assert hyperparameters(below)["autolr/tau"] == 100
    assert [x.value for x in events(below).Scalars("autolr/search_steps")] == [30.0]
    assert logger.hparams == {"width": 8}


def test_other_loggers_get_numbers_alone() -> None:
    calls = Recorder()
    logger = logger_of("MLFlowLogger", log_metrics=calls.log_metrics, log_hyperparams=calls.log_hyperparams)
    log_account([logger], OPTIONS, METRICS, 0.5, 10)
    assert calls.calls == [("log_metrics", (METRICS,), {"step": 10})]


def test_options_are_the_fields_of_the_search() -> None:
    assert options_of(Search(Stages(num_steps=4)))["autolr/num_steps"] == 4
    assert options_of(Search(Stages()))["autolr/method"] == "Search"


# -- in a Trainer -------------------------------------------------------------------------------------------------------


class Search(SearchCallback):
    def __init__(self, search: AbstractSearch, **options: Any) -> None:
        super().__init__(**options)
        self.search = search


class WithHyperparameters(Tiny):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.save_hyperparameters()


def test_a_run_with_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer, _ = fit_tiny(tmp_path, [Search(Stages())], WithHyperparameters(), logger=logger, log_every_n_steps=1)
    seen = events(logger.log_dir)
    assert {name: [x.step for x in seen.Images(name)] for name in seen.Tags()["images"]} == {
        "autolr/candidates": [0, 3],
        "autolr/probes": [0, 3],
        "autolr/schedule": [6],
    }
    # TensorBoard shows a name in one place only: a figure called as a number is would hide it, or be hidden
    assert not set(seen.Tags()["images"]) & set(seen.Tags()["scalars"])
    assert (Path(logger.log_dir) / "autolr" / "schedule.png").read_bytes().startswith(PNG)
    assert not (Path(logger.log_dir) / "autolr" / "figures").exists()
    steps = [x.step for x in seen.Scalars("autolr/search_steps")]
    assert steps == sorted(steps)
    below = Path(logger.log_dir) / "autolr"
    assert hyperparameters(below)["autolr/num_stages"] == 2
    assert hyperparameters(below)["lr"] == 0.05
    (score,) = events(below).Scalars("hp_metric")
    assert score.value == pytest.approx(float(trainer.callback_metrics["val_loss"]))


def test_a_run_with_csv_files(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit_tiny(tmp_path, [Search(Stages())], WithHyperparameters(), logger=logger, log_every_n_steps=1)
    folder = Path(logger.log_dir)
    names = sorted(f.name for f in (folder / "autolr" / "figures").iterdir())
    assert names == [f"{name}_000000{step}.png" for name in ("candidates", "probes") for step in (0, 3)]
    assert (folder / "autolr" / "schedule.png").exists()
    assert yaml.safe_load((folder / "hparams.yaml").read_text()) == {"lr": 0.05}
    assert "autolr/search_seconds" in (folder / "metrics.csv").read_text().splitlines()[0]


def test_a_range_test_is_drawn_where_it_was_made(tmp_path: Path) -> None:
    board, files = TensorBoardLogger(tmp_path / "a"), CSVLogger(tmp_path / "b")
    for logger in (board, files):
        callback = RangeTestCallback(milestones=(1, 3), unit="step", num_steps=20, repeats=1)
        fit_tiny(tmp_path, [callback], logger=logger)
    assert [image.step for image in events(board.log_dir).Images("autolr/range_test")] == [1, 3]
    figures = Path(files.log_dir) / "autolr" / "figures"
    assert sorted(f.name for f in figures.iterdir()) == ["range_test_0000001.png", "range_test_0000003.png"]
    assert not (Path(board.log_dir) / "autolr" / "figures").exists()


def test_a_range_test_without_figures(tmp_path: Path) -> None:
    fit_tiny(tmp_path, [RangeTestCallback(num_steps=20, repeats=1, figures=False)])
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("options", [{"callback": {"figures": False}}, {"trainer": {"fast_dev_run": True}}])
def test_a_run_without_figures(options: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    fit_tiny(tmp_path, [Search(Stages(), **options.get("callback", {}))], **options.get("trainer", {}))
    assert not list(tmp_path.rglob("*.png"))


def test_figures_do_not_change_the_trace(tmp_path: Path) -> None:
    traces = []
    for draws in (True, False):
        callback = Search(Stages(num_stages=1), figures=draws)
        fit_tiny(tmp_path / str(draws), [callback])
        traces.append([(e.request, e.answer) for e in callback.trace])
    assert traces[0] == traces[1]
    assert sum(isinstance(request, Train) for request, _ in traces[0]) == 2
