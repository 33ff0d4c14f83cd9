"""Runs every docs/examples/*.py as a reader would, but with --quick and warnings as errors."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.nightly import thinned

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("[!_]*.py"))


def test_there_are_examples():
    assert "digits" in [example.stem for example in EXAMPLES]


@pytest.mark.slow
@pytest.mark.parametrize(
    "example", thinned(EXAMPLES, lambda path: path.stem == "digits", lambda path: path.stem)
)
def test_example_runs(example: Path, tmp_path: Path):
    for package in NEEDS.get(example.stem, ()):
        pytest.importorskip(package)
    arguments, check = CHECKS.get(example.stem, ([], lambda output, folder: None))
    result = run(example, *arguments, folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    check(result.stdout, tmp_path)


def run(example: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # No terminal and no display: as in a CI log, whatever the tests themselves run in.
    unwanted = ("DISPLAY", "FORCE_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE", "MPLBACKEND")
    environment = {key: value for key, value in os.environ.items() if key not in unwanted}
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["PYTHONIOENCODING"] = "utf-8"
    environment["COLUMNS"] = "80"
    command = [sys.executable, "-W", "error", str(example), "--quick", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300
    )


def check_digits(output: str, folder: Path) -> None:
    assert (folder / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder / "digits.png") in output
    assert "NOT PRIVATE" in output  # because of --seed
    rows = {
        name: (float(accuracy), epsilon)
        for name, accuracy, epsilon in re.findall(
            r"│ (\S.*?) +│ +([\d.]+)% │ +(\S+) │ +[\d,]+ │ +\d+% │", output
        )
    }
    assert rows.keys() == {"clipgrad", "not private", "vmap(grad)"}
    for accuracy, _ in rows.values():
        assert accuracy > 50  # chance is 10
    assert rows["clipgrad"][1] == rows["vmap(grad)"][1] == "3.00"
    assert rows["not private"][1] == "none"
    # The same seed: the same batches and noise. Rounding may tip a few images of 360.
    assert rows["clipgrad"][0] == pytest.approx(rows["vmap(grad)"][0], abs=3)
    # Lines in place of a progress bar, the last of each training with its last step.
    assert len(re.findall(r"step +20/20 +loss [\d.]+ +accuracy +[\d.]+%", output)) == 3


def check_audit(output: str, folder: Path) -> None:
    assert len(re.findall(r"step +\d+/16 +loss [\d.]+", output)) == 4
    claim = float(re.findall(r"claimed: epsilon = ([\d.]+)", output)[0])
    approximate, gaussian = map(float, re.findall(r"epsilon >= ([\d.]+) at delta", output))
    # A quarter of the noise: so far from the claim that no coins hide it.
    assert 3 < approximate < gaussian
    assert gaussian > claim == 4.38
    assert "NOT as private as claimed" in output


def check_resume(output: str, folder: Path) -> None:
    assert "from step 0" in output
    assert "killed in step 5" in output
    assert "from step 4" in output
    done, spent, planned = re.findall(
        r"done: step (\d+), epsilon ([\d.]+), planned ([\d.]+)", output
    )[0]
    assert done == "10"
    assert spent == planned


def check_users(output: str, folder: Path) -> None:
    assert "adding or removing one user" in output
    first, second = map(float, re.findall(r"after phase \d: epsilon ([\d.]+)", output))
    assert first < second
    assert "15 rounds in one ledger" in output


def check_gan(output: str, folder: Path) -> None:
    assert re.search(r"epsilon 1\.\d+ after 20 steps", output)


def check_robust(output: str, folder: Path) -> None:
    ordinary, clipped = map(float, re.findall(r"weights ([\d.]+), bias", output))
    assert clipped < ordinary / 2


def check_distill(output: str, folder: Path) -> None:
    accuracies = list(map(int, re.findall(r"accuracy of the batch (\d+)%", output)))
    assert accuracies[-1] > 50  # chance is 10
    assert "student: epsilon" in output


def check_finetune_lm(output: str, folder: Path) -> None:
    assert (folder / "finetune_lm.png").read_bytes().startswith(b"\x89PNG")
    before = float(re.findall(r"public model: perplexity ([\d.]+)", output)[0])
    rows = dict(re.findall(r"^(\w.*?) +[\d.inf]+ +([\d.]+)$", output, re.MULTILINE))
    assert rows.keys() == {"DPTrainer, epsilon 4", "plain loop", "not private"}
    assert float(rows["not private"]) < before
    # Four noisy steps: near where they began, whatever the noise.
    assert all(float(perplexity) < 1.2 * before for perplexity in rows.values())
    exposed = re.findall(
        r"^(\w.*?) +([\d.]+) \+- \S+ +([\d.]+) \+- \S+   group epsilon", output, re.MULTILINE
    )
    assert [name for name, *_ in exposed] == ["not private", "DPTrainer, epsilon 8"]


NEEDS = {"finetune_lm": ("transformers", "accelerate", "peft")}
CHECKS: dict[str, tuple[list[str], Callable[[str, Path], None]]] = {
    "audit": (["--noise", "0.25"], check_audit),
    "digits": (["--seed", "0"], check_digits),
    "distill": ([], check_distill),
    "finetune_lm": ([], check_finetune_lm),
    "gan": ([], check_gan),
    "resume": ([], check_resume),
    "robust": ([], check_robust),
    "users": ([], check_users),
}
