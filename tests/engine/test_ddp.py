"""Several processes on one machine: ranks see different data, decide together, and a search leaves no trace on any of them."""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_autolr.callbacks.schedule import ScheduleCallback
from lightning_autolr.core.requests import ProbeResult, Status
from lightning_autolr.engine.compat import local_tensor
from lightning_autolr.schedules import Tabulated
from tests.engine.small import Stages, Tiny
from tests.engine.subjects import NoisyData, Scripted, Search, differences

_ENVIRONMENT: dict[str, str] = {}  # of a child; the Trainer takes some of it away at the end of each fit


def on_ranks(world: int, work: Callable[[int, Path], None], folder: Path) -> None:
    """Run ``work(rank, folder)`` in ``world`` forked processes, as a cluster's launcher would have started them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_child, (world, port, work, folder), nprocs=world, start_method="fork")


def _child(rank: int, world: int, port: int, work: Callable[[int, Path], None], folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    _ENVIRONMENT.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world), NODE_RANK="0")
    _ENVIRONMENT.update(LOCAL_RANK=str(rank), RANK=str(rank))
    try:
        work(rank, folder)
    except BaseException:
        traceback.print_exc()  # of whatever it was: a skip or an exit of one rank is a failure of the test, too
        os._exit(1)  # the other ranks may hang in a collective: let the parent end them
    torch.distributed.destroy_process_group()


class Ranked(Tiny):
    """Batch norm and dropout; remembers on which rank it is."""

    def __init__(self, optimizer: str = "sgd", manual: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 8))
        self.optimizer, self.automatic_optimization = optimizer, not manual

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self.layer(self.norm(self.body(batch[0]))), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, sync_dist=True)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.01)
        return super().configure_optimizers()


def fit_ranked(folder: Path, callback: Any, module: Any, **options: Any) -> dict[str, Any]:
    seed_everything(5, verbose=False)
    os.environ.update(_ENVIRONMENT)
    settings: dict[str, Any] = {"max_steps": 14, "strategy": {}, "val_check_interval": 3, **options}
    if isinstance(settings["strategy"], dict):
        settings["strategy"] = DDPStrategy(**settings["strategy"])
    trainer = Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), callbacks=[callback], log_every_n_steps=1,
        logger=CSVLogger(folder, name="", version=""), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, check_val_every_n_epoch=None, **settings,
    )  # fmt: skip
    train = DataLoader(NoisyData(60, jitter=True), batch_size=4, shuffle=True)
    trainer.fit(module, train, DataLoader(NoisyData(24, jitter=False), batch_size=4))
    trainer.strategy.barrier()
    return {
        "weights": {k: v.detach().clone() for k, v in module.state_dict().items()},
        "optimizer": trainer.optimizers[0].state_dict(),
        "step": trainer.global_step,
        "metrics": {k: v for k, v in trainer.callback_metrics.items()},
        "rng": torch.get_rng_state(),
    }


def _search_and_replay(make: Callable[[], Any], **options: Any) -> Callable[[int, Path], None]:
    def work(rank: int, folder: Path) -> None:
        torch.manual_seed(11)
        search = Search(Scripted())
        searched = fit_ranked(folder / "search", search, make(), **options)
        torch.manual_seed(11)
        table = Tabulated.from_file(folder / "search" / "autolr" / "schedule.json")
        replayed = fit_ranked(folder / "replay", ScheduleCallback(table), make(), **options)
        assert differences(searched, replayed) == []
        assert search.summary["undone_steps"] == 5
        plain = [(e.request, e.answer, e.fingerprint) for e in search.trace]
        torch.save((searched["weights"], repr(plain), repr(search.schedule)), folder / f"rank-{rank}.pt")

    return work


ROWS: dict[str, tuple[int, Callable[[], Any], dict[str, Any]]] = {
    "2 ranks, accumulate and clip": (
        2,
        Ranked,
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "val_check_interval": 6},
    ),
    "2 ranks": (2, Ranked, {}),
    "2 ranks, adamw, bf16": (2, lambda: Ranked("adamw"), {"precision": "bf16-mixed"}),
    "2 ranks, manual": (2, lambda: Ranked(manual=True), {}),
    "2 ranks, bucket views": (2, Ranked, {"strategy": {"gradient_as_bucket_view": True}}),
    "2 ranks, static graph": (2, Ranked, {"strategy": {"static_graph": True}}),
    "3 ranks": (3, Ranked, {}),
    "3 ranks, accumulate and clip": (
        3,
        Ranked,
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "val_check_interval": 6},
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if i == 0 else pytest.mark.slow) for i, name in enumerate(ROWS)]
)
def test_search_equals_replay_on_every_rank(name: str, tmp_path: Path) -> None:
    world, make, options = ROWS[name]
    on_ranks(world, _search_and_replay(make, **options), tmp_path)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(world)]
    for rank in ranks[1:]:
        assert differences(ranks[0][1:], rank[1:]) == []
        norms = {k: v for k, v in ranks[0][0].items() if "running" not in k}  # batch statistics are each rank's own
        assert differences(norms, {k: rank[0][k] for k in norms}) == []


class BadRank(Ranked):
    """The loss of rank 1 is NaN at a large learning rate, and only there."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        bad = self.global_rank == 1 and self.trainer.optimizers[0].param_groups[0]["lr"] > 0.5
        return loss * float("nan") if bad else loss


def _bad_rank(rank: int, folder: Path) -> None:
    search = Search(Stages(lrs=(1.0, 0.1), num_steps=7))
    outcome = fit_ranked(folder, search, BadRank())
    answers = [e.answer.status for e in search.trace if isinstance(e.answer, ProbeResult)]
    assert answers == [Status.DIVERGED, Status.OK] * 2
    assert all(torch.isfinite(v).all() for v in outcome["weights"].values())


def test_divergence_on_one_rank_is_seen_by_all(tmp_path: Path) -> None:
    on_ranks(2, _bad_rank, tmp_path)


class Sharded(Ranked):
    """Parameters cut into pieces over the ranks (FSDP2)."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.body, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.body, mesh=mesh)
            fully_shard(self.layer, mesh=mesh)
            fully_shard(self.norm, mesh=mesh)

    def on_train_start(self) -> None:
        # The optimizer's; the module's own may stand gathered, after a validation.
        assert all(hasattr(p, "to_local") for group in self.trainer.optimizers[0].param_groups for p in group["params"])


def _sharded(rank: int, folder: Path) -> None:
    outcomes = []
    search = Search(Scripted())
    for callback in (
        lambda: search,
        lambda: ScheduleCallback(Tabulated.from_file(folder / "0" / "autolr" / "schedule.json")),
    ):
        torch.manual_seed(11)
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        module = Sharded("adamw")
        fit_ranked(folder / str(len(outcomes)), callback(), module, strategy=strategy)
        outcomes.append([local_tensor(p).detach().clone() for p in module.parameters()])
    assert differences(*outcomes) == []
    plain = [(e.request, e.answer) for e in search.trace]
    torch.save(repr(plain), folder / f"rank-{rank}.pt")


@pytest.mark.slow
def test_sharded_parameters(tmp_path: Path) -> None:
    on_ranks(2, _sharded, tmp_path)
    one, other = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    assert one == other
