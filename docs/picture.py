"""Draw ``docs/images/run.svg`` from a finished run.

The run of the picture in README::

    lightning-autolr fit --config configs/digits/autolrs.yaml --trainer.max_steps 2000 --trainer.val_check_interval 50
    python docs/picture.py runs/digits/autolrs/version_0
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from lightning_autolr.report.inspect import inspect_run

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999"


def picture(run_dir: str) -> Figure:
    """The candidates of the first search on the left; learning rate and loss of the run on the right."""
    run = inspect_run(run_dir)
    searches = [s for s in run.searches if s.kind == "candidates"]
    number, search = next((i, s) for i, s in enumerate(searches) if s.train is not None)
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    axes = figure.subplot_mosaic("AB;AC", width_ratios=(1, 1.7))
    left, top, bottom = axes["A"], axes["B"], axes["C"]

    tried = [c for c in search.candidates if math.isfinite(c.score)]
    left.plot([c.lr for c in tried], [c.score for c in tried], "o", color="black", label="long candidates")
    coarse = [c for s in searches[:number] for c in s.candidates if math.isfinite(c.score)]
    lowest = min((c.score for c in coarse), default=0.0)
    coarse = [c for c in coarse if c.score < 2 * lowest]  # one that ran away would flatten the others
    left.plot([c.lr for c in coarse], [c.score for c in coarse], "o", mfc="none", color=GREY, label="short candidates")
    left.legend(loc="lower left", fontsize="small")
    assert search.train is not None
    left.axvline(search.train.lr, color=GREEN, linestyle="--")
    left.annotate("peak of\nthe run", (search.train.lr, 0.7), (4, 0), ("data", "axes fraction"), "offset points",
                  color=GREEN, ha="left", va="top")  # fmt: skip
    left.set(xscale="log", xlabel="learning rate", ylabel="training loss, second half of a probe",
             title=f"1. search: {sum(s.steps for s in searches)} private steps")  # fmt: skip

    for piece in run.pieces:
        undone = piece.segment.undone
        steps = np.arange(piece.segment.num_steps)
        lrs = [piece.segment(int(t)) for t in steps]
        style = {"color": GREY, "linestyle": ":"} if undone else {"color": BLUE}
        top.plot(piece.start + steps, lrs, **style)
        bottom.plot(piece.start + steps, piece.losses, linewidth=0.8, color=GREY if undone else BLUE, alpha=0.7)
        for panel in (top, bottom) if undone else ():
            panel.axvspan(
                piece.start, piece.stop, facecolor="0.93", edgecolor="0.75", hatch="///", linewidth=0, zorder=0
            )
    for s in run.searches:
        if s.steps:
            top.plot(s.step, 0, "v", color=ORANGE, markersize=9, clip_on=False, zorder=5)
    looks = [(s.step, s.base) for s in run.searches if s.kind == "look"]
    bottom.plot(*zip(*looks, strict=True), "o", color=PURPLE, markersize=3.5)
    top.set(ylabel="learning rate", ylim=(0, None), title="2. train: warm-up, anneal, take back what did harm")
    top.sharex(bottom)
    top.tick_params(labelbottom=False)
    bottom.set(yscale="log", ylabel="loss", xlabel="step of training", xlim=(0, run.pieces[-1].stop))
    for panel in axes.values():
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.title.set_fontsize(10)
    handles = [
        (matplotlib.lines.Line2D([], [], linestyle="none", marker="v", color=ORANGE), "searched here"),
        (matplotlib.lines.Line2D([], [], color=BLUE), "learning rate, training loss"),
        (matplotlib.lines.Line2D([], [], linestyle="none", marker="o", color=PURPLE, markersize=4), "validation loss"),
        (matplotlib.patches.Patch(facecolor="0.93", edgecolor="0.6", hatch="///", linewidth=0), "taken back"),
    ]
    figure.legend(*zip(*handles, strict=True), loc="outside lower center", ncols=4, frameon=False)
    return figure


if __name__ == "__main__":
    target = Path(__file__).parent / "images" / "run.svg"
    target.parent.mkdir(exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "autolr", "font.size": 9, "hatch.linewidth": 0.5}):
        figure = picture(sys.argv[1])
        figure.set_facecolor("white")  # it stands on dark pages too
        figure.savefig(target, metadata={"Date": None})
    print(target)
