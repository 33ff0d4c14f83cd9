"""The step of jax_privacy, in an interpreter that has JAX: ``python -m benchmarks.peers._jax_worker FOLDER``.

Reads ``specification.json`` and ``inputs.npz`` in FOLDER, then a JSON line of standard input at a time, and answers
each with one of standard output. ``jax_privacy.py`` is the other end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax_privacy
import numpy as np
import optax
from jax_privacy import noise_addition

from benchmarks.peers import _jax_models as models


class Worker:
    """After the library's examples: clipped_grad, gaussian_privatizer and an optimizer in one jitted step."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        spec = self._spec = json.loads((folder / "specification.json").read_text())
        weights, batch = self._inputs()
        self._gradients = [
            jax_privacy.clipped_grad(
                models.loss_of(spec),
                l2_clip_norm=spec["max_grad_norm"],
                batch_argnums=tuple(range(1, 1 + len(batch))),
                normalize_by=spec["batch_size"],
                microbatch_size=size,
            )
            for size in spec["microbatch_sizes"]
        ]
        self._privatizer = noise_addition.gaussian_privatizer(
            stddev=spec["noise_multiplier"] * self._gradients[0].sensitivity(),
            prng_key=jax.random.key(spec["seed"]),
        )
        # The defaults of torch.optim.AdamW; optax has another weight decay.
        self._optimizer = optax.adamw(spec["learning_rate"], eps=1e-8, weight_decay=0.01)
        self._state = (weights, self._privatizer.init(weights), self._optimizer.init(weights))
        self._batch = batch
        self._compiled: Any = None

    def _inputs(self) -> tuple[models.Params, list[models.Array]]:
        with np.load(self._folder / "inputs.npz") as inputs:
            weights = {k.removeprefix("w:"): v for k, v in inputs.items() if k.startswith("w:")}
            batch = [inputs[f"b:{i}"] for i in range(len(inputs) - len(weights))]
        weights = models.params_from_torch(self._spec, weights)
        batch = models.batch_from_torch(self._spec, batch)
        # Copies, in one piece each, that a step may write to.
        return {name: jnp.array(w) for name, w in weights.items()}, [jnp.array(b) for b in batch]

    def _update(self, gradient: Any, state: Any, *batch: models.Array) -> Any:
        params, noise_state, optimizer_state = state
        mean = gradient(params, *batch)
        noisy, noise_state = self._privatizer.update(mean, noise_state)
        updates, optimizer_state = self._optimizer.update(noisy, optimizer_state, params)
        return optax.apply_updates(params, updates), noise_state, optimizer_state

    def step(self) -> dict[str, Any]:
        """One step; the first one compiles."""
        start = time.perf_counter()
        if self._compiled is None:
            self._compile()
        self._state = jax.block_until_ready(self._compiled(self._state, *self._batch))
        return {"seconds": time.perf_counter() - start}

    def _compile(self) -> None:
        """Of several microbatch sizes the fastest is kept, with its gradient."""
        found = []
        for gradient in self._gradients:
            # The old state may be written to: PyTorch's optimizers work in place as well.
            jitted = jax.jit(partial(self._update, gradient), donate_argnums=0)
            compiled = jitted.lower(self._state, *self._batch).compile()
            found.append((self._trial(compiled), compiled, gradient))
        _, self._compiled, gradient = min(found, key=lambda one: one[0])
        self._gradients = [gradient]

    def _trial(self, compiled: Any) -> float:
        if len(self._gradients) == 1:
            return 0.0
        state = jax.tree.map(lambda leaf: leaf.copy(), self._state)
        try:
            state = jax.block_until_ready(compiled(state, *self._batch))
            start = time.perf_counter()
            jax.block_until_ready(compiled(state, *self._batch))
        except jax.errors.JaxRuntimeError:  # out of memory
            return float("inf")
        return time.perf_counter() - start

    def clipped_gradient(self) -> dict[str, Any]:
        mean = jax.jit(self._gradients[0])(self._state[0], *self._batch)
        return self._save({name: g * self._spec["batch_size"] for name, g in mean.items()})

    def weights(self) -> dict[str, Any]:
        return self._save(self._state[0])

    def peak(self) -> dict[str, Any]:
        """What the compiled step holds: weights, optimizer state, batch and all temporaries.

        JAX cannot reset a device's high-water mark, and a process's has what compiling needed; XLA's own plan of the
        step's memory has neither, and agrees with what a quiet process shows.
        """
        if self._compiled is None:
            self._compile()
        plan = self._compiled.memory_analysis()
        inputs_and_outputs = (
            plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        )
        return {"bytes": inputs_and_outputs + plan.temp_size_in_bytes}

    def _save(self, params: models.Params) -> dict[str, Any]:
        np.savez(self._folder / "answer.npz", **models.params_to_torch(self._spec, params))
        return {}


def main(folder: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not an answer
    worker: Worker | None = None
    for line in sys.stdin:
        try:
            worker = worker or Worker(folder)
            answer = getattr(worker, json.loads(line)["do"])()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
