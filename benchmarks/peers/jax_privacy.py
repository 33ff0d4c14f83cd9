"""jax_privacy, in a process with an interpreter of its own: see ``_jax_worker.py``."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.step import LEARNING_RATE, NOISE_MULTIPLIER, SEED, PrivateStep, Setting, Unavailable
from benchmarks.workloads.cnn import classification
from benchmarks.workloads.transformer import CausalTransformer, next_token

ROOT = Path(__file__).parents[2]
VARIABLE = "CLIPGRAD_BENCH_JAX_PYTHON"
HOW = (
    f"make .venv-jax from benchmarks/jax-constraints.txt, or name another interpreter in {VARIABLE}"
)


class JaxPrivacy:
    """Weights and batch go over as files, then a line of JSON for each question and for each answer.

    Args:
        setting: Workload, batch size, device.
        microbatch_sizes: clipped_grad's; None there is the whole batch. The fastest is taken. None here: the ones
            that are worth trying.
    """

    def __init__(
        self, setting: Setting, microbatch_sizes: Sequence[int | None] | None = None
    ) -> None:
        model, batch = setting.model_and_batch()
        twin = _twin(setting, model, batch)
        specification = {
            **twin,
            "microbatch_sizes": microbatch_sizes or _microbatch_sizes(twin["kind"], setting.device),
            "batch_size": setting.batch_size,
            "max_grad_norm": setting.max_grad_norm,
            "noise_multiplier": NOISE_MULTIPLIER,
            "learning_rate": LEARNING_RATE,
            "seed": SEED,
        }
        python = interpreter()
        self._files = tempfile.TemporaryDirectory()
        self._folder = Path(self._files.name)
        (self._folder / "specification.json").write_text(json.dumps(specification))
        arrays = {f"w:{name}": p for name, p in model.named_parameters()}
        arrays |= {f"b:{index}": leaf for index, leaf in enumerate(batch)}
        arrays = {name: value.detach().cpu().numpy() for name, value in arrays.items()}
        np.savez(self._folder / "inputs.npz", **arrays)
        self._seconds = float("nan")
        with (self._folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", "benchmarks.peers._jax_worker", str(self._folder)],
                cwd=ROOT,
                env=_environment(setting.device),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __call__(self) -> None:
        self._seconds = self._ask("step")["seconds"]

    def seconds(self) -> float:
        """Of the last step, measured by the worker; the first one compiles."""
        return self._seconds

    def clipped_gradient(self) -> Mapping[str, Tensor]:
        return self._arrays("clipped_gradient")

    def weights(self) -> Mapping[str, Tensor]:
        return self._arrays("weights")

    def peak_bytes(self) -> int:
        return int(self._ask("peak")["bytes"])

    def close(self) -> None:
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._files.cleanup()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.close()

    def _arrays(self, what: str) -> dict[str, Tensor]:
        self._ask(what)
        with np.load(self._folder / "answer.npz") as answer:
            return {name: torch.from_numpy(value) for name, value in answer.items()}

    def _ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": what}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _last_words(self) -> str:
        self._process.wait()
        lines = (self._folder / "log").read_text().strip().splitlines()
        return lines[-1] if lines else f"the worker ended with {self._process.returncode}"


def interpreter() -> Path:
    """The Python that has jax_privacy.

    Raises:
        Unavailable: If there is none.
    """
    python = Path(os.environ.get(VARIABLE) or ROOT / ".venv-jax" / "bin" / "python")
    if python not in _KNOWN:
        program = "import importlib.util as u; raise SystemExit(u.find_spec('jax_privacy') is None)"
        _KNOWN[python] = (
            python.exists()
            and subprocess.run([str(python), "-c", program], check=False).returncode == 0
        )
    if not _KNOWN[python]:
        raise Unavailable(f"jax-privacy is not installed: {HOW}")
    return python


_KNOWN: dict[Path, bool] = {}


def _microbatch_sizes(kind: str, device: str) -> list[int | None]:
    """What is fastest, where that is known.

    On a CPU a scan over single samples is: with all at once cnn-small and transformer-small take up to twice as long
    (JAX 0.10 and 0.11), cnn-medium minutes (0.10), since vmap turns a convolution's gradient into a grouped
    convolution. What that costs on a GPU is tried out.
    """
    if device == "cpu":
        return [1]
    return [None, 1] if kind == "cnn" else [None]


def _environment(device: str) -> dict[str, str]:
    """As PyTorch runs beside it: the same number of threads, float32 without TF32, no memory taken in advance."""
    return {
        **os.environ,
        "JAX_PLATFORMS": device,
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "NPROC": str(torch.get_num_threads()),  # the size of XLA's thread pool
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def _twin(setting: Setting, model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Any]:
    """What ``_jax_models.py`` has to know of the model."""
    loss = setting.workload.loss
    if type(model) is CausalTransformer and loss is next_token:
        first: Any = model.blocks[0]
        return {"kind": "transformer", "layers_in_all": len(model.blocks), "heads": first.heads}
    if type(model) is nn.Sequential and loss is classification:
        return {"kind": "cnn", "layers": _layers(model, batch[0][:1])}
    raise Unavailable("no JAX twin of this model was written")


def _layers(model: nn.Sequential, x: Tensor) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = []
    flattened = None
    for name, layer in model.named_children():
        if isinstance(layer, nn.Conv2d):
            layers.append({"kind": "conv", "name": name, "padding": layer.padding[0]})
        elif isinstance(layer, nn.Linear):
            layers.append({"kind": "linear", "name": name, "flattened": flattened})
            flattened = None
        elif isinstance(layer, nn.Flatten):
            layers.append({"kind": "flatten"})
            flattened = list(x.shape[1:])
        elif isinstance(layer, nn.MaxPool2d):
            layers.append({"kind": "pool", "size": layer.kernel_size})
        elif isinstance(layer, nn.ReLU):
            layers.append({"kind": "relu"})
        else:
            raise Unavailable("no JAX twin of this model was written")
        with torch.no_grad():
            x = layer(x)
    return layers


def make(setting: Setting) -> PrivateStep:
    return JaxPrivacy(setting)
