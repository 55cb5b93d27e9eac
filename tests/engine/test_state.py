"""Fork and restore: whatever a training state is made of, and whatever is done to it, it comes back bit for bit."""

from __future__ import annotations

import math
import random
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor, nn

from lightning_autolr.engine import line, ranks
from lightning_autolr.engine import state as state_module
from lightning_autolr.engine.compat import float_of_sums
from lightning_autolr.engine.files import DiskStore, MemoryStore, make_store, same_bits
from lightning_autolr.engine.randomness import RandomState
from lightning_autolr.engine.state import Fork, take_gradients


@dataclass
class Note:
    """A user's record."""

    count: int = 0
    items: list[Any] = field(default_factory=list)


def tensors() -> st.SearchStrategy[Tensor]:
    def make(shape: list[int], kind: str, seed: int) -> Tensor:
        t = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return {
            "float": lambda: t, "double": t.double, "bfloat16": t.bfloat16, "int": lambda: (10 * t).long(),
            "bool": lambda: t > 0,
            "transposed": lambda: torch.randn([*shape, 2]).transpose(0, -1), "expanded": lambda: t[..., None].expand(*shape, 3),
            "parameter": lambda: nn.Parameter(t), "nan": lambda: t * float("nan"),
        }[kind]()  # fmt: skip

    kinds = ["float", "double", "bfloat16", "int", "bool", "transposed", "expanded", "parameter", "nan"]
    return st.builds(make, st.lists(st.integers(0, 3), max_size=2), st.sampled_from(kinds), st.integers(0, 9))


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3), tensors(),
    st.builds(lambda n: np.arange(n, dtype=float), st.integers(0, 3)),
    st.builds(lambda s: torch.Generator().manual_seed(s), st.integers(0, 5)),
    st.builds(np.random.default_rng, st.integers(0, 5)), st.builds(random.Random, st.integers(0, 5)),
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple), st.lists(inner, max_size=3).map(deque),
        st.lists(inner, max_size=2).map(lambda items: Note(len(items), items)),
        st.lists(inner, max_size=2).map(lambda items: SimpleNamespace(items=items)),
        st.lists(inner, max_size=2).map(lambda items: OrderedDict(enumerate(items))),
        st.sets(st.integers(), max_size=3),
    ),
    max_leaves=8,
)  # fmt: skip


def module_of(tree: Any, optimizer: str = "adam") -> tuple[nn.Module, Any]:
    """A small network with buffers and the tree as an attribute, and its optimizer after a step."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    module.register_buffer("hidden", torch.ones(2), persistent=False)
    module.register_buffer("missing", None)
    module.tree = tree
    kinds = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
        "adam": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1)),
    }
    opt = kinds[optimizer](module.parameters())
    return module, opt


def train(module: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    nn.Sequential.forward(module, torch.randn(4, 2)).square().mean().backward()
    optimizer.step()


def portrait(obj: Any, seen: dict[int, int] | None = None) -> Any:
    """Contents and identities of everything reachable, comparable by ``==``; made independently of the fork's walk."""
    seen = {} if seen is None else seen
    if obj is None or isinstance(obj, (bool, int, float, complex, str, bytes, type, torch.dtype, torch.device)):
        return repr(obj)
    if id(obj) in seen:
        return ("again", seen[id(obj)])
    seen[id(obj)] = len(seen)
    own: Any
    if isinstance(obj, Tensor):
        flat = obj.detach().cpu().contiguous()
        own = (
            str(obj.dtype),
            tuple(obj.shape),
            obj.stride(),
            obj.requires_grad,
            flat.reshape(-1).view(torch.uint8).tolist() if flat.numel() else [],
        )
    elif isinstance(obj, np.ndarray):
        own = obj.tobytes()
    elif isinstance(obj, torch.Generator):
        own = tuple(obj.get_state().tolist())
    elif isinstance(obj, np.random.Generator):
        own = repr(obj.bit_generator.state)
    elif isinstance(obj, random.Random):
        own = obj.getstate()
    elif isinstance(obj, dict):
        own = [(portrait(k, seen), portrait(v, seen)) for k, v in obj.items()]
    elif isinstance(obj, set):
        own = sorted(map(repr, obj))
    elif isinstance(obj, (list, tuple, deque)):
        own = [portrait(item, seen) for item in obj]
    elif (hasattr(obj, "__dict__") and not callable(obj)) or isinstance(obj, nn.Module):
        own = portrait(vars(obj), seen)
    else:
        own = None
    return (type(obj).__name__, id(obj), own)


def whole(module: nn.Module, optimizer: Any) -> list[Any]:
    seen: dict[int, int] = {}
    return [portrait(part, seen) for part in (module, optimizer.state, optimizer.param_groups)]


def spoil(obj: Any, chance: random.Random, depth: int = 0) -> None:
    """Change things at random: in place, replaced, added, deleted."""
    if depth > 6:
        return
    if isinstance(obj, Tensor):
        with torch.no_grad():
            if obj.numel() and not any(s == 0 for s in obj.stride()):
                obj.copy_(torch.ones_like(obj)) if obj.dtype != torch.bool else obj.logical_not_()
            if obj.is_leaf and obj.is_floating_point() and chance.random() < 0.3:
                obj.requires_grad_(not obj.requires_grad)
    elif isinstance(obj, np.ndarray):
        obj += 1
    elif isinstance(obj, torch.Generator):
        torch.rand(1, generator=obj)
    elif isinstance(obj, (np.random.Generator, random.Random)):
        obj.random()
    elif isinstance(obj, dict):
        for value in list(obj.values()):
            spoil(value, chance, depth + 1)
        for key in list(obj):
            action = chance.choice(["keep", "delete", "replace"])
            if action == "delete":
                del obj[key]
            elif action == "replace":
                obj[key] = torch.zeros(3)
        obj["added"] = [1]
    elif isinstance(obj, (list, deque)):
        for value in obj:
            spoil(value, chance, depth + 1)
        chance.choice([obj.clear, lambda: obj.append(7), obj.reverse])()
    elif isinstance(obj, set):
        obj.add("new")
    elif isinstance(obj, tuple):
        for value in obj:
            spoil(value, chance, depth + 1)
    elif isinstance(obj, (Note, SimpleNamespace)):
        spoil(vars(obj), chance, depth + 1)


SETTINGS = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
STORES = {
    "device": lambda: MemoryStore(),
    "cpu": lambda: MemoryStore(on_cpu=True),
    "disk": lambda: DiskStore(TorchCheckpointIO()),
}


@pytest.mark.parametrize("place", STORES)
@given(tree=trees, seed=st.integers(0, 1000), stepped=st.booleans(), optimizer=st.sampled_from(["sgd", "adam"]))
@SETTINGS
def test_whatever_is_done_is_undone(place: str, tree: Any, seed: int, stepped: bool, optimizer: str) -> None:
    module, opt = module_of(tree, optimizer)
    chance = random.Random(seed)
    if stepped:
        train(module, opt)
    opt.zero_grad()
    fork = Fork([module, opt], STORES[place]())
    fork.capture()
    before = whole(module, opt)
    for _ in range(2):  # a restored state can be restored again
        train(module, opt)
        module.eval()
        module.register_buffer("late", torch.ones(1))
        module.hidden = torch.zeros(5)
        module.missing = torch.ones(1)
        opt.param_groups[0]["betas"] = (0.1, 0.2)
        spoil(module.tree, chance)
        module.tree = None if chance.random() < 0.5 else module.tree
        fork.restore()
        opt.zero_grad()
        assert whole(module, opt) == before
    fork.release()


@pytest.mark.parametrize("place", STORES)
def test_snapshots_are_independent(place: str) -> None:
    """Any of several kept states can be gone back to, in any order."""
    module, opt = module_of([0])
    forks, portraits = [], []
    for number in range(3):
        train(module, opt)
        module.tree.append(number)
        opt.zero_grad()
        forks.append(Fork([module, opt], STORES[place]()))
        forks[-1].capture()
        portraits.append(whole(module, opt))
    for index in (1, 0, 2, 2, 0, 1):
        train(module, opt)
        opt.zero_grad()
        forks[index].restore()
        assert whole(module, opt) == portraits[index]
    for fork in forks:
        fork.release()


def test_buffers_are_used_again() -> None:
    module, opt = module_of(None)
    train(module, opt)
    store = MemoryStore()
    fork = Fork([module, opt], store)
    fork.capture()
    held = [b.data_ptr() for b in store._buffers]
    train(module, opt)
    fork.capture()
    assert [b.data_ptr() for b in store._buffers] == held
    assert fork.num_bytes == sum(b.numel() * b.element_size() for b in store._buffers)


def test_absent_state_is_absent_again() -> None:
    """Zero-filled momentum is not the same as none: with dampening the first step differs."""
    module, opt = module_of(None, "sgd")
    fork = Fork([module, opt], MemoryStore())
    fork.capture()
    train(module, opt)
    assert len(opt.state) > 0
    fork.restore()
    assert len(opt.state) == 0


def test_aliases_survive() -> None:
    module, opt = module_of(None)
    shared = torch.ones(2)
    module.one, module.other = shared, [shared]
    fork = Fork([module, opt], MemoryStore())
    fork.capture()
    module.one = torch.zeros(2)
    shared.fill_(5)
    module.other[0] = torch.zeros(2)
    fork.restore()
    assert module.one is shared
    assert module.other[0] is shared
    assert shared.tolist() == [1, 1]


def test_tensors_that_changed_their_shape() -> None:
    module, opt = module_of(None)
    fork = Fork([module, opt], MemoryStore())
    fork.capture()
    weight = module[0].weight
    before = weight.detach().clone()
    weight.data = torch.zeros(7)
    module.hidden.resize_(4)
    fork.restore()
    assert module[0].weight is weight
    assert torch.equal(weight, before)
    assert module.hidden.tolist() == [1, 1]


class _Opaque:
    """Nothing that a walk knows."""

    def __init__(self) -> None:
        self.value = 1


class HandsOver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.opaque = _Opaque()

    def autolr_state_dict(self) -> dict[str, Any]:
        return {"value": [self.opaque.value]}

    def autolr_load_state_dict(self, state: dict[str, Any]) -> None:
        self.opaque.value = state["value"].pop()


def test_module_hands_over_what_no_walk_can_see() -> None:
    module = HandsOver()
    fork = Fork([module], MemoryStore())
    fork.capture()
    for value in (2, 3):
        module.opaque.value = value
        fork.restore()
        assert module.opaque.value == 1


def test_cycles_and_the_owner_are_no_problem() -> None:
    module, _ = module_of({})
    module.tree["self"] = module.tree
    module._trainer = _Opaque()
    module.tree["n"] = 1
    fork = Fork([module], MemoryStore())
    fork.capture()
    module.tree.clear()
    owner = module._trainer = _Opaque()
    fork.restore()
    assert module.tree["self"] is module.tree
    assert module.tree["n"] == 1
    assert module._trainer is owner


def test_fingerprint_is_of_the_weights() -> None:
    module, opt = module_of(None)
    fork = Fork([module, opt], MemoryStore())
    fork.capture()
    first = fork.fingerprint()
    module.tree = 3
    fork.capture()
    assert fork.fingerprint() == first
    train(module, opt)
    fork.capture()
    assert fork.fingerprint() != first


def test_random_state_survives_a_checkpoint(tmp_path: Any) -> None:
    device = torch.device("cpu")
    np.random.standard_normal()  # the second of a pair waits
    torch.save(RandomState(device).state_dict(), tmp_path / "rng")
    expected = (random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist())
    RandomState.seed(5, device)
    RandomState.from_state_dict(torch.load(tmp_path / "rng", weights_only=True), device).restore()
    assert (random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()) == expected


def test_gradients_are_taken_and_views_copied() -> None:
    whole = torch.arange(4.0)
    one, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    one.grad, other.grad = whole[:2], torch.ones(2)
    held = other.grad
    taken = dict(take_gradients([one, other]))
    assert one.grad is None
    assert other.grad is None
    whole.zero_()
    assert taken[one].tolist() == [0, 1]
    assert taken[other] is held


def test_disk_leaves_nothing_behind(tmp_path: Any) -> None:
    store = DiskStore(TorchCheckpointIO(), str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    tensor = torch.ones(2)
    store.save([tensor])
    tensor.zero_()
    store.load([tensor])
    assert tensor.tolist() == [1, 1]
    store.clear()
    assert list(tmp_path.iterdir()) == []
    assert isinstance(make_store("disk", TorchCheckpointIO()), DiskStore)


def test_what_mps_lacks_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no float64, and its functions for random states take no device. There is none here to try it on."""
    assert float_of_sums(torch.device("cpu")) is torch.float64
    assert float_of_sums(torch.device("mps")) is torch.float32
    states = [torch.tensor([1])]
    fake = SimpleNamespace(get_rng_state=lambda: states[-1], set_rng_state=states.append)
    monkeypatch.setattr(torch, "mps", fake)
    RandomState(torch.device("mps")).restore()
    assert states == [torch.tensor([1])] * 2


@pytest.mark.parametrize("name", ["losses", "fingerprint", "squares"])
def test_sums_are_made_in_what_the_device_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def float_of(device: torch.device) -> torch.dtype:
        asked.append(device)
        return torch.float32

    module = {"losses": ranks, "fingerprint": state_module, "squares": line}[name]
    monkeypatch.setattr(module, "float_of_sums", float_of)
    layer = nn.Linear(3, 2)
    if name == "losses":
        strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda t, reduce_op: t)
        assert ranks.mean_over_ranks(strategy, [torch.tensor(0.5)]) == [0.5]
    elif name == "fingerprint":
        fork = Fork([layer], MemoryStore())
        fork.capture()
        assert fork.fingerprint()
    else:
        assert line._squares([torch.ones(3)]) == 3.0
    assert asked


class Average:
    """A moving average of weights, as a user writes one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.shadow = [p.detach().clone() for p in module.parameters()]
        self.num_updates = 0


class Slotted:
    __slots__ = ("count", "items", "late")

    def __init__(self) -> None:
        self.count, self.items = 0, [0]


@dataclass(slots=True)
class SlottedNote(Note):
    extra: Any = None


@pytest.mark.parametrize("kind", [Slotted, SlottedNote, lambda: SlottedNote(extra=Slotted())])
def test_objects_of_the_users_classes_are_put_back(kind: Any) -> None:
    module, opt = module_of(None)
    module.average, module.held = Average(module), {"one": (kind(),)}
    average, held = module.average, module.held["one"][0]
    shadow, items = average.shadow, held.items
    first = [t.clone() for t in shadow]
    fork = Fork([module, opt], MemoryStore())
    fork.capture()
    for _ in range(2):
        for tensor in shadow:
            tensor.fill_(float("nan"))
        average.shadow, average.num_updates, average.new = [], 3, 1
        held.count += 1
        items.append(7)
        held.items = None
        if kind is Slotted:
            held.late = 1
        fork.restore()
        assert module.average is average
        assert average.shadow is shadow
        assert all(torch.equal(a, b) for a, b in zip(shadow, first, strict=True))
        assert vars(average).keys() == {"module", "shadow", "num_updates"}
        assert average.num_updates == 0
        assert (held.count, held.items) == (0, items)
        assert len(items) == (kind is Slotted)
        assert not hasattr(held, "late")


class _Node:
    def __init__(self, after: _Node | None) -> None:
        self.after, self.count = after, 0


def test_long_chains_of_objects() -> None:
    module, _ = module_of(None)
    module.held = first = _Node(None)
    for _ in range(5000):
        module.held = _Node(module.held)
    fork = Fork([module], MemoryStore())
    fork.capture()
    first.count = 1
    fork.restore()
    assert first.count == 0


class _Cycle:
    """Knows where its iterator stands, which cannot be put back."""

    def __init__(self) -> None:
        self.iterator, self.position = iter(range(100)), 0


class _Client:
    """Sends from a thread of its own what it was given."""

    def __init__(self) -> None:
        self.lock, self.sent = threading.Lock(), 0


class _Points(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.reads = 0


@pytest.mark.parametrize(("kind", "name"), [(_Cycle, "position"), (_Client, "sent"), (_Points, "reads")])
def test_objects_that_cannot_be_put_back_are_left_alone(kind: Any, name: str) -> None:
    module, _ = module_of(None)
    module.held = kind()
    fork = Fork([module], MemoryStore())
    fork.capture()
    setattr(module.held, name, 5)
    fork.restore()
    assert getattr(module.held, name) == 5


def test_arrays_that_nobody_writes_into_are_not_copied(tmp_path: Path) -> None:
    module, _ = module_of(None)
    np.arange(8.0).tofile(tmp_path / "data.bin")
    module.held = {"file": np.memmap(tmp_path / "data.bin"), "constant": np.frombuffer(bytes(8))}
    fork = Fork([module], MemoryStore())
    fork.capture()
    module.held["file"][0] = 1
    fork.restore()
    assert module.held["file"][0] == 1


def test_same_bits() -> None:
    a = torch.tensor([1.0, math.nan, 0.0])
    assert same_bits(a, a.clone())
    assert not same_bits(a, torch.tensor([1.0, math.nan, -0.0]))
    for dtype in (torch.bool, torch.int64, torch.bfloat16, torch.complex64, torch.complex128):
        one, other = torch.zeros(3, 2, dtype=dtype).t(), torch.ones(3, 2, dtype=dtype).t()
        assert same_bits(one, one.clone())
        assert not same_bits(one, other)


LAZY = {
    "conjugate": lambda: torch.ones(4, 2, dtype=torch.complex64).mul_(1 + 2j).conj(),
    "wide conjugate": lambda: torch.ones(4, 2, dtype=torch.complex128).mul_(1 + 2j).conj(),
    "negative": lambda: torch.ones(4, 2, dtype=torch.complex64).mul_(1 + 2j).conj().imag,
}


@pytest.mark.parametrize("name", LAZY)
def test_same_bits_of_views_that_are_computed_when_they_are_read(name: str) -> None:
    """What counts is what a reader gets, not what lies in memory."""
    view = LAZY[name]()
    assert same_bits(view, view.clone())
    assert not same_bits(view, -view)
    assert same_bits(view[:, :1].expand(-1, 3), view[:, :1].expand(-1, 3).clone())


@pytest.mark.parametrize("place", STORES)
@pytest.mark.parametrize("name", LAZY)
def test_buffers_that_are_views_of_that_kind(name: str, place: str) -> None:
    module = nn.Module()
    module.register_buffer("view", LAZY[name]())
    before = module.view.clone()
    fork = Fork([module], STORES[place]())
    fork.capture()
    module.view.zero_()
    fork.restore()
    fork.release()
    assert torch.equal(module.view, before)
