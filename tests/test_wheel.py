"""The wheel holds every file of the package, and runs the README's loop where nothing else is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest

import clipgrad
from tests.test_readme import python_blocks

ROOT = Path(__file__).resolve().parents[1]
DATA = {"clipgrad/noise/float32_loop.c", "clipgrad/noise/recurrence.c", "clipgrad/py.typed"}
"""Files that are no modules, which a build leaves out most easily."""

BEFORE = """
import sys
import torch
import clipgrad
assert clipgrad.__file__.startswith(sys.prefix), clipgrad.__file__
torch.manual_seed(0)
dataset = torch.utils.data.TensorDataset(torch.randn(600, 8, 8), torch.randint(0, 10, (600,)))
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
before = [p.detach().clone() for p in model.parameters()]
"""
AFTER = """
assert all((p != b).any() for p, b in zip(model.parameters(), before, strict=True))
assert 2.9 < optimizer.epsilon() <= 3.0
print("trained with", clipgrad.__version__)
"""


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command that sees no module of the checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, check=False)


def succeed(*command: str | Path, cwd: Path) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    succeed(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.nightly
def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    files = (path for path in (ROOT / "clipgrad").rglob("*") if path.is_file())
    wanted = {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".pyc"}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = f"clipgrad-{clipgrad.__version__}.dist-info"
        metadata = BytesParser().parsebytes(archive.read(f"{info}/METADATA"))
        licence = archive.read(f"{info}/licenses/LICENSE")
    assert names == wanted
    assert names >= DATA
    assert metadata["Version"] == clipgrad.__version__
    assert licence == (ROOT / "LICENSE").read_bytes()


@pytest.mark.nightly
def test_readme_trains_where_only_the_wheel_is_installed(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    succeed(
        python, "-c", "import importlib.util as u; assert not u.find_spec('torch')", cwd=tmp_path
    )
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    found = run(*pip, "index", "versions", "torch", "--retries", "1", cwd=tmp_path)
    if found.returncode:
        pytest.skip(f"pip finds no torch at all: {found.stderr.strip().splitlines()[-1]}")
    # Most modules of torch are never imported here, so compiling all of them would be wasted time.
    pinned = ("install", "-q", "--no-compile", "-c", ROOT / "constraints.txt")
    succeed(*pip, *pinned, f"{wheel}[accounting]", cwd=tmp_path)

    loop = python_blocks()[0]
    assert "steps=1000" in loop
    script = tmp_path / "train.py"
    script.write_text(BEFORE + loop.replace("steps=1000", "steps=4") + AFTER, encoding="utf-8")
    assert clipgrad.__version__ in succeed(python, "-I", "-W", "error", script, cwd=tmp_path)
