"""Parameters as operands of plain tensor algebra."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import MakeBatch, add, architecture, floats, normal, several


class Formula(nn.Module):
    """A formula in the input and parameters of the given shapes."""

    def __init__(self, formula: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.formula = formula
        self.weights = nn.ParameterList([normal(*shape) for shape in shapes])

    def forward(self, *inputs: Tensor) -> Tensor:
        # By index: torch 2.11 cannot capture an unpacked ParameterList.
        weights = [self.weights[index] for index in range(len(self.weights))]
        return self.formula(*inputs, *weights)


def formula(
    name: str,
    function: Callable[..., Tensor],
    *shapes: tuple[int, ...],
    why: str,
    batch: MakeBatch | None = None,
) -> None:
    """Register a formula; the input is (batch, 5, 4) unless told otherwise."""
    add(name, lambda: Formula(function, *shapes), batch or floats(5, 4), why)


formula("matmul_right", lambda x, w: (x @ w).tanh(), (4, 3), why="x @ w")
formula("matmul_right_2d", lambda x, w: (x @ w).tanh(), (4, 3), why="x @ w", batch=floats(4))
formula("matmul_left", lambda x, w: (w @ x).tanh(), (3, 5), why="w @ x: mixes time, not features")
formula(
    "matmul_transposed",
    lambda x, w: (x @ w.t()).tanh() + x @ w.mT,
    (3, 4),
    why="two views of one weight: w.t() and w.mT",
)
formula(
    "matmul_own_transpose",
    lambda x, w: (x @ w).tanh() @ w.T,
    (4, 3),
    why="tied autoencoder: the weight, then its own transpose",
)
formula("matmul_vector", lambda x, v: (x @ v).tanh(), (4,), why="matrix times parameter vector")
formula(
    "matmul_batched_weight",
    lambda x, w: torch.matmul(x.unsqueeze(1), w).tanh(),
    (2, 4, 3),
    why="the parameter carries a batch axis of its own (heads)",
)
formula(
    "matmul_method",
    lambda x, w: x.matmul(w).mul(w.sum()).tanh(),
    (4, 3),
    why="tensor methods instead of torch functions",
)
formula(
    "addmm",
    lambda x, b, w: torch.addmm(b, x, w, beta=0.5, alpha=2.0).tanh(),
    (3,),
    (4, 3),
    why="addmm with both factors",
    batch=floats(4),
)
formula(
    "baddbmm",
    lambda x, b, w: torch.baddbmm(b, x, w.expand(len(x), -1, -1), alpha=0.5).tanh(),
    (5, 3),
    (4, 3),
    why="baddbmm with a parameter expanded over the batch",
)
formula(
    "bmm_expanded",
    lambda x, w: torch.bmm(x, w.unsqueeze(0).repeat(len(x), 1, 1)).tanh(),
    (4, 3),
    why="the weight is copied for each sample by hand",
)
formula(
    "aten_calls",
    lambda x, b, w: torch.ops.aten.addmm(b, x, torch.ops.aten.t(w)).tanh(),
    (3,),
    (3, 4),
    why="operators called below the python functions",
    batch=floats(4),
)
formula(
    "einsum",
    lambda x, w, v: torch.einsum("bti,hio,o->bhto", x, w, v).tanh(),
    (2, 4, 3),
    (3,),
    why="einsum with two parameters and a head axis",
)
formula(
    "einsum_diagonal",
    lambda x, w: torch.einsum("bti,ii->bt", x, w).tanh(),
    (4, 4),
    why="einsum that reads the diagonal of a parameter",
)
formula(
    "einsum_transposed",
    lambda x, w: torch.einsum("oi,bti->bot", w, x).tanh(),
    (3, 4),
    why="einsum with the parameter as its first operand",
)
formula(
    "tensordot",
    lambda x, w: torch.tensordot(x, w, dims=([1, 2], [0, 1])).tanh(),
    (5, 4, 3),
    why="contraction over two axes",
)
formula(
    "inner_and_mv",
    lambda x, w, v: torch.inner(x, w).tanh() * torch.mv(w, v),
    (3, 4),
    (4,),
    why="torch.inner with data, torch.mv of two parameters",
)
formula(
    "low_rank",
    lambda x, a, b: F.linear(x, a @ b).tanh(),
    (3, 2),
    (2, 4),
    why="the weight is a product of two parameters",
)
formula(
    "outer_product",
    lambda x, a, b: F.linear(x, torch.outer(a, b)).tanh(),
    (3,),
    (4,),
    why="a rank-one weight",
)
formula(
    "kronecker",
    lambda x, a, b: F.linear(x, torch.kron(a, b)).tanh(),
    (2, 2),
    (2, 2),
    why="a Kronecker-factored weight",
)
formula(
    "multi_dot",
    lambda x, a, b: F.linear(x, torch.linalg.multi_dot([a, b, a])).tanh(),
    (3, 4),
    (4, 3),
    why="a chain of products with one factor twice",
)
formula(
    "gram_of_weight",
    lambda x, w: x @ F.linear(w, w).tanh(),
    (4, 4),
    why="F.linear whose input and weight are the same parameter",
)
formula(
    "weight_doubles_as_bias",
    lambda x, w: F.linear(x, w, w[0]).tanh(),
    (4, 4),
    why="a row of the weight is also the bias",
)
formula(
    "triangular_weight",
    lambda x, w: (x @ torch.tril(w)).tanh(),
    (4, 4),
    why="only half of the parameter takes part",
)
formula(
    "diagonal_weight",
    lambda x, d: (x @ torch.diag(d)).tanh(),
    (4,),
    why="a vector becomes a diagonal matrix",
)
formula(
    "matrix_exponential",
    lambda x, w: (x @ torch.matrix_exp(w - w.T)).tanh(),
    (4, 4),
    why="an orthogonal map through the exponential of an antisymmetric parameter",
)
formula(
    "linear_solve",
    lambda x, w: torch.linalg.solve(
        w + 3 * torch.eye(4, dtype=x.dtype, device=x.device), x.mT
    ).tanh(),
    (4, 4),
    why="the parameter is a matrix to be inverted",
)
formula(
    "normalised_weight",
    lambda x, w: F.linear(F.normalize(x, dim=-1), F.normalize(w, dim=-1)),
    (3, 4),
    why="cosine classifier: the weight is normalised on the fly",
)
formula(
    "distance_to_codebook",
    lambda x, w: torch.cdist(x, w).neg().softmax(-1) @ w,
    (3, 4),
    why="distances to prototypes, then a mixture of the same prototypes",
)
formula(
    "monotone_weights",
    lambda x, w: (x * F.softplus(w).cumsum(0)).tanh(),
    (4,),
    why="elementwise functions of a parameter",
)
formula(
    "where_and_clamp",
    lambda x, w: torch.where(x > 0, x * w, w.clamp(-0.2, 0.2)),
    (5, 4),
    why="data chooses, element by element, which use of the parameter counts",
)
formula(
    "sine_network",
    lambda x, w, f: torch.sin(f * F.linear(x, w)),
    (3, 4),
    (3,),
    why="learnable frequencies (SIREN)",
)
formula(
    "convolution_by_unfold",
    lambda x, w: (w.flatten(1) @ F.unfold(x, 3)).tanh(),
    (3, 2, 3, 3),
    why="a convolution spelled as unfold and matmul",
    batch=floats(2, 5, 5),
)
formula(
    "data_as_kernel",
    lambda x, k, w: F.conv2d(w.unsqueeze(0), k.flatten(0, 1)).squeeze(0).unflatten(0, (len(k), -1)),
    (1, 5, 5),
    why="a parameter is convolved with kernels from data",
    batch=several(floats(1), floats(2, 1, 3, 3)),
)
formula(
    "bilinear_form",
    lambda x, y, w: F.bilinear(x, y, w).tanh(),
    (2, 4, 3),
    why="functional bilinear without bias",
    batch=several(floats(4), floats(3)),
)


@architecture("bilinear_layer", several(floats(5, 4), floats(5, 3)))
class BilinearLayer(nn.Module):
    """nn.Bilinear, shared over time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(4, 3, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.layer(left, right).tanh()


@architecture("state_transition_loop", floats(5, 3))
class StateTransition(nn.Module):
    """A conditional random field: one transition matrix enters a logsumexp at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.transition, self.start = normal(3, 3), normal(3)

    def forward(self, scores: Tensor) -> Tensor:
        alpha = self.start + scores[:, 0]
        for step in range(1, scores.shape[1]):
            alpha = torch.logsumexp(alpha.unsqueeze(2) + self.transition, 1) + scores[:, step]
        return alpha


@architecture("hypernetwork", several(floats(4), floats(5, 3)))
class HyperNetwork(nn.Module):
    """A network produces each sample's weight for another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.produce, self.base = nn.Linear(4, 6), normal(2, 3)

    def forward(self, context: Tensor, x: Tensor) -> Tensor:
        weight = self.produce(context).view(-1, 2, 3) + self.base
        return torch.bmm(x, weight.transpose(1, 2)).tanh()


@architecture("graph_network", lambda size: (torch.randn(size, 5, 3), torch.rand(size, 5, 5)))
class GraphNetwork(nn.Module):
    """Message passing over a dense adjacency that comes with the sample; two rounds, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.mix = nn.Linear(3, 3), normal(3, 3)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        for _ in range(2):
            nodes = (adjacency @ self.message(nodes) + nodes @ self.mix).tanh()
        return nodes.sum(1)
