"""Replace PyTorch's messages about ``vmap`` by messages that say what the user can do instead."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from clipgrad.engine.foreign_code import SAVED_TENSORS_HOOKS
from clipgrad.errors import NotPerSampleError


class NeedsGraphError(NotPerSampleError):
    """The user's Python cannot run on all samples at once, but the captured graph of one sample's loss may.

    Nothing was found that mixes samples or writes to values that samples share. The capture decides whether the graph
    can be used.
    """


class ValueReadError(NeedsGraphError):
    """The loss reads the value of a tensor. The captured graph of the loss may run without that value."""


class _Advice(NamedTuple):
    fragments: tuple[str, ...]
    remedy: str
    error: type[NotPerSampleError] = NotPerSampleError


COMPILED_CODE = (
    "the loss runs code compiled by torch.compile (or torch.cond), which cannot be followed. Pass the model and "
    "the loss uncompiled (a compiled model holds it in _orig_mod). compile=True compiles the whole step."
)
_NO_RULE = (
    "vmap: we do not yet support",
    "Batching rule not implemented",
    "does not yet have a batching rule",
)
_ADVICE = (
    _Advice(
        ("'NoneType' object has no attribute 'next_functions'",),
        "the loss registers a hook with torch.autograd.graph, which would see the gradients of all samples at once. "
        "Remove it; change values in the forward pass, or gradients with pre_clipping_transform.",
    ),
    _Advice(("saved tensors hooks", "saved tensor hooks"), SAVED_TENSORS_HOOKS, NeedsGraphError),
    _Advice(
        (
            "data-dependent control flow",
            "Boolean value of Tensor",
            "aten::equal",
            "vmap over torch.allclose",
        ),
        "the loss branches on the value of a tensor (data-dependent control flow), so different samples would "
        "run different code. Write the branch as torch.where(condition, a, b), or compute the condition outside the "
        "loss, from Python values that are the same for all samples.",
        ValueReadError,
    ),
    _Advice(
        (".item() on a Tensor", "item() on a Tensor"),
        "the loss reads the value of a tensor with .item() (or int(), float()), which is data-dependent control "
        "flow: under per-sample gradients it has one value per sample. Keep it a tensor, and branch by torch.where. "
        "To log it, read optimizer.diagnostics after backward(), or return it as (loss, metrics) (clipped_grad: with "
        "has_aux=True).",
        ValueReadError,
    ),
    _Advice(
        ("Cannot access data pointer of Tensor", "Cannot access storage of BatchedTensor"),
        "the loss takes the values out of a tensor (tolist, numpy, deepcopy, pickle), where they cannot be followed. "
        "Use tensor operations; make copies of modules outside the loss. To log a value, read optimizer.diagnostics "
        "after backward(), or return it as (loss, metrics) (clipped_grad: with has_aux=True).",
        NeedsGraphError,
    ),
    _Advice(
        ("needed for gradient computation has been modified",),
        "the loss changes in place a value that a gradient needs as it was; PyTorch refuses this on a whole batch as "
        "well. Use the out-of-place form of the operation: x = x * 2 instead of x *= 2.",
    ),
    _Advice(
        (
            "a view of a leaf Variable",
            "a leaf Variable that requires grad",
            "more than one element of the written-to tensor",
        ),
        "the loss writes in place to a parameter or to something computed from parameters alone, which all samples "
        "share. Use the out-of-place form: w = w * mask instead of w *= mask.",
    ),
    _Advice(
        ("inplace randomness",),
        "the loss writes random numbers in place into a tensor that all samples share (torch.empty(shape).normal_(), "
        "as torch.distributions.Normal.rsample does). Make a random tensor for each sample: mean + deviation * "
        "torch.randn_like(mean), torch.randn(shape), or torch.empty_like(x).normal_().",
    ),
    _Advice(
        (
            "vmap: inplace arithmetic",
            "is not possible because there exists a Tensor",
            "Batch norm got a batched tensor",
            "in-place",
            "inplace",
            "doesn't match the broadcast shape",
            "on out= or view ops",
        ),
        "the loss writes a per-sample value in place into a tensor that all samples share: a tensor that it makes with "
        "torch.zeros(...) or the like, a buffer (running statistics, vectors of spectral_norm), or a tensor made "
        "outside. Use the out-of-place form or a tensor per sample (x.new_zeros(...), torch.zeros_like(x)), compute "
        "the value outside the loss, or put the layer in eval mode.",
    ),
    _Advice(
        ("randomness error mode", "randomness mode", "randomness='error'"),
        'the loss is random, and randomness="error" forbids that; use randomness="different" (each sample gets its own '
        "dropout mask).",
    ),
    _Advice(
        ("setup_context", "generate_vmap_rule", "vmap staticmethod"),
        "the loss calls a custom autograd.Function that vmap cannot batch. Give it setup_context and "
        "generate_vmap_rule = True. If it is torch.utils.checkpoint, pass use_reentrant=False (Hugging Face: "
        "gradient_checkpointing_kwargs={'use_reentrant': False}). If it is a module's backward hook, remove it.",
        NeedsGraphError,
    ),
    _Advice(
        ("escaped from inside a function being vmapped", "maybe_level.has_value()"),
        "the loss recomputes part of its forward pass during the backward pass (torch.utils.checkpoint), outside the "
        "transform. Switch checkpointing off: microbatch_size bounds the memory instead.",
        NeedsGraphError,
    ),
    _Advice(
        ("with `.data` under vmap", "accessing `data` under vmap"),
        "the loss reads or writes .data, past autograd and for all samples at once. Use .detach() to read a value; "
        "change parameters and buffers outside the loss.",
    ),
    _Advice(
        ("cannot register a hook on a tensor", "can't retain_grad on Tensor"),
        "the loss registers a hook, or retain_grad, on a tensor that has no gradient of its own inside the transform. "
        "Remove it; change values in the forward pass instead.",
    ),
    _Advice(
        ("_assert_async",),
        "the loss asserts something about the values of a tensor, which has values of all samples at once. Leave the "
        "assertion out of the loss: check data in the dataset. A sample whose gradient is not finite contributes "
        "nothing, and optimizer.diagnostics.num_nonfinite counts it.",
    ),
    _Advice(
        _NO_RULE,
        "the loss calls {operation}, which PyTorch's vmap cannot batch. Write it with elementary operations, or "
        "register such a form with clipgrad.rules.register_decomposition.",
    ),
    _Advice(
        (
            "inside of a function being transformed by a functorch",
            "backward() called inside a functorch",
            "element 0 of tensors does not require grad",
        ),
        "the loss differentiates with requires_grad_(), backward() or torch.autograd, which cannot see single samples. "
        "Use torch.func.grad (or vjp, jacrev) for gradients inside the loss. If it is the hook that "
        "enable_input_require_grads of Hugging Face and PEFT adds, remove it: model.disable_input_require_grads().",
        NeedsGraphError,
    ),
    _Advice(
        ("inside of vmap for memory_format",),
        "the loss sets a memory_format (channels_last) on one sample's tensor, where it has no meaning. Convert "
        "the model and the batch before backward.",
    ),
    _Advice(
        ("TORCHDYNAMO_VERBOSE",),
        COMPILED_CODE,
        NeedsGraphError,
    ),
    _Advice(
        (
            "dynamic shape",
            "dynamic in shape",
            "output has dynamic shape",
            "differently shaped Tensor",
            "nonzero",
        ),
        "the loss makes a tensor whose shape depends on the data (nonzero, boolean indexing, unique), which differs "
        "from sample to sample: data-dependent control flow. Use torch.where or a mask of fixed shape.",
    ),
)


_ABOUT_SIZES = ("size", "shape", "dimension")
_ONE_SAMPLE = (
    "clipgrad: the loss sees one sample at a time, as a batch of one (with keep_batch_dim=False, without a batch "
    "axis), so it must work for a batch of any size: x.view(x.shape[0], -1), not x.view(8, -1). Shapes in the message "
    "may have all samples as one more axis."
)


@contextmanager
def explain_vmap_errors() -> Iterator[None]:
    """Turn PyTorch's refusals into ``NotPerSampleError`` with a remedy; let other errors pass.

    An error about sizes gets a note, since code that works for the whole batch may fail for one sample.
    """
    try:
        yield
    except NotPerSampleError:
        raise
    except (RuntimeError, ValueError, IndexError, AttributeError) as error:
        message = str(error)
        advice = _advice(message)
        if advice is not None and not isinstance(error, IndexError):
            raise advice.error(_with_operation(advice.remedy, message)) from error
        if isinstance(error, AttributeError):
            raise
        if any(word in message.lower() for word in _ABOUT_SIZES):
            error.add_note(_ONE_SAMPLE)
        raise


def _with_operation(remedy: str, message: str) -> str:
    """Return a remedy with the name of the operation that PyTorch's message is about."""
    name = re.search(r"\baten::\w+", message)
    return remedy.replace("{operation}", name[0] if name else "an operation")


def note_arguments(
    error: TypeError, loss: Callable[..., Any], arguments: Sequence[Any], call: str
) -> None:
    """Add a note to a ``TypeError`` if the loss does not accept its arguments; ``call`` shows the right call."""
    try:
        inspect.signature(loss).bind(*arguments)
    except TypeError:
        given = [type(argument).__name__ for argument in arguments]
        note = f"clipgrad: the loss was called with {len(given)} arguments ({', '.join(given)})"
        if isinstance(arguments[-1], tuple | list):
            note += f"; the last argument is a whole batch, so pass its parts one by one: {call}"
        error.add_note(f"{note}.")
    except ValueError:  # the loss has no signature
        pass


def is_refusal(error: Exception) -> bool:
    """Return whether an error reports a fault of the loss, rather than a missing batching rule."""
    message = str(error)
    return _advice(message) is not None and not any(words in message for words in _NO_RULE)


def _advice(message: str) -> _Advice | None:
    """Return the remedy for one of PyTorch's messages, or None."""
    for advice in _ADVICE:
        if any(fragment in message for fragment in advice.fragments):
            return advice
    return None


def written_message(name: str) -> str:
    return (
        f"the loss wrote to parameter {name!r} in place. Change parameters outside the loss, after "
        "optimizer.step(), or compute the changed value out of place: torch.clamp(weight, ...)."
    )


def written_expression_message(name: str) -> str:
    return (
        f"the loss wrote in place to {name}, which is computed from parameters alone, so that all samples share it. "
        "Use the out-of-place form: w = w * mask, torch.where(mask, w, 0.0), or torch.cat for a part of w."
    )
