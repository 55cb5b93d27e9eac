"""Write the tables of training quality into README and the pages of ``docs``, out of ``benchmarks/results``.

python docs/tables.py            # after a benchmark was run
python docs/tables.py --check    # only say whether they are what the results say
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
sys.path.insert(0, str(ROOT / "benchmarks"))

import large_batch  # noqa: E402
import quality  # noqa: E402

WIDE = {  # marker in search-quality.md, and file of results
    "quality": "quality",
    "quality-5000": "quality-5000",
    "quality-200": "quality-200",
    "fine-tuning": "fine-tuning",
}
SUMMARY = {  # file of results and task, and how README calls it
    ("quality-5000", "char-lm"): "English bytes, Transformer, AdamW, 5,000",
    ("quality-5000", "mixer"): "Fashion-MNIST, MLP-Mixer, AdamW, 5,000",
    ("quality-5000", "noisy digits"): "digits with wrong labels, ConvNet, AdamW, 5,000",
    ("quality-5000", "digits"): "digits, ConvNet, SGD, 5,000",
    ("quality-5000", "fashion"): "Fashion-MNIST, ConvNet with batch norm, SGD, 5,000",
    ("quality", "noisy digits"): "digits with wrong labels, 2,000",
    ("quality", "digits"): "digits, 2,000",
    ("quality", "mixer"): "Mixer, 1,000",
    ("quality", "fashion"): "Fashion-MNIST ConvNet, 1,000",
    ("quality", "char-lm"): "English bytes, 1,000",
}
OURS = ("autolrs", "autolrs, search not counted")
RIVALS = ("range test + warm-up cosine", "prodigy + cosine", "schedule-free")


def wide(results: str) -> str:
    """All methods on all tasks."""
    printed = quality.table(quality.read(RESULTS / f"{results}.jsonl")).strip()
    return re.sub(r"^### (.+)$", r"**\1**", printed, flags=re.MULTILINE)


def summary() -> str:
    """One row per task: the oracle, AutoLRS and what is closest to it without tuning."""
    lines = [
        f"| task, steps | oracle | AutoLRS, search counted: minus the oracle | search on top: minus the oracle "
        f"| {' | '.join(r.replace('prodigy', 'Prodigy') for r in RIVALS)} |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for (results, task), name in SUMMARY.items():
        arms = quality.arms_of(quality.read(RESULTS / f"{results}.jsonl"), task)
        mean = {arm: np.mean([run["test_loss"] for run in runs.values()]) for arm, runs in arms.items()}
        oracle = quality.oracle_of(arms)
        of, lr = re.fullmatch(r"(.+), tuned \((.+)\)", oracle).groups()  # type: ignore[union-attr]
        cells = [
            f"{mean[oracle]:.4f} ({'REX' if of == 'rex' else of}, {lr})",
            *(f"{mean[arm]:.4f}: {quality.difference(arms, arm, oracle)}" if arm in arms else "-" for arm in OURS),
            *(f"{mean[rival]:.4f}" for rival in RIVALS),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def filled(page: Path, tables: dict[str, str]) -> str:
    """The text of a page with new tables between ``<!-- name -->`` and ``<!-- end -->``."""
    text = page.read_text()
    for name, table in tables.items():
        text, found = re.subn(
            rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", lambda m, t=table: m[1] + t + m[2], text, flags=re.DOTALL
        )
        if found != 1:
            raise ValueError(f"Expected one table {name!r} in {page}, got {found}.")
    return text


def main(check: bool) -> None:
    pages = {
        ROOT / "docs/search-quality.md": {name: wide(results) for name, results in WIDE.items()},
        ROOT / "docs/large-batch.md": {"large batch": large_batch.table(quality.read(RESULTS / "large_batch.jsonl"))},
        ROOT / "README.md": {"quality": summary()},
    }
    for page, tables in pages.items():
        text = filled(page, tables)
        if check and text != page.read_text():
            sys.exit(f"Expected the tables of {page.name} to be those of benchmarks/results; run docs/tables.py.")
        page.write_text(text)


if __name__ == "__main__":
    main(check="--check" in sys.argv[1:])
