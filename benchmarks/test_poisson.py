"""The rows of Poisson batches: ``pytest benchmarks/ -k poisson``."""

from __future__ import annotations

import faulthandler

import pytest

from benchmarks import poisson, report
from benchmarks.conftest import Session
from benchmarks.records import load


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("workload", "batch_size"), [pytest.param(*row, id=f"{row[0]}-{row[1]}") for row in poisson.EXPECTED]
)  # fmt: skip
def test_poisson(
    run: Session, workload: str, batch_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    if run.quick and workload != "cnn-small":
        pytest.skip("the same code at a larger size")
    faulthandler.cancel_dump_traceback_later()  # a row takes minutes
    setting = run.setting(workload, 8 if run.quick else batch_size)
    row = poisson.measure(setting, 4 * run.plan.seconds, quick=run.quick)
    for cell in row.cells:
        assert cell.check is None, f"{cell.label}: {cell.check}"
    if run.quick or run.compare is not None:
        return
    with capsys.disabled():
        print(f"\n{workload}, Poisson batches of expected size {batch_size}:")
        print(*poisson.lines(row), sep="\n")
    poisson.keep(run.results, run.device, row)
    report.render(run.results, run.device, list(load(run.results / f"{run.device}.json").values()))
