"""Loaders, samplers and batches of unusual kinds, which plain Lightning trains on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Sampler, TensorDataset, default_collate, random_split

from lightning_autolr.callbacks.schedule import ScheduleCallback
from lightning_autolr.core.requests import Probe, ProbeResult
from lightning_autolr.engine.batches import in_parts, own_batch, split
from lightning_autolr.schedules import Tabulated
from tests.engine.small import Stages, Tiny, fit_tiny, loader
from tests.engine.subjects import NoisyData, Search, differences

pytestmark = [
    pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning"),
]


def _answers(search: Search, stage: int = 0) -> list[ProbeResult]:
    return [e.answer for e in search.trace if isinstance(e.request, Probe) and e.request.stage == stage]


def _fit_and_replay(folder: Path, make: Callable[[], dict[str, Any]], **options: Any) -> Search:
    """A fit with a search, and one without that trains by its schedule: they end with the same weights.

    ``make`` gives what is fitted: a module, and a training loader or a datamodule where the module has no loaders.
    """
    search, states = Search(Stages()), []
    for name in ("search", "replay"):
        callback: Any = search
        if name == "replay":
            path = next((folder / "search").rglob("schedule.json"))
            callback = ScheduleCallback(Tabulated.from_file(path), figures=False)
        seed_everything(1, verbose=False)
        made = {"model": Tiny(), **make()}
        if "train_dataloaders" in made:
            made["val_dataloaders"] = loader(12, False)
        silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        settings = {"max_steps": 6, "accelerator": "cpu", "default_root_dir": folder / name, **silent, **options}
        Trainer(callbacks=[callback], **settings).fit(**made)
        states.append((made["model"].state_dict(), torch.get_rng_state()))
    assert not differences(*states)
    return search


class WholeBatches(Tiny):
    """Its validation knows how large batches are."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        losses = cross_entropy(self.layer(self.norm(batch[0])), batch[1], reduction="none")
        self.log("val_loss", (losses * torch.ones(6)).mean())


@pytest.mark.parametrize(("mode", "count"), [("max_size_cycle", 5), ("min_size", 4)])
def test_combined_validation_loaders_give_one_stream(mode: Any, count: int, tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []

    class OfTwo(Tiny):
        def val_dataloader(self) -> Any:
            return CombinedLoader({"a": loader(30, False), "b": loader(24, False)}, mode)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append((float(batch["a"][0].sum()), float(batch["b"][0].sum())))
            self.log("val_loss", self.loss(batch["a"]) + self.loss(batch["b"]))

    fit_tiny(tmp_path / "plain", [], OfTwo(), val=[], num_sanity_val_steps=-1, limit_train_batches=1)
    whole = seen[:count]
    assert whole == seen[count : 2 * count]
    seen.clear()
    fit_tiny(tmp_path, [Search(Stages())], OfTwo(), val=[], num_sanity_val_steps=0)
    halves = seen[: 2 * count]  # there are less than eight
    sums = [(a + c, b + d) for (a, b), (c, d) in zip(halves[::2], halves[1::2], strict=True)]
    assert sums == [pytest.approx(pair, abs=1e-4) for pair in whole]


def test_several_validation_loaders_of_which_one_is_empty(tmp_path: Path) -> None:
    class ByLoader(Tiny):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            self.log("val_loss", self.loss(batch), add_dataloader_idx=False)

    search = Search(Stages())
    fit_tiny(tmp_path, [search], ByLoader(), val=[loader(12, False), DataLoader(TensorDataset(torch.zeros(0, 8)))])
    assert all(answer.evaluations for answer in _answers(search))


def test_module_that_validates_whole_batches_only(tmp_path: Path) -> None:
    search = Search(Stages())
    fit_tiny(tmp_path, [search], WholeBatches(), num_sanity_val_steps=0)
    assert [len(answer.evaluations[0].losses) for answer in _answers(search)] == [2, 2]


def test_error_of_whole_batches_is_that_of_the_module(tmp_path: Path) -> None:
    class Broken(Tiny):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fit_tiny(tmp_path, [Search(Stages())], Broken(), num_sanity_val_steps=0)


class OwnLoaders(Tiny):
    """Splits its validation data by chance, and remembers them."""

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        if not hasattr(self, "val_data"):
            self.val_data = random_split(NoisyData(24, jitter=False), [12, 12])[0]
        return DataLoader(self.val_data, batch_size=6)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert len(self.val_data) == 12
        assert self.trainer.num_val_batches == [2]
        super().validation_step(batch, batch_idx)


class OwnData(LightningDataModule):
    train_dataloader, val_dataloader = OwnLoaders.train_dataloader, OwnLoaders.val_dataloader


@pytest.mark.parametrize("held_by", ["module", "datamodule"])
def test_validation_data_that_lightning_sets_up_after_the_search(held_by: str, tmp_path: Path) -> None:
    """``val_dataloader()`` draws: it must draw as if the search had not called it."""

    sources: list[Any] = []

    def make() -> dict[str, Any]:
        sources.append(OwnLoaders() if held_by == "module" else OwnData())
        return {"model" if held_by == "module" else "datamodule": sources[-1]}

    late = {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0, "max_steps": 12}
    search = _fit_and_replay(tmp_path, make, **late)
    assert all(answer.evaluations for stage in (0, 1) for answer in _answers(search, stage))
    assert list(sources[0].val_data.indices) == list(sources[1].val_data.indices)


class NoLength:
    """A batch sampler of which nobody knows the length."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from torch.randperm(24).view(4, 6).tolist()


class Knowing(Sampler):
    """Its order depends on the module or datamodule that it knows: how far the Trainer is."""

    def __init__(self, owner: Any, method: bool = False) -> None:
        self.owner = owner.epoch if method else owner

    def __iter__(self) -> Iterator[int]:
        owner = getattr(self.owner, "__self__", self.owner)
        return iter([(5 * i + owner.trainer.current_epoch) % 24 for i in range(24)])

    def __len__(self) -> int:
        return 24


class Curriculum(Tiny):
    def epoch(self) -> int:
        return self.current_epoch


class Endless(Sampler):
    """Holds the generator object that it reads from."""

    def __init__(self) -> None:
        self.stream = (i % 24 for i in range(10**6))

    def __iter__(self) -> Iterator[int]:
        return (next(self.stream) for _ in range(24))

    def __len__(self) -> int:
        return 24


def test_batch_sampler_without_length(tmp_path: Path) -> None:
    data = NoisyData(24, jitter=False)
    _fit_and_replay(tmp_path, lambda: {"train_dataloaders": DataLoader(data, batch_sampler=NoLength())})


@pytest.mark.parametrize("method", [False, True])
def test_sampler_that_knows_the_module(method: bool, tmp_path: Path) -> None:
    def make() -> dict[str, Any]:
        module = Curriculum()
        data = NoisyData(24, jitter=False)
        return {"model": module, "train_dataloaders": DataLoader(data, batch_size=6, sampler=Knowing(module, method))}

    _fit_and_replay(tmp_path, make)


def test_sampler_that_cannot_be_copied(tmp_path: Path) -> None:
    train = DataLoader(NoisyData(24, jitter=False), batch_size=6, sampler=Endless())
    with pytest.raises(ValueError, match=r"got BatchSampler and Endless: .*generator.* `probe_dataloader="):
        fit_tiny(tmp_path, [Search(Stages())], train=train)


class Differentiating(Tiny):
    """Needs the gradient by its input, and writes into it where the loader's graph lets it."""

    def loss(self, batch: Any) -> Tensor:
        x = batch[0]
        if not self.training:
            return super().loss(batch)
        if not x.is_leaf:
            x.mul_(0.5)
        gradient = torch.autograd.grad(self.layer(x).square().sum(), x, create_graph=True)[0]
        return super().loss(batch) + gradient.square().mean()


class WithGraph(NoisyData):
    def __init__(self, size: int) -> None:
        super().__init__(size, jitter=False)
        self.x.requires_grad_()

    def __getitem__(self, index: int) -> Any:
        return self.x[index] ** 2, self.y[index]


def _leaves(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return x.requires_grad_(), y


@pytest.mark.parametrize("kind", ["graph", "leaf"])
def test_batches_to_differentiate_by(kind: str, tmp_path: Path) -> None:
    def make() -> dict[str, Any]:
        data: Any = WithGraph(24) if kind == "graph" else NoisyData(24, jitter=False)
        collate = None if kind == "graph" else _leaves
        return {"model": Differentiating(), "train_dataloaders": DataLoader(data, batch_size=6, collate_fn=collate)}

    search = _fit_and_replay(tmp_path, make)
    assert all(len(answer.losses) == 2 for answer in _answers(search))


def test_own_batch_of_tensors_that_require_gradients() -> None:
    leaf = torch.ones(2, requires_grad=True)
    batch = [leaf, leaf * 2, leaf.detach()]
    copied = own_batch(batch)
    assert [x.requires_grad for x in copied] == [True, True, False]
    assert [x.is_leaf for x in copied] == [True, False, True]
    sum(x.sum() for x in copied).backward()
    assert leaf.grad is None
    assert torch.equal(copied[0].grad, torch.ones(2))


class Named(Tensor):
    """A tensor with an attribute."""


def test_own_batch_keeps_what_tensors_say_about_themselves() -> None:
    x, named = torch.ones(2), torch.ones(2).as_subclass(Named)
    x.lengths, named.label = torch.ones(1), "a"
    copied = own_batch({"x": x, "named": named})
    x.lengths.zero_()
    assert copied["x"].lengths.tolist() == [1]
    assert copied["x"] is not x
    assert type(copied["named"]) is Named
    assert copied["named"].label == "a"


@pytest.mark.parametrize("kind", ["coo", "csr", "jagged", "nested", "attribute", "subclass"])
def test_batches_that_cannot_be_sliced_stay_whole(kind: str) -> None:
    x = torch.ones(6, 8)
    x = {
        "coo": x.to_sparse,
        "csr": x.to_sparse_csr,
        "jagged": lambda: torch.nested.nested_tensor(list(x), layout=torch.jagged),
        "nested": lambda: torch.nested.nested_tensor(list(x)),
        "attribute": x.clone,
        "subclass": lambda: x.as_subclass(Named),
    }[kind]()
    if kind == "attribute":
        x.lengths = torch.ones(6)
    batch = (x, torch.zeros(6))
    assert [part is batch for part in split(batch, 3)] == [True]
    assert in_parts([(batch, 0, 0)])[0][0] is batch
    assert own_batch(batch)[0] is not x


def test_parts_of_batches_require_gradients_as_the_batches_do() -> None:
    parts = split((torch.ones(6, 8, requires_grad=True), torch.zeros(6)), 3)
    assert [[t.requires_grad for t in part] for part in parts] == [[True, False]] * 3
    assert all(t.is_leaf for part in parts for t in part)


@pytest.mark.parametrize("accumulate", [1, 3, 4, 10])
def test_gradients_of_private_steps_have_the_scale_of_real_ones(accumulate: int, tmp_path: Path) -> None:
    """Also where a step has fewer batches than it accumulates, since the epoch ends: the loop divides by them all."""
    norms: list[float] = []

    class Same(Tiny):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            assert self.layer.weight.grad is not None
            norms.append(float(self.layer.weight.grad.norm()))

    data = NoisyData(6, jitter=False)
    rows = TensorDataset(data.x.repeat(4, 1), data.y.repeat(4))  # four times the same batch
    search = Search(Stages(lrs=(1e-8,), num_stages=1))
    fit_tiny(tmp_path, [search], Same(), DataLoader(rows, 6), accumulate_grad_batches=accumulate, max_steps=3)
    assert len(norms) == 2 + 3
    assert norms[0] == pytest.approx(norms[2], rel=1e-4)
