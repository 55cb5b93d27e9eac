"""The trace is the state: a search that is told what it was told before asks for exactly what comes next."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_autolr.core.requests import Answer, Request, Run, decode
from lightning_autolr.schedules import Cosine, Warmup, to_plain
from lightning_autolr.search.base import AbstractSearch, ReplayError, replay
from lightning_autolr.search.beam import BeamSearch
from lightning_autolr.search.factors import FactorSearch
from lightning_autolr.search.fixed import Fixed
from lightning_autolr.search.published import PublishedAutoLRS
from tests.toy import run_toy
from tests.zoo import Cliff, Problem, noisy_quadratic

RUN = Run(total_steps=60, lr=0.1)
SEARCHES: dict[str, tuple[AbstractSearch, Problem]] = {
    "published": (PublishedAutoLRS(1e-3, 1.0, tau=20, tau_max=40, num_candidates=3, warmup_steps=5), noisy_quadratic()),
    "published, with divergence": (PublishedAutoLRS(1e-2, 9.0, tau=20, num_candidates=3), Cliff()),
    "beam": (BeamSearch(interval=10), noisy_quadratic()),
    "factors": (FactorSearch(every=5), noisy_quadratic()),
    "fixed": (Fixed(Warmup(Cosine(), 0.1)), noisy_quadratic()),
}
Trace = list[tuple[Request, Answer]]


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    return {name: run_toy(search, problem, 60).trace for name, (search, problem) in SEARCHES.items()}


def through_json(trace: Trace) -> Trace:
    """As the journal has it, and a checkpoint."""
    return [(decode(q), decode(a)) for q, a in json.loads(json.dumps([(to_plain(q), to_plain(a)) for q, a in trace]))]


@pytest.mark.parametrize("name", SEARCHES)
def test_traces_survive_json(name: str, traces: dict[str, Trace]) -> None:
    """Representations are compared, since NaN and infinity occur and NaN equals nothing."""
    assert repr(through_json(traces[name])) == repr(traces[name])


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(sorted(SEARCHES)), share=st.floats(0, 1, exclude_max=True))
def test_a_search_continues_where_its_record_ends(name: str, share: float, traces: dict[str, Trace]) -> None:
    trace = traces[name]
    length = int(share * len(trace))
    search, _ = SEARCHES[name]
    assert replay(search.requests(RUN), through_json(trace[:length])) == trace[length][0]


@pytest.mark.parametrize("name", SEARCHES)
def test_a_record_of_an_older_version_is_continued(name: str, traces: dict[str, Trace]) -> None:
    """One that worded its requests otherwise, and did not describe them for figures yet."""
    trace = traces[name]
    described = {f.name for request, _ in trace for f in dataclasses.fields(request) if not f.compare}
    plain = [({k: v for k, v in to_plain(q).items() if k not in described}, a) for q, a in trace]
    older = [(decode(request), answer) for request, answer in plain]
    assert described >= {"label"}
    search, _ = SEARCHES[name]
    assert replay(search.requests(RUN), older[:-1]) == trace[-1][0]


@pytest.mark.parametrize("name", SEARCHES)
def test_a_continued_search_gets_to_the_same_end(name: str, traces: dict[str, Trace]) -> None:
    """Feeding the rest of the answers one by one asks for the rest of the requests."""
    trace = traces[name]
    search, _ = SEARCHES[name]
    requests = search.requests(RUN)
    request = replay(requests, trace[: len(trace) // 2])
    for recorded, answer in trace[len(trace) // 2 : -1]:
        assert request == recorded
        request = requests.send(answer)
    assert request == trace[-1][0]


def test_a_finished_search_asks_for_nothing() -> None:
    trace = run_toy(Fixed(Cosine()), noisy_quadratic(), 10).trace
    assert replay(Fixed(Cosine()).requests(Run(total_steps=10, lr=0.1)), trace) is None


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("published", {"seed": 1}),
        ("published", {"tau": 15}),
        ("published", {"warmup_steps": 4}),
        ("published", {"kappa": 0.0}),
        ("beam", {"beam_size": 3}),
        ("beam", {"factors": (3.0, 0.5)}),
        ("factors", {"factors": (4.0, 0.25)}),
        ("fixed", {"peak_lr": 0.3}),
    ],
)
def test_changed_options_are_refused(name: str, changes: dict[str, Any], traces: dict[str, Trace]) -> None:
    search: Any = SEARCHES[name][0]
    with pytest.raises(ReplayError, match="options, the seed or the version"):
        replay(dataclasses.replace(search, **changes).requests(RUN), traces[name])


def test_a_changed_answer_is_noticed_as_soon_as_it_matters(traces: dict[str, Trace]) -> None:
    """The second stage's choice depends on the losses of its probes: with others, another rate is trained."""
    trace = through_json(traces["beam"])
    probes = [i for i, (request, _) in enumerate(trace) if type(request).__name__ == "Probe"][:6]
    answers: list[Any] = [trace[i][1] for i in probes]
    for i, answer in zip(probes, reversed(answers), strict=True):
        trace[i] = (trace[i][0], answer)
    with pytest.raises(ReplayError):
        replay(SEARCHES["beam"][0].requests(RUN), trace)
