"""Every installed peer computes what clipgrad defines, or refuses as it is known to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.peers import PEERS, check
from benchmarks.peers.jax_privacy import JaxPrivacy
from benchmarks.step import PrivateStep, Setting, Unavailable
from benchmarks.workloads import Workload
from benchmarks.workloads.cnn import classification, cnn, images
from benchmarks.workloads.diffusion import UNet, denoising, noised
from benchmarks.workloads.state_space import StateSpaceModel
from benchmarks.workloads.transformer import CausalTransformer, next_token, tokens

# What the libraries say of themselves at every step; to silence it there would cost their steps time.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:There is a performance drop because:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:In CPU autocast, but the target dtype:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:Extension saving to grad_batch does not:UserWarning"),
]


def _workload(name: str, model: Callable, batch: Callable, loss: Callable) -> Workload:
    return Workload(name, "tiny", model, batch, loss, {"cpu": (4,), "cuda": (4,)})


TINY = {
    workload.name: workload
    for workload in (
        _workload("cnn", partial(cnn, 8, (4, 6), 12), partial(images, 8), classification),
        _workload(
            "transformer",
            partial(CausalTransformer, 11, 8, 2, 2, 5),
            partial(tokens, 11, 5),
            next_token,
        ),
        _workload("diffusion", partial(UNet, (4, 8), 2), partial(noised, 8), denoising),
        _workload(
            "state-space", partial(StateSpaceModel, 11, 8, 2, 5), partial(tokens, 11, 5), next_token
        ),
    )
}

REFUSALS = {
    ("BackPACK", "transformer"): "no per-sample gradients for CausalTransformer, LayerNorm",
    ("BackPACK", "diffusion"): "no per-sample gradients for GroupNorm",
    ("BackPACK", "state-space"): "no per-sample gradients for LayerNorm",
    ("jax_privacy", "diffusion"): "no JAX twin",
    ("jax_privacy", "state-space"): "no JAX twin",
}

runs = pytest.mark.parametrize(
    ("peer", "workload"),
    [
        # Starting JAX and compiling takes seconds.
        pytest.param(p, w, marks=[pytest.mark.slow] if p == "jax_privacy" else [])
        for p in PEERS
        for w in TINY
        if (p, w) not in REFUSALS
    ],
)


@pytest.fixture
def made() -> Iterator[Callable[[str, Setting], PrivateStep]]:
    steps = []

    def make(peer: str, setting: Setting) -> PrivateStep:
        try:
            step = PEERS[peer].make(setting)
        except Unavailable as error:
            if "is not installed" in str(error):
                pytest.skip(str(error))
            raise
        steps.append(step)
        return step

    yield make
    for step in steps:
        getattr(step, "close", lambda: None)()


def _setting(workload: str) -> Setting:
    return check.checking(Setting(TINY[workload], 4))


@runs
def test_peer_agrees_with_the_oracle(made, peer: str, workload: str) -> None:
    setting = _setting(workload)
    assert check.Check(setting).compare(made(peer, setting)) is None


@runs
def test_step_moves_every_parameter_by_about_the_learning_rate(
    made, peer: str, workload: str
) -> None:
    setting = _setting(workload)
    step = made(peer, setting)
    before = {name: p.detach().clone() for name, p in step.weights().items()}
    step()
    after = step.weights()
    assert (
        before.keys()
        == after.keys()
        == dict(setting.model_and_batch()[0].named_parameters()).keys()
    )
    for name in before:
        moved = (after[name].detach() - before[name]).abs()
        # With noise on every element, Adam's first step is the learning rate, up to weight decay.
        assert moved.median() == pytest.approx(1e-4, rel=0.1), name
        assert moved.max() < 2e-4, name


@pytest.mark.parametrize("peer", [name for name in PEERS if name not in ("opake", "jax_privacy")])
def test_noise_is_that_of_the_multiplier(made, peer: str) -> None:
    # Noise far above the gradient; after one step AdamW's second moment is (1 - beta2) * grad ** 2.
    setting = replace(_setting("cnn"), max_grad_norm=1e-3)
    step = made(peer, setting)
    step()
    moments = [state["exp_avg_sq"].flatten() for state in step._optimizer.state.values()]
    deviation = float((torch.cat(moments) / (1 - 0.999)).mean().sqrt())
    assert deviation == pytest.approx(setting.max_grad_norm / setting.batch_size, rel=0.1)


def test_noise_of_opake_is_that_of_the_multiplier(made) -> None:
    setting = replace(_setting("cnn"), max_grad_norm=1e-3)
    step = made("opake", setting)
    clipped, _ = step._gradient(step._parameters, *step._batch, state=step._clip_state)
    noisy, _ = step._noise(clipped, step._noise_state)
    noise = torch.cat([(noisy.pytree[n] - g).flatten() for n, g in clipped.pytree.items()])
    assert float(noise.std()) == pytest.approx(setting.max_grad_norm / setting.batch_size, rel=0.1)


@runs
def test_nothing_per_sample_stays_alive(made, peer: str, workload: str) -> None:
    step = made(peer, _setting(workload))
    step()
    for p in step.weights().values():
        for name in ("grad_sample", "grad_batch", "_norm_sample", "summed_grad"):
            value = getattr(p, name, None)
            assert value is None or value.shape in (p.shape, (4,)), name


@pytest.mark.parametrize(("peer", "workload"), REFUSALS)
def test_peer_refuses(made, peer: str, workload: str) -> None:
    with pytest.raises(Unavailable, match=REFUSALS[peer, workload]):
        made(peer, _setting(workload))()


def test_loss_without_a_criterion_is_unavailable(made) -> None:
    def other(model, x, y):
        return classification(model, x, y) * 2

    setting = Setting(replace(TINY["cnn"], loss=other), 4)
    with pytest.raises(Unavailable, match="none was written for other"):
        made("Opacus ghost", setting)


@pytest.mark.parametrize("peer", [name for name in PEERS if PEERS[name].package])
def test_missing_package_is_unavailable(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(module: str) -> None:
        raise ModuleNotFoundError(name=module.partition(".")[0])

    monkeypatch.setattr("benchmarks.peers._common.import_module", nothing)
    monkeypatch.setenv("CLIPGRAD_BENCH_JAX_PYTHON", "/nowhere/python")
    with pytest.raises(Unavailable, match=f"{PEERS[peer].package} is not installed"):
        PEERS[peer].make(_setting("cnn"))


@pytest.mark.slow
class TestJaxWorker:
    @pytest.mark.parametrize("sizes", [[None], [1], [2], [None, 1]])
    def test_every_microbatch_size(self, sizes: list[int | None]) -> None:
        setting = _setting("cnn")
        step = self._made(setting, sizes)
        assert check.Check(setting).compare(step) is None
        step()
        step.close()

    def test_times_and_memory(self) -> None:
        step = self._made(_setting("transformer"))
        step()
        first = step.seconds()  # with its compilation
        step()
        assert 0 < step.seconds() < first
        weights = 4 * sum(w.numel() for w in step.weights().values())
        assert 3 * weights < step.peak_bytes() < 2**24
        step.close()

    def test_error_in_the_worker_comes_out(self) -> None:
        step = self._made(_setting("transformer"), [3])  # 3 does not divide the batch
        with pytest.raises(RuntimeError, match="3"):
            step()
        step.close()
        with pytest.raises((RuntimeError, ValueError)):
            step()

    def _made(self, setting: Setting, sizes: list[int | None] | None = None) -> JaxPrivacy:
        try:
            return JaxPrivacy(setting, sizes)
        except Unavailable as error:
            pytest.skip(str(error))


class TestCheck:
    """The comparison can fail."""

    def _found(self, workload: str = "cnn") -> tuple[Setting, dict[str, Tensor]]:
        setting = _setting(workload)
        return setting, check.oracle(setting)

    def test_clips_some_and_not_all(self) -> None:
        for workload in TINY:
            setting, _ = self._found(workload)
            _, norms = check._oracle(setting)
            clipped = norms > setting.max_grad_norm
            assert setting.batch_size == 4
            assert clipped.any(), workload
            assert not clipped.all(), workload

    @pytest.mark.parametrize("workload", TINY)
    def test_skipped_clipping_is_found(self, workload: str) -> None:
        setting, wanted = self._found(workload)
        found = check.oracle(replace(setting, max_grad_norm=1e6))
        assert "relative error" in _said(found, wanted)

    def test_mean_is_found(self) -> None:
        _, wanted = self._found()
        found = {name: g / 4 for name, g in wanted.items()}
        assert "0.25 times as long" in _said(found, wanted)

    def test_missing_parameter_is_found(self) -> None:
        _, wanted = self._found()
        found = {name: g for name, g in wanted.items() if name != "3.bias"}
        assert "no gradient for 3.bias" in _said(found, wanted)

    def test_parameter_without_gradient_is_found(self) -> None:
        _, wanted = self._found()
        found = {**wanted, "3.weight": torch.zeros_like(wanted["3.weight"])}
        assert "most of it in 3.weight" in _said(found, wanted)

    def test_nan_is_found(self) -> None:
        _, wanted = self._found()
        assert check.difference({n: g * float("nan") for n, g in wanted.items()}, wanted)

    def test_wrong_shape_and_unknown_name_are_found(self) -> None:
        _, wanted = self._found()
        assert "wrong shape of 0.bias" in _said({**wanted, "0.bias": torch.zeros(1)}, wanted)
        assert "unknown parameters: x" in _said({**wanted, "x": torch.zeros(1)}, wanted)

    def test_rounding_is_not_found(self) -> None:
        _, wanted = self._found()
        assert check.difference({n: g * (1 + 1e-6) for n, g in wanted.items()}, wanted) is None

    def test_nearer_to_float64_is_not_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        setting, wanted = self._found()
        step = _Step({name: g * 1.001 for name, g in wanted.items()})
        assert "1.001 times as long" in str(check.Check(setting).compare(step))

        def oracle(_: Setting, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
            return step.clipped_gradient() if dtype == torch.float64 else wanted

        monkeypatch.setattr(check, "oracle", oracle)
        assert check.Check(setting).compare(step) is None

    def test_equal_samples_are_refused(self) -> None:
        def same(size: int) -> tuple[Tensor, Tensor]:
            return torch.ones(size, 3, 8, 8), torch.zeros(size, dtype=torch.long)

        with pytest.raises(ValueError, match="all close"):
            check.checking(Setting(replace(TINY["cnn"], batch=same), 4))


class _Step:
    def __init__(self, gradient: dict[str, Tensor]) -> None:
        self._gradient = gradient

    def __call__(self) -> None: ...

    def clipped_gradient(self) -> dict[str, Tensor]:
        return self._gradient


def _said(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    said = check.difference(found, wanted)
    assert said is not None
    return said
