"""The command line as a user types it, and every configuration that comes with the project."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_autolr import cli, commands
from lightning_autolr.fit import resolve
from lightning_autolr.schedules import Tabulated

# LightningCLI's calls of jsonargparse, not ours
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.glob("*/*.yaml"))
METHODS = {
    "autolrs", "autolrs_paper", "autowu", "beam", "constant", "cosine", "factors", "linear", "onecycle", "rex", "step", "wsd"
}  # fmt: skip
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false"]
SHORT = ["--trainer.max_steps=4", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"]


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def fit(config: Path | str, folder: Path, *options: str) -> dict[str, Any]:
    """Run ``fit`` into ``folder`` and return its ``result.json``."""
    where = [f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu"]
    assert cli.main(["fit", "--config", str(config), *QUIET, *where, *options]) == 0
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


# --- fit


def test_fit_reports_the_final_metrics_and_where_everything_lies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = fit(CONFIGS / "digits/rex.yaml", tmp_path, "--trainer.max_steps=30")
    printed = capsys.readouterr().out
    assert f"\n30 steps trained; {result['seconds']:.0f} s in all.\n" in printed
    assert result["steps"] == result["schedule_steps"] == 30
    assert result["search_steps"] == 0
    assert result["seconds"] > 0
    assert set(result["metrics"]) == {"val_loss", "val_acc", "test_loss", "test_acc"}
    for name, value in result["metrics"].items():
        assert f"{name:<10} {value:.4f}" in printed
    for file in ("autolr/schedule.json", "autolr/trace.jsonl", "result.json", "config.yaml"):
        assert (tmp_path / file).exists()
    assert str(tmp_path / "autolr/schedule.json") in printed


def test_a_folder_may_be_used_again(tmp_path: Path) -> None:
    first = fit(CONFIGS / "digits/rex.yaml", tmp_path, *SHORT)
    assert fit(CONFIGS / "digits/rex.yaml", tmp_path, *SHORT)["metrics"] == first["metrics"]


def test_the_saved_configuration_repeats_the_run(tmp_path: Path) -> None:
    first = fit(CONFIGS / "digits/rex.yaml", tmp_path / "a", *SHORT)
    assert fit(tmp_path / "a/config.yaml", tmp_path / "b")["metrics"] == first["metrics"]


def test_the_test_can_be_left_out(tmp_path: Path) -> None:
    result = fit(CONFIGS / "digits/rex.yaml", tmp_path, *SHORT, "--trainer.limit_test_batches=0")
    assert set(result["metrics"]) == {"val_loss", "val_acc"}


MODULE = """
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset

class Line(LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.layer, self.lr = torch.nn.Linear(1, 1), lr

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - 3).square().mean()

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(16, 1)), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)
"""


def test_a_users_own_module_is_found_where_he_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "users_module", raising=False)
    (tmp_path / "own.yaml").write_text("model: {class_path: users_module.Line}\ntrainer: {max_steps: 3}\n")
    assert fit("own.yaml", tmp_path)["metrics"] == {}  # neither validation nor test
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 3


# --- configurations


def test_every_task_has_every_method() -> None:
    assert {(file.parent.name, file.stem) for file in FILES} == {
        (task, method) for task in ("cifar10", "char_lm", "digits", "fashion_mnist") for method in METHODS
    }


def test_a_file_takes_what_it_does_not_say_from_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # paths in a file are relative to it
    config = resolve(str(CONFIGS / "digits/rex.yaml"))
    assert config["trainer"]["max_steps"] == resolve(str(CONFIGS / "digits.yaml"))["trainer"]["max_steps"]
    assert config["trainer"]["logger"]["init_args"]["name"] == "digits/rex"
    (callback,) = config["trainer"]["callbacks"]
    assert callback["class_path"] == "lightning_autolr.ScheduleCallback"
    assert callback["init_args"]["schedule"]["class_path"] == "lightning_autolr.schedules.Rex"


def test_lightnings_own_cli_reads_them_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(CONFIGS / "digits/cosine.yaml")
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", config, "--print_config"])
    with pytest.raises(SystemExit) as end:
        LightningCLI()
    assert not end.value.code
    assert "lightning_autolr.schedules.Cosine" in capsys.readouterr().out


FAST = {"digits/autolrs", "digits/autowu", "digits/rex"}


def _params(files: list[Path]) -> list[Any]:
    names = [f"{file.parent.name}/{file.stem}" for file in files]
    slow = pytest.mark.slow
    return [pytest.param(f, id=n, marks=[] if n in FAST else slow) for f, n in zip(files, names, strict=True)]


SMALL = {
    "digits": [],
    "fashion_mnist": ["--data.init_args.num_train=200", "--data.init_args.num_val=100"],
    "cifar10": [
        "--data.init_args.fake_data=true",
        "--data.init_args.batch_size=4",
        "--data.init_args.eval_batch_size=4",
    ],
    "char_lm": ["--data.init_args.path=text.txt"],
}


@pytest.mark.parametrize("file", _params(FILES))
def test_every_configuration_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if file.parent.name == "fashion_mnist" and not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("needs Debian's dataset-fashion-mnist")
    (tmp_path / "text.txt").write_text("a text of its own, now and then. " * 2000)
    monkeypatch.chdir(tmp_path)
    result = fit(file, tmp_path / "run", *SHORT, *SMALL[file.parent.name])
    assert result["schedule_steps"] <= 4
    assert {"val_loss", "test_loss"} <= set(result["metrics"])


# --- names, help, errors


def test_short_names(tmp_path: Path) -> None:
    result = fit(
        CONFIGS / "digits.yaml", tmp_path, *SHORT, "--trainer.callbacks=ScheduleCallback",
        "--trainer.callbacks.schedule=Linear", "--trainer.callbacks.peak_lr=0.1", "--data=DigitsData",
    )  # fmt: skip
    assert result["steps"] == 4


def test_help_names_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert not end.value.code
    text = capsys.readouterr().out
    assert all(command in text for command in ("fit", "validate", "test", "predict", *cli.COMMANDS))


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_explains_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert not end.value.code
    text = capsys.readouterr().out
    assert text.startswith(f"usage: lightning-autolr {command} ")
    assert text.count("--") > 2
    assert "``" not in text
    assert not re.search(r"--[a-z]+_", text)
    assert "{true,false}" not in text


@pytest.mark.parametrize("flags", [["--equal-total-steps"], ["--equal_total_steps"], []])
def test_flags_stand_alone_and_dashes_are_underscores(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def compare(configs: list[str], equal_total_steps: bool = False, out: str = "", overrides: Any = ()) -> int:
        """Compare.

        Args:
            configs: files.
            equal_total_steps: whether to count.
            out: folder.
            overrides: the rest.
        """
        given.update(locals())
        return 0

    monkeypatch.setitem(cli.COMMANDS, "compare", compare)
    assert cli.main(["compare", "a_b.yaml", "c.yaml", *flags, "--out=x_y", "--", "--trainer.max_steps=3"]) == 0
    assert given["equal_total_steps"] is bool(flags)
    assert (given["configs"], given["out"]) == (["a_b.yaml", "c.yaml"], "x_y")
    assert given["overrides"] == ["--trainer.max_steps=3"]


def test_a_flag_may_stand_before_the_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--equal-total-steps", "a.yaml", "a.yaml"]) == 2
    assert capsys.readouterr().err.startswith("lightning-autolr compare: Expected different configurations")


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--trainer.max_stepps=4", "max_stepps"),
        ("--trainer.callbacks.peak_rl=1", "peak_rl"),
        ("--data.init_args.batch_size=many", "batch_size"),
    ],
)
def test_errors_name_the_key(option: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--config", str(CONFIGS / "digits/rex.yaml"), option])
    assert end.value.code == 2
    assert named in capsys.readouterr().err


def test_resolving_a_bad_configuration_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        resolve(str(CONFIGS / "digits/rex.yaml"), ["--trainer.max_steps=few"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "max_steps" in error
    assert "digits/rex.yaml" in error


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["configs/digits/rex.yaml", "configs/digits/step.yaml"], ["rex", "step"]),
        (["a/rex.yaml", "b/rex.yaml"], ["a-rex", "b-rex"]),
        (["x/a/rex.yaml", "x/b/rex.yaml", "y/a/rex.yaml"], ["x-a-rex", "x-b-rex", "y-a-rex"]),
    ],
)
def test_configurations_have_the_shortest_names_that_differ(paths: list[str], names: list[str]) -> None:
    assert commands._named(paths) == dict(zip(names, paths, strict=True))


def test_the_same_file_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="different configurations"):
        commands._named(["a.yaml", "a.yaml"])


# --- commands on runs


def test_preview_shows_schedules_and_says_what_cannot_be_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [str(CONFIGS / f"digits/{name}.yaml") for name in ("linear", "constant", "autolrs")]
    assert cli.main(["preview", *files, "--", "--trainer.max_steps=400"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"linear +0: 0.1  100: 0.075  200: 0.05  300: 0.025  400: 0\n", printed)
    assert re.search(r"constant +0: 0.1 .* 400: 0.1\n", printed)
    assert "autolrs: no ScheduleCallback" in printed
    assert (tmp_path / "preview.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["preview", files[2]]) == 1


def test_preview_needs_a_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preview", str(CONFIGS / "digits/linear.yaml"), "--", "--trainer.max_steps=-1"]) == 2
    assert "pass `--total-steps`" in capsys.readouterr().err


def test_a_found_schedule_is_replayed_to_the_same_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    steps = ["--trainer.max_steps=20", "--trainer.callbacks.interval=5"]
    found = fit(CONFIGS / "digits/beam.yaml", run, *steps)
    assert found["search_steps"] > 0
    capsys.readouterr()
    assert cli.main(["inspect", str(run), "--csv", str(tmp_path / "rows.csv")]) == 0
    assert (tmp_path / "rows.csv").read_text().count("\n") > 3
    assert cli.main(["replay", str(run), "--", *QUIET[:2]]) == 0
    replayed = json.loads((run / "replay/result.json").read_text())
    assert replayed["metrics"] == found["metrics"]
    assert replayed["search_steps"] == 0
    assert "replayed" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_that_was_resumed_is_replayed_from_its_beginning(tmp_path: Path) -> None:
    config, steps = CONFIGS / "digits/autolrs.yaml", ["--trainer.max_steps=40"]

    def saving(folder: str) -> list[str]:
        saver = "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"
        where = f"--trainer.callbacks.dirpath={tmp_path / folder}"
        return [saver, "--trainer.callbacks.every_n_train_steps=30", "--trainer.callbacks.save_top_k=-1", where]

    fit(config, tmp_path / "whole", *steps, *saving("saved"))
    (saved,) = (tmp_path / "saved").glob("*.ckpt")
    fit(config, tmp_path / "resumed", *steps, *saving("later"), f"--ckpt_path={saved}")
    assert cli.main(["replay", str(tmp_path / "resumed"), "--", *QUIET[:2]]) == 0
    schedules = [Tabulated.from_file(tmp_path / f"resumed{part}/autolr/schedule.json") for part in ("", "/replay")]
    assert [schedule.length for schedule in schedules] == [40, 40]
    assert all(schedules[0](step) == schedules[1](step) for step in range(40))


REPLAYED = """
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset

class Replayed(LightningModule):
    def __init__(self, manual: bool = False):
        super().__init__()
        self.a, self.b = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
        self.automatic_optimization = not manual

    def loss(self, batch):
        return (self.b(self.a(batch[0]).tanh()).squeeze() - batch[0].prod(1)).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def train_dataloader(self):
        x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x), batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.train_dataloader().dataset, batch_size=32)

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD(layer.parameters(), 0.1) for layer in (self.a, self.b)]
        if not self.automatic_optimization:
            return optimizers
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        own = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": own, "interval": "step"}]
"""


@pytest.mark.parametrize(
    ("manual", "options"),
    [
        (
            True,
            {"evaluate_on": "validation"},
        ),  # Lightning counts the steps of both optimizers, a schedule counts batches
        (False, {"on_scheduler": "multiply"}),
        (False, {"on_scheduler": "multiply", "count_search": True}),  # ends before the Trainer's own limit
    ],
)
def test_a_replay_has_the_options_and_the_length_of_the_run(
    manual: bool, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "replayed_module.py").write_text(REPLAYED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "replayed_module", raising=False)
    callback = {
        "class_path": "lightning_autolr.FactorSearchCallback",
        "init_args": {"every": 5, "figures": False, **options},
    }
    config = {
        "seed_everything": 0,
        "model": {"class_path": "replayed_module.Replayed", "init_args": {"manual": manual}},
        "trainer": {"max_epochs": 2, "callbacks": [callback]},
    }
    Path("config.yaml").write_text(json.dumps(config))
    found = fit("config.yaml", tmp_path / "run")
    assert cli.main(["replay", "run", "--", *QUIET[:2]]) == 0
    replayed = json.loads(Path("run/replay/result.json").read_text())
    assert (replayed["metrics"], replayed["steps"]) == (found["metrics"], found["steps"])


def test_a_schedule_is_refined_from_recorded_norms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--trainer.max_steps=30", "--trainer.callbacks+=GradNormCallback"]
    fit(CONFIGS / "digits/linear.yaml", tmp_path, *options)
    assert cli.main(["refine", str(tmp_path), "--smoothing=0.1"]) == 0
    assert Tabulated.from_file(tmp_path / "autolr/refined.json").length == 30
    assert "lightning_autolr.ScheduleCallback" in capsys.readouterr().out


def test_wrong_numbers_are_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "digits/rex.yaml")
    for command, message in (
        (["range-test", config, "--num-steps", "2", "--out", str(tmp_path)], "Expected num_steps"),
        (["preview", config, "--total-steps", "0"], "Expected a known number of steps"),
        (["preview", config, "--out", str(tmp_path / "a.xyz")], "Expected a picture that ends in"),
    ):
        assert cli.main(command) == 2
        assert message in (said := capsys.readouterr().err)
        assert said.count("\n") == 1


def test_a_range_test_suggests_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--num-steps=10", "--repeats=1", f"--out={tmp_path}", "--", *QUIET[:2], "--trainer.accelerator=cpu"]
    assert cli.main(["range-test", str(CONFIGS / "digits/constant.yaml"), *options]) == 0
    assert "Range tests" in capsys.readouterr().out
    assert (tmp_path / "autolr/range_test.json").exists()
    assert (tmp_path / "autolr/range_test_epoch_0.png").exists()
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("command", ["inspect", "replay", "refine"])
def test_a_folder_that_is_no_run_is_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lightning-autolr {command}: Expected ")
    assert "nowhere" in error


def test_arguments_for_fit_where_there_is_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(tmp_path), "--", "--trainer.max_steps=3"])
    assert "no arguments for fit" in capsys.readouterr().err
