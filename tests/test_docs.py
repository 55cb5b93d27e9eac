"""What README and docs show: links lead somewhere, commands are understood."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_autolr import cli
from lightning_autolr.fit import resolve

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "configs/README.md", *sorted(ROOT.glob("docs/*.md"))]


def slugs(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def shown() -> list[str]:
    """Every line of a shell block that calls our command, without comments."""
    lines: list[str] = []
    for page in PAGES:
        for line in re.findall(r"^(?: {4})?(lightning-autolr .+)$", page.read_text(), re.MULTILINE):
            lines.append(" ".join(shlex.split(line, comments=True)))
    return list(dict.fromkeys(lines))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in slugs(file), target


def test_every_command_is_shown() -> None:
    assert {line.split()[1] for line in shown()} >= {"fit", *cli.COMMANDS}


@pytest.mark.parametrize("line", shown())
def test_commands_are_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, name, *arguments = shlex.split(line)
    if name == "fit":
        at = arguments.index("--config")
        assert resolve(arguments[at + 1], [*arguments[:at], *arguments[at + 2 :]])["trainer"]
        return
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    options = cli._parser_of(name, cli.COMMANDS[name]).parse_args([cli._dashed(argument) for argument in own])
    configs = options.get("configs") or [c for c in [options.get("config")] if c]
    assert all(list(ROOT.glob(config)) for config in configs)


def test_tables_of_quality_are_those_of_the_results() -> None:
    subprocess.run([sys.executable, ROOT / "docs/tables.py", "--check"], check=True)
