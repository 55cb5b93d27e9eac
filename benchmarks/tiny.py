"""Which search rule finds learning rates that are best for the *whole* run? Many seeds of tiny nets, trained as one batch.

Every parameter carries a leading axis of rows (seeds), so one optimizer step trains all seeds of a task at once and a rule
gets its statistics in seconds. A rule is what it is in the product: a generator of :class:`Probe` and :class:`Train`
requests, one per seed. All methods are compared at **equal total optimizer steps, search and undone steps included**, on a
test split that no rule sees; fixed schedules have their peak tuned by an oracle (on the validation split, not counted).
"""

from __future__ import annotations

import argparse
import functools
import gzip
import itertools
import json
import math
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_autolr.core.requests import (
    Answer,
    Evaluation,
    ProbeResult,
    Request,
    Requests,
    Run,
    Status,
    Train,
    TrainResult,
)
from lightning_autolr.schedules import Cosine, Linear, OneCycle, Rex, Schedule, Warmup, WarmupStableDecay
from lightning_autolr.search.autolrs import AutoLRS
from lightning_autolr.search.base import AbstractSearch
from lightning_autolr.search.range_test import RangeTest
from lightning_autolr.search.ratchet import Guarded

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
EVAL_BATCHES = 10
REAL = 1 << 30  # the draw of the real run's batches


# --- data ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """A pool of examples. Every row splits it anew into training, validation and test examples of the given sizes.

    Args:
        x: inputs.
        y: targets.
        sizes: numbers of training, validation and test examples.
        noise: share of the training examples with a random label.
    """

    x: Tensor
    y: Tensor
    sizes: tuple[int, int, int]
    noise: float = 0.0
    _splits: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @functools.cached_property
    def y_train(self) -> Tensor:
        rng = torch.Generator().manual_seed(1)
        random = torch.randint(10, self.y.shape, generator=rng)
        return torch.where(torch.rand(self.y.shape, generator=rng) < self.noise, random, self.y)

    def split(self, row: int) -> dict[str, Tensor]:
        if row not in self._splits:
            order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(100 + row))
            parts = torch.split(order[: sum(self.sizes)], list(self.sizes))
            self._splits[row] = dict(zip(("train", "validation", "test"), parts, strict=True))
        return self._splits[row]


@functools.cache
def digits() -> Data:
    """1,000 training images of scikit-learn's digits, 10 % of the labels random: a task that overfits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = (torch.tensor(images, dtype=torch.float32) / 16 - 0.3) / 0.38
    return Data(x, torch.tensor(labels), (1000, 390, 400), noise=0.1)


@functools.cache
def fashion_mnist() -> Data:
    """6,000 training images of Fashion-MNIST, every second pixel."""

    def read(name: str, offset: int) -> Tensor:
        with gzip.open(FASHION_MNIST / f"train-{name}-ubyte.gz") as file:
            return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=offset).copy())

    x = read("images-idx3", 16).view(-1, 28, 28)[:, ::2, ::2].flatten(1) / 255.0
    return Data(((x - 0.286) / 0.353)[:12000], read("labels-idx1", 8).long()[:12000], (6000, 640, 1500))


@functools.cache
def english(length: int = 24) -> Data:
    """Windows of the Pentateuch as characters; the target is the next character at every position."""
    text = subprocess.run(
        ["bible", "-l79", "gen1:1-deu34:12"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    )
    symbols = sorted(set(text.stdout))
    codes = torch.tensor([symbols.index(c) for c in text.stdout])
    windows = codes[: len(codes) // (length + 1) * (length + 1)].view(-1, length + 1)
    return Data(windows[:, :-1], windows[:, 1:], (len(windows) - 900, 200, 700))


# --- models: functions of parameters with a leading axis of rows ----------------------------------------------------------

Parameters = list[Tensor]


def _uniform(rng: torch.Generator, rows: int, fan_in: int, *shape: int) -> Tensor:
    return (torch.rand(rows, *shape, generator=rng) * 2 - 1) * math.sqrt(3 / fan_in)


@dataclass(frozen=True)
class MLP:
    """Three layers; with ``norm`` a batch norm after each hidden one."""

    width: int = 64
    norm: bool = False

    def init(self, data: Data, rows: int, rng: torch.Generator) -> Parameters:
        sizes = (data.x.shape[1], self.width, self.width, 10)
        parameters = []
        for a, b in itertools.pairwise(sizes):
            parameters += [_uniform(rng, rows, a, a, b) * math.sqrt(2), torch.zeros(rows, 1, b)]
        return parameters + ([torch.ones(rows, 1, self.width) for _ in range(2)] if self.norm else [])

    def losses(self, p: Parameters, x: Tensor, y: Tensor) -> Tensor:
        for layer in range(2):
            x = torch.bmm(x, p[2 * layer])
            if self.norm:
                x = (x - x.mean(1, True)) * torch.rsqrt(x.var(1, unbiased=False, keepdim=True) + 1e-5) * p[6 + layer]
            x = torch.relu(x + p[2 * layer + 1])
        return _cross_entropy(torch.baddbmm(p[5], x, p[4]), y)


@dataclass(frozen=True)
class CNN:
    """Two 3x3 convolutions with batch norm, ReLU and pooling, then a linear layer. Evaluated with batch statistics."""

    widths: tuple[int, int] = (8, 16)

    def init(self, data: Data, rows: int, rng: torch.Generator) -> Parameters:
        a, b = self.widths
        kernels = [
            _uniform(rng, rows, 9, a, 1, 3, 3) * math.sqrt(2),
            _uniform(rng, rows, 9 * a, b, a, 3, 3) * math.sqrt(2),
        ]
        norms = [t for n in (a, b) for t in (torch.ones(rows, n), torch.zeros(rows, n))]
        return kernels + norms + [_uniform(rng, rows, 9 * b, 9 * b, 10), torch.zeros(rows, 1, 10)]

    def losses(self, p: Parameters, x: Tensor, y: Tensor) -> Tensor:
        rows, batch = x.shape[:2]
        x = x.view(rows, batch, 1, 14, 14).transpose(0, 1).reshape(batch, rows, 14, 14)
        for layer in range(2):
            x = F.conv2d(x, p[layer].flatten(0, 1), padding=1, groups=rows)
            x = F.batch_norm(x, None, None, p[2 + 2 * layer].flatten(), p[3 + 2 * layer].flatten(), training=True)
            x = F.max_pool2d(torch.relu(x), 2)
        x = x.view(batch, rows, -1).transpose(0, 1)
        return _cross_entropy(torch.baddbmm(p[-1], x, p[-2]), y)


@dataclass(frozen=True)
class Transformer:
    """One pre-norm block, causal, over characters."""

    width: int = 32
    heads: int = 2

    def init(self, data: Data, rows: int, rng: torch.Generator) -> Parameters:
        d, length, symbols = self.width, data.x.shape[1], int(data.x.max()) + 1

        def normal(*shape: int, std: float = 0.02) -> Tensor:
            return torch.randn(rows, *shape, generator=rng) * std

        one = [torch.ones(rows, 1, d) for _ in range(3)]
        std = d**-0.5
        return [
            normal(symbols, d, std=0.5), normal(length, d, std=0.1), normal(d, 3 * d, std=std), normal(d, d, std=std),
            normal(d, 4 * d, std=std), normal(4 * d, d, std=std / 2), normal(d, symbols), *one,
        ]  # fmt: skip

    def losses(self, p: Parameters, x: Tensor, y: Tensor) -> Tensor:
        rows, batch, length = x.shape
        d, h = self.width, self.heads
        offset = torch.arange(rows).view(-1, 1, 1) * p[0].shape[1]
        z = F.embedding(x + offset, p[0].flatten(0, 1)) + p[1][:, None]
        z = z.view(rows, batch * length, d)
        qkv = torch.bmm(_layer_norm(z, p[7]), p[2]).view(rows * batch, length, 3, h, d // h).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        z = z + torch.bmm(a.transpose(1, 2).reshape(rows, batch * length, d), p[3])
        z = z + torch.bmm(F.gelu(torch.bmm(_layer_norm(z, p[8]), p[4])), p[5])
        logits = torch.bmm(_layer_norm(z, p[9]), p[6]).view(rows, batch, length, -1)
        return _cross_entropy(logits, y).mean(-1)


def _layer_norm(x: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * scale


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)


# --- training rows -----------------------------------------------------------------------------------------------------


@dataclass
class State:
    """Parameters and optimizer state of some rows; every tensor has rows first."""

    tensors: list[Tensor]

    def __getitem__(self, rows: Sequence[int]) -> State:
        return State([t[list(rows)] for t in self.tensors])

    def put(self, rows: Sequence[int], other: State) -> None:
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine[list(rows)] = theirs

    @staticmethod
    def stack(states: Sequence[State]) -> State:
        return State([torch.cat(ts) for ts in zip(*(s.tensors for s in states), strict=True)])


@dataclass(frozen=True)
class Task:
    """A model, data and an optimizer; the oracle's grid of peaks starts at ``lowest``."""

    name: str
    model: Any
    data: Callable[[], Data]
    optimizer: str
    total: int
    lowest: float
    rows: int = 12
    batch_size: int = 32
    start_lr: float = 1e-3
    _batches: dict[tuple[int, int], Tensor] = field(default_factory=dict, hash=False, compare=False)

    def init(self) -> State:
        p = self.model.init(self.data(), self.rows, torch.Generator().manual_seed(5))
        zeros = [torch.zeros_like(t) for t in p]
        return State([*p, *zeros, *(t.clone() for t in zeros), torch.zeros(self.rows)])

    def batches(self, seed: int, draw: int, start: int, stop: int) -> Tensor:
        """Indices of the training examples of steps ``start ... stop - 1``, shape (steps, batch size)."""
        known = self._batches.get((seed, draw))
        if known is None or len(known) < stop:
            rng, train = np.random.default_rng((seed, draw)), self.data().split(seed)["train"]
            n = len(train)
            epochs = max(stop, 64 if draw != REAL else self.total) * self.batch_size // n + 1
            known = train[torch.from_numpy(np.concatenate([rng.permutation(n) for _ in range(epochs)]))]
            known = known[: len(known) // self.batch_size * self.batch_size].view(-1, self.batch_size)
            self._batches[seed, draw] = known
        return known[start:stop]

    def train(self, state: State, indices: Tensor, lrs: Tensor) -> Tensor:
        """Steps for all rows. ``indices``: (rows, steps, batch size); ``lrs``: (rows, steps). Returns (rows, steps) losses."""
        n = (len(state.tensors) - 1) // 3
        p, m, v, t = state.tensors[:n], state.tensors[n : 2 * n], state.tensors[2 * n : 3 * n], state.tensors[-1]
        x, y = self.data().x, self.data().y_train
        losses = []
        for step in range(indices.shape[1]):
            batch = indices[:, step]
            for a in p:
                a.requires_grad_(True)
            loss = self.model.losses(p, x[batch], y[batch]).mean(1)
            grads = torch.autograd.grad(loss.sum(), p)
            losses.append(loss.detach())
            t += 1
            with torch.no_grad():
                for i, (a, g) in enumerate(zip(p, grads, strict=True)):
                    a.requires_grad_(False)
                    rate = lrs[:, step].view(-1, *(1,) * (a.ndim - 1))
                    if self.optimizer == "sgd":
                        m[i].mul_(0.9).add_(g.add_(a, alpha=5e-4))
                        a.sub_(rate * m[i])
                    else:
                        time_ = t.view(rate.shape)
                        m[i].lerp_(g, 0.1)
                        v[i].mul_(0.999).addcmul_(g, g, value=0.001)
                        a.mul_(1 - rate * 0.01).sub_(
                            rate / (1 - 0.9**time_) * m[i] / ((v[i] / (1 - 0.999**time_)).sqrt_().add_(1e-8))
                        )
        return torch.stack(losses, 1)

    @torch.no_grad()
    def evaluate(
        self, state: State, rows: Sequence[int], split: str = "validation", batches: int = EVAL_BATCHES
    ) -> Tensor:
        """Mean losses of the evaluation batches of these rows, shape (rows, batches)."""
        data = self.data()
        p = state.tensors[: (len(state.tensors) - 1) // 3]
        losses = []
        for r, seed in enumerate(rows):
            chosen = data.split(seed)[split]
            chosen = chosen[: len(chosen) // batches * batches]
            loss = self.model.losses([t[r : r + 1] for t in p], data.x[None, chosen], data.y[None, chosen])
            losses.append(loss.view(1, batches, -1).mean(-1))
        return torch.cat(losses).nan_to_num(nan=math.inf)


class NoisyQuadratic(Task):
    """Exact expected losses of SGD on a quadratic with noisy gradients (Zhang et al., 2019, arXiv 1907.04164, section 3).

    Row r has curvatures ``h_i = i^-a``, gradient noise ``c * h_i`` and its own a in [0.5, 1.5] and c; momentum 0.9. The state
    is the mean of x and of the velocity, and their covariance, per dimension; nothing is sampled, so losses are free of
    noise and the best learning rate of any horizon is a smooth function.
    """

    dimensions = 300

    def init(self) -> State:
        rng = torch.Generator().manual_seed(5)
        i = torch.arange(1, self.dimensions + 1, dtype=torch.float64)
        power = 0.5 + torch.rand(self.rows, 1, generator=rng, dtype=torch.float64)
        noise = 10 ** (torch.rand(self.rows, 1, generator=rng, dtype=torch.float64) * 2 - 2)
        h = i**-power
        zero = torch.zeros_like(h)
        return State([torch.ones_like(h), zero, zero.clone(), zero.clone(), zero.clone(), h, noise * h])

    def batches(self, seed: int, draw: int, start: int, stop: int) -> Tensor:
        return torch.zeros(stop - start, 1, dtype=torch.long)

    def train(self, state: State, indices: Tensor, lrs: Tensor) -> Tensor:
        x, u, xx, xu, uu, h, noise = state.tensors  # mean of x, velocity; (co)variances
        losses = []
        for step in range(indices.shape[1]):
            losses.append(self._loss(state))
            e = lrs[:, step : step + 1].double()
            # u' = 0.9 u + h x + noise; x' = x - e u'
            u_ = 0.9 * u + h * x
            uu_ = 0.81 * uu + 1.8 * h * xu + h * h * xx + noise
            xu_ = 0.9 * xu + h * xx  # covariance of the old x with the new u
            x, u = x - e * u_, u_
            xx, xu, uu = xx - 2 * e * xu_ + e * e * uu_, xu_ - e * uu_, uu_
            state.tensors[:5] = [x, u, xx, xu, uu]
        return torch.stack(losses, 1).float()

    def _loss(self, state: State) -> Tensor:
        x, _, xx, _, _, h, _ = state.tensors
        return (0.5 * h * (x * x + xx)).sum(1)

    def evaluate(
        self, state: State, rows: Sequence[int], split: str = "validation", batches: int = EVAL_BATCHES
    ) -> Tensor:
        return self._loss(state).nan_to_num(nan=math.inf)[:, None].expand(-1, batches).float()


# --- the driver: one generator per row ---------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a rule reached: test losses per row, steps by kind, and the learning rates of its real steps."""

    test: Tensor
    validation: Tensor
    search: list[int]
    real: list[int]
    traces: list[list[tuple[Request, Answer]]]


class Driver:
    """Answers the requests of one generator per row, equal ones as one batch.

    All networks here are fresh, so ``permuted`` would only draw their weights anew: it is left out.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.state = task, task.init()
        self.kept: list[dict[str, State]] = [{} for _ in range(task.rows)]
        self.search, self.real = [0] * task.rows, [0] * task.rows
        self.count = 0

    def run(self, rule: Callable[[Run], Requests], total: int) -> Outcome:
        run = Run(total_steps=total, lr=self.task.start_lr, count_search=True)
        generators = [rule(run) for _ in range(self.task.rows)]
        traces: list[list[tuple[Request, Answer]]] = [[] for _ in generators]
        pending: dict[int, Request] = {row: next(g) for row, g in enumerate(generators)}
        while pending:
            kind = min(_kind(r) for r in pending.values())
            rows = [row for row, r in pending.items() if _kind(r) == kind]
            requests = [pending.pop(row) for row in rows]
            answers = self._train(rows, requests) if kind[0] else self._probe(rows, requests)
            for row, request, answer in zip(rows, requests, answers, strict=True):
                traces[row].append((request, answer))
                try:
                    pending[row] = generators[row].send(answer)
                except StopIteration:
                    continue
        final = {s: self.task.evaluate(self.state, range(self.task.rows), s).mean(1) for s in ("test", "validation")}
        return Outcome(final["test"], final["validation"], self.search, self.real, traces)

    def _probe(self, rows: Sequence[int], requests: Sequence[Any]) -> list[Answer]:
        states = [self.kept[r][q.start] if q.start else self.state[[r]] for r, q in zip(rows, requests, strict=True)]
        state, n = State.stack(states), requests[0].num_steps
        starts = [(q.draw, q.offset) for q in requests]
        losses = self._steps(state, rows, starts, requests, n) if n else torch.zeros(len(rows), 0)
        kind = requests[0].evaluate
        evaluated = kind in ("validation", "holdout")
        values = self.task.evaluate(state, rows) if evaluated else torch.zeros(len(rows), 1)
        answers: list[Answer] = []
        for i, (row, request) in enumerate(zip(rows, requests, strict=True)):
            for name in request.release:
                self.kept[row].pop(name, None)
            made, status = _until_diverged(losses[i], request.stop_above)
            self.search[row] += made
            name = self._keep(row, state[[i]]) if request.keep_end else None
            own = tuple(losses[i, :made].tolist())
            evaluations = (Evaluation(made, tuple(values[i].tolist())),) if evaluated else ()
            if kind == "train":
                evaluations = (Evaluation.of_training(own),)
            answers.append(ProbeResult(own, evaluations, status, name))
        return answers

    def _train(self, rows: Sequence[int], requests: Sequence[Any]) -> list[Answer]:
        names = []
        for row, request in zip(rows, requests, strict=True):
            if request.start:
                self.state.put([row], self.kept[row][request.start])
            for name in request.release:
                self.kept[row].pop(name, None)
            names.append(self._keep(row, self.state[[row]]) if request.keep_start else None)
        state, n = self.state[rows], requests[0].num_steps
        losses = self._steps(state, rows, [(REAL, self.real[r]) for r in rows], requests, n)
        self.state.put(rows, state)
        answers: list[Answer] = []
        for i, row in enumerate(rows):
            made, status = _until_diverged(losses[i], requests[i].stop_above)
            self.real[row] += made
            answers.append(TrainResult(tuple(losses[i, :made].tolist()), status, names[i]))
        return answers

    def _steps(
        self, state: State, rows: Sequence[int], starts: Sequence[tuple[int, int]], requests: Sequence[Any], n: int
    ) -> Tensor:
        indices = torch.stack([self.task.batches(r, d, at, at + n) for r, (d, at) in zip(rows, starts, strict=True)])
        shapes = [q.shape if q.shape.is_resolved else q.shape.stretched(n) for q in requests]
        lrs = torch.tensor([[q.lr * f(i) for i in range(n)] for q, f in zip(requests, shapes, strict=True)])
        return self.task.train(state, indices, lrs)

    def _keep(self, row: int, state: State) -> str:
        self.count += 1
        self.kept[row][str(self.count)] = state
        return str(self.count)


def _kind(request: Any) -> tuple[bool, int, str]:
    """Requests of one kind are answered together; probes first."""
    is_train = isinstance(request, Train)
    return is_train, request.num_steps, "" if is_train else request.evaluate


def _until_diverged(losses: Tensor, limit: float | None) -> tuple[int, Status]:
    """Steps before the first loss that is not finite or above the limit. (The rows train on: such a state is not used.)"""
    bad = (~(losses <= (math.inf if limit is None else limit)) | losses.isinf()).nonzero()
    return (int(bad[0]), Status.DIVERGED) if len(bad) else (len(losses), Status.OK)


# --- fixed schedules ---------------------------------------------------------------------------------------------------


def fixed(task: Task, total: int, schedule: Schedule, grid: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Validation and test losses of every row and peak, shape (rows, peaks)."""
    found: list[list[Tensor]] = [[], []]
    for peak in grid:
        state = task.init()
        indices = torch.stack([task.batches(r, REAL, 0, total) for r in range(task.rows)])
        lrs = torch.tensor([[peak * schedule(i) for i in range(total)]], dtype=torch.float32).expand(task.rows, -1)
        task.train(state, indices, lrs)
        for values, split in zip(found, ("validation", "test"), strict=True):
            values.append(task.evaluate(state, range(task.rows), split).mean(1))
    return torch.stack(found[0], 1), torch.stack(found[1], 1)


# --- rules without tuning ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RangeThen(AbstractSearch):
    """A range test of 8 % of the steps (at most 100), then a fixed schedule over what is left."""

    schedule: Schedule

    def requests(self, run: Run) -> Requests:
        total = run.total_steps or 0
        steps = max(10, min(100, int(0.08 * total)))
        test = RangeTest(min_lr=1e-6, num_steps=steps, repeats=1, rule="edge")
        used, measure = 0, test.measure()
        answer: Any = None
        while True:
            try:
                request = measure.send(answer)
            except StopIteration as stop:
                lr = stop.value.lr or run.lr
                break
            answer = yield request
            used += len(answer.losses)
        left = total - used
        yield Train(lr, left, self.schedule.stretched(left))


TASKS = {
    task.name: task
    for task in (
        NoisyQuadratic("noisy quadratic", None, digits, "sgd", 2000, 0.0025, rows=16),
        Task("digits sgd", MLP(), digits, "sgd", 2000, 0.00125),
        Task("digits adamw", MLP(), digits, "adamw", 2000, 0.00025),
        Task("fashion sgd", MLP(), fashion_mnist, "sgd", 2000, 0.005, rows=8),
        Task("fashion adamw", MLP(), fashion_mnist, "adamw", 2000, 0.0005, rows=8),
        Task("fashion cnn sgd", CNN(), fashion_mnist, "sgd", 1000, 0.02, rows=6),
        Task("fashion cnn adamw", CNN(), fashion_mnist, "adamw", 1000, 0.001, rows=6),
        Task("digits batch norm sgd", MLP(norm=True), digits, "sgd", 2000, 0.0025),
        Task("english adamw", Transformer(), english, "adamw", 1000, 0.002, rows=4, batch_size=8),
    )
}
SCHEDULES: dict[str, Schedule] = {
    "linear": Linear(),
    "cosine": Cosine(),
    "warm-up cosine": Warmup(Cosine(), 0.05),
    "rex": Rex(),
    "one cycle": OneCycle(),
    "warm-up stable decay": WarmupStableDecay(),
}
RULES: dict[str, AbstractSearch] = {
    "range test, cosine": RangeThen(Cosine()),
    "range test, warm-up cosine": RangeThen(Warmup(Cosine(), 0.05)),
    "AutoLRS": Guarded(AutoLRS()),
    "AutoLRS, caution 1": Guarded(AutoLRS(caution=1.0)),
    "AutoLRS, caution 4": Guarded(AutoLRS(caution=4.0)),
    "AutoLRS, no ratchet": AutoLRS(),
    "AutoLRS, hold": Guarded(AutoLRS(anneal_fraction=0.5, anneal=Linear())),
}


# --- the table ---------------------------------------------------------------------------------------------------------


def oracle(task: Task, name: str, peaks: int = 7) -> dict[str, Any]:
    """The schedule at the peak whose validation loss, averaged over rows, is lowest, of a grid of factors of two."""
    grid = [task.lowest * 2.0**i for i in range(peaks)]
    schedule = SCHEDULES[name].stretched(task.total)
    validation, test = fixed(task, task.total, schedule, grid)
    best = int(validation.nan_to_num(nan=99.0).clamp(max=99).mean(0).argmin())
    return {"test": test[:, best].tolist(), "peak": grid[best], "search": 0}


def rule(task: Task, name: str) -> dict[str, Any]:
    """A search rule, as the product has it."""
    outcome = Driver(task).run(RULES[name].requests, task.total)
    firsts = [next(r.lr for r, _ in trace if isinstance(r, Train)) for trace in outcome.traces]
    undone = [sum(isinstance(r, Train) and r.start is not None for r, _ in trace) for trace in outcome.traces]
    return {
        "test": outcome.test.tolist(),
        "peak": float(np.exp(np.mean(np.log(firsts)))),
        "search": float(np.mean(outcome.search)) / task.total,
        "undone": float(np.mean(undone)),
        "steps": float(np.mean(outcome.search) + np.mean(outcome.real)),
    }


def row(task: Task, name: str, found: dict[str, Any], reference: dict[str, Any] | None) -> str:
    """One line: test loss, and the paired difference to the oracle's best schedule with its standard error."""
    test = np.minimum(found["test"], 10.0)
    text = f"| {task.name} | {name} | {test.mean():.4f} | {np.median(test):.4f} |"
    if reference is None:
        return text + " | | | |"
    difference = test - np.minimum(reference["test"], 10.0)
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return (
        f"{text} {difference.mean():+.4f} ± {error:.4f} | {found['peak']:.3g} | {found['search']:.0%} | "
        f"{found.get('undone', 0):.1f} |"
    )


def summary(tasks: Sequence[Task], results: dict[str, Any]) -> str:
    """One line per task: the oracle, the recipes without tuning, and AutoLRS."""
    recipes = ("range test, cosine", "range test, warm-up cosine", "AutoLRS, no ratchet", "AutoLRS")
    lines = [f"| task | rows | oracle, best of six | {' | '.join(recipes)} | AutoLRS - oracle | search |"]
    lines += ["|---|--:|---|--:|--:|--:|--:|--:|--:|"]
    for task in tasks:
        keys = {m: f"{task.name}, {task.total} steps, {m}" for m in (*SCHEDULES, *recipes)}
        if not results.keys() >= set(keys.values()):
            continue
        found = {m: results[key] for m, key in keys.items()}
        mean = {m: float(np.mean(np.minimum(r["test"], 10.0))) for m, r in found.items()}
        best = min(SCHEDULES, key=lambda m: mean[m])
        ours, theirs = (np.minimum(found[m]["test"], 10.0) for m in ("AutoLRS", best))
        error = (ours - theirs).std(ddof=1) / math.sqrt(task.rows)
        lines.append(
            f"| {task.name} | {task.rows} | {mean[best]:.4f} ({best}, {found[best]['peak']:.3g}) | "
            f"{' | '.join(f'{mean[m]:.4f}' for m in recipes)} | {mean['AutoLRS'] - mean[best]:+.4f} ± {error:.4f} | "
            f"{found['AutoLRS']['search']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="*", default=[*SCHEDULES, *RULES], choices=[*SCHEDULES, *RULES])
    parser.add_argument("--total", type=int, help="optimizer steps, search included, instead of the task's own number")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("benchmarks/results/tiny.json"),
        help="done work is read from here and added",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    for name in arguments.tasks:
        task = TASKS[name] if arguments.total is None else replace(TASKS[name], total=arguments.total)
        print("| task | method | test loss | median | against the oracle's best | peak | search | undone |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for method in arguments.methods:
            key = f"{name}, {task.total} steps, {method}"
            if key not in results:
                start = time.perf_counter()
                results[key] = (oracle if method in SCHEDULES else rule)(task, method)
                results[key]["seconds"] = time.perf_counter() - start
                arguments.results.write_text(json.dumps(results))
            fixed_ones = [results.get(f"{name}, {task.total} steps, {s}") for s in SCHEDULES]
            known = [r for r in fixed_ones if r is not None]
            reference = min(known, key=lambda r: float(np.mean(np.minimum(r["test"], 10.0)))) if known else None
            print(row(task, method, results[key], reference), flush=True)
    tasks = [TASKS[n] if arguments.total is None else replace(TASKS[n], total=arguments.total) for n in arguments.tasks]
    print("\n" + summary(tasks, results))


if __name__ == "__main__":
    main()
