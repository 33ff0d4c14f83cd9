"""Options, which rows run, and what happens when all have run."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compare, report
from benchmarks.allocator import keep_freed_memory
from benchmarks.modes import Microbatch, Mode, modes
from benchmarks.progress import Bar
from benchmarks.records import Row, load
from benchmarks.reference import REFERENCE
from benchmarks.row import Plan, measure_row
from benchmarks.step import Setting
from benchmarks.workloads import WORKLOADS

# Runs under another interpreter, which has JAX; this one need not.
collect_ignore_glob = ["peers/_jax_*.py"]

# The code of others at other sizes; tests/benchmarks/test_workloads.py checks them with fewer layers.
LARGER = {"cnn-medium", "cnn-large", "transformer-medium"}

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("clipgrad benchmarks")
    group.addoption("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    group.addoption(
        "--all-workloads", action="store_true", help="all workloads, not the reference tables alone"
    )
    group.addoption(
        "--row-seconds", type=float, default=30.0, help="time for the timed rounds of a row (30)"
    )
    group.addoption("--most-rounds", type=int, default=30, help="no more rounds than this (30)")
    group.addoption(
        "--default-allocator",
        action="store_true",
        help="let the C library hand freed memory back to the system (see benchmarks/allocator.py)",
    )
    group.addoption("--no-memory", action="store_true", help="leave peak memory out")
    group.addoption(
        "--results", type=Path, default=RESULTS, help="folder of tables, charts and raw figures"
    )
    group.addoption(
        "--compare",
        type=Path,
        nargs="?",
        const=RESULTS,
        help="compare with the raw figures in this folder (benchmarks/results), fail where a ratio has become worse "
        "beyond its spread, and write nothing",
    )


def device_of(config: pytest.Config) -> str:
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Session:
    """The rows of one run."""

    device: str
    quick: bool
    plan: Plan
    results: Path
    compare: Path | None
    wanted: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    bar: Bar | None = None

    def setting(self, workload: str, batch_size: int) -> Setting:
        return Setting(WORKLOADS[workload], batch_size, self.device)

    def row(self, workload: str, batch_size: int) -> Row:
        """The row, measured when it is first asked for, with all modes that this run asks for."""
        setting = self.setting(workload, batch_size)
        key = f"{workload}-{batch_size}"
        if key not in self.rows:
            everything = modes(self.device)
            wanted = self.wanted[workload, batch_size]
            # The ordinary step is measured with whatever is asked for: it is what all is compared with.
            shares = {everything[name].microbatch for name in wanted} | {Microbatch.BATCH}
            chosen = [
                mode
                for mode in everything.values()
                if mode.key in wanted or (not mode.private and mode.microbatch in shares)
            ]
            if self.bar is None:
                names = [f"{name}-{size}" for name, size in self.wanted]
                before = {
                    k: r.wall_s for k, r in load(self.results / f"{self.device}.json").items()
                }
                self.bar = Bar(names, before)
            faulthandler.cancel_dump_traceback_later()  # a row takes minutes, and all of it in its first test
            self.bar.begin(key)
            sweep = batch_size in setting.workload.sweep.get(self.device, ())
            plan = self.plan
            if sweep:  # a chart shows its times alone
                plan = replace(plan, seconds=plan.seconds / 3, memory=False, slowest=1.0)
            self.rows[key] = measure_row(setting, chosen, plan, self.bar.note, sweep=sweep)
            self.bar.end(key)
            if self.compare is None:  # whatever happens to the rows to come
                report.keep(self.results, self.device, self.rows)
        return self.rows[key]


_SESSION = pytest.StashKey[Session]()
_FINDINGS = pytest.StashKey[compare.Findings]()


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--default-allocator"):
        keep_freed_memory()
    quick = bool(config.getoption("benchmark_disable", False)) and not config.getoption(
        "benchmark_enable", False
    )
    # Convolutions would round to 10 bits by default, products would not, and JAX is told not to: all in float32.
    torch.backends.cudnn.allow_tf32 = False
    config.stash[_SESSION] = Session(
        device=device_of(config),
        quick=quick,
        plan=Plan(
            config.getoption("--row-seconds"),
            config.getoption("--most-rounds"),
            memory=not config.getoption("--no-memory"),
        ),
        results=config.getoption("--results"),
        compare=config.getoption("--compare"),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not {"workload", "batch_size", "mode"} <= set(metafunc.fixturenames):
        return
    session = metafunc.config.stash[_SESSION]
    found: list[Any] = []
    for workload in WORKLOADS.values():
        if session.quick and workload.name in LARGER:
            continue
        sizes = workload.batch_sizes[session.device]
        sweep = workload.sweep.get(session.device, ())
        for batch_size in sizes[:1] if session.quick else sorted({*sizes, *sweep}):
            for mode in modes(session.device, quick=session.quick).values():
                if batch_size in sweep and mode.microbatch is not Microbatch.BATCH:
                    continue
                name = f"{workload.name}-{batch_size}-{mode.key}"
                found.append(pytest.param(workload.name, batch_size, mode, id=name))
    metafunc.parametrize(("workload", "batch_size", "mode"), found)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    session = config.stash[_SESSION]
    chosen_by_hand = (
        config.option.keyword
        or config.option.markexpr
        or any("::" in argument for argument in config.args)
    )
    if not (session.quick or chosen_by_hand or config.getoption("--all-workloads")):
        left_out = [item for item in items if not _is_reference(item)]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if _is_reference(item)]


def _is_reference(item: pytest.Item) -> bool:
    """Whether a test belongs to the reference tables, or to none."""
    workload = getattr(getattr(item, "callspec", None), "params", {}).get("workload")
    return workload is None or workload in {entry.workload for entry in REFERENCE}


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    ours = session.config.stash[_SESSION]
    for item in session.items:  # what -k and -m have left
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if isinstance(mode := parameters.get("mode"), Mode):
            key = parameters["workload"], parameters["batch_size"]
            ours.wanted.setdefault(key, []).append(mode.key)


@pytest.fixture(scope="session")
def run(pytestconfig: pytest.Config) -> Iterator[Session]:
    session = pytestconfig.stash[_SESSION]
    yield session
    if session.bar is not None:
        session.bar.stop()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[_SESSION]
    if not session.rows:
        return
    for line in report.terminal_lines(session.rows.values()):
        terminalreporter.write_line(line)
    if _FINDINGS in config.stash:
        for line in config.stash[_FINDINGS].lines():
            terminalreporter.write_line(line)
    else:
        path = report.write(session.results, session.device, session.rows)
        terminalreporter.write_line(f"written: {path} (with .json and charts)")


def pytest_sessionfinish(session: pytest.Session) -> None:
    ours = session.config.stash[_SESSION]
    if ours.compare is None or not ours.rows:
        return
    found = compare.regressions(load(ours.compare / f"{ours.device}.json"), ours.rows)
    session.config.stash[_FINDINGS] = found
    if found.worse and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
