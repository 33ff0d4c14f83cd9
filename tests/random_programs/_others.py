"""Operations on activations: pointwise, views, indexing, order, writes in place, casts, questions about values."""

from __future__ import annotations

from tests.random_programs._draft import Draft, Operation, Unfit


def one_of(*templates: str) -> Operation:
    """Expressions of an activation ``{h}`` and something ``{w}`` that broadcasts with it."""

    def apply(d: Draft, h: str) -> str:
        template = d.rng.choice(templates)
        return template.format(h=h, w=d.partner(h) if "{w}" in template else "")

    return apply


pointwise = one_of(
    "{h}.tanh()", "{h}.sigmoid()", "F.gelu({h})", "F.silu({h})", "F.relu({h})", "F.softplus({h})",
    "F.elu({h})", "F.leaky_relu({h})", "F.hardtanh({h})", "F.mish({h})", "{h}.sin()", "{h}.cos()",
    "{h}.square()", "({h}.square() + 1).sqrt()", "{h}.abs()", "({h}.abs() + 1).log()", "{h}.exp()",
    "{h}.clamp(-1, 1)", "torch.erf({h})", "{h}.softmax(-1)", "{h}.log_softmax(-1)", "-{h}",
    "F.softmin({h}, -1)", "F.logsigmoid({h})", "({h} ** 3)", "torch.atan2({h}, {h} + 3)",
    "({h} - {h}.mean())", "F.dropout({h}, 0.5, training=False)", "torch.nan_to_num({h})",
    "F.tanhshrink({h})", "F.hardshrink({h}, 0.1)", "F.threshold({h}, 0.1, 0.2)", "F.selu({h})",
    "({h} - {h}.detach() / 2)", "{h}.round() + {h}", "torch.special.expit({h})", "torch.frac({h})",
)  # fmt: skip

with_partner = one_of(
    "({h} * {w})", "({h} + {w})", "({h} - {w})", "({h} / (1 + {w} ** 2))", "torch.maximum({h}, {w})",
    "torch.minimum({h}, {w})", "torch.lerp({h}, {w}, 0.3)", "torch.where({h} > 0, {h}, {w})",
    "torch.where({h} > {w}, {h}, {w} * {h})", "torch.addcmul({h}, {w}, {w})", "torch.hypot({h}, {w})",
    "torch.addcdiv({h}, {w}, 1 + {w} ** 2)", "torch.logaddexp({h}, {w})", "(1 + {h} ** 2) ** {w}",
    "torch.sub({h}, {w}, alpha=0.4)", "({h}.masked_fill({h} > 0.5, 0.1) * {w})", "(2 * {w} - {h})",
    "torch.clamp({h}, min={w})", "torch.dist({h}, {w} + 1).view(1, 1)", "torch.atan2({h}, 1 + {w} ** 2)",
)  # fmt: skip

reductions = one_of(
    "{h}.sum(-1, keepdim=True)", "{h}.mean(1, keepdim=True)", "{h}.flatten(1).sum(1, keepdim=True)",
    "{h}.logsumexp(-1, keepdim=True)", "ramp({h}).amax(-1, keepdim=True)", "{h}.cumsum(-1)",
    "ramp({h}).max(1, keepdim=True)[0]", "ramp({h}).min(-1, keepdim=True).values", "{h}.cumsum(1)",
    "(1 + {h} ** 2).prod(-1, keepdim=True)", "(1 + {h} ** 2).cumprod(-1)", "({h} ** 2 + 1).norm(dim=-1, keepdim=True)",
    "ramp({h}).cummax(-1)[0]", "ramp({h}).median(-1, keepdim=True)[0]", "{h}.logcumsumexp(-1)",
    "torch.linalg.vector_norm({h} ** 2 + 1, dim=-1, keepdim=True)", "{h}.diff(dim=-1)",
    "{h}.std().view(1, 1)",
    "{h}.var(-1, keepdim=True, correction=0)", "{h}.nansum(-1, keepdim=True)",
    "torch.trace({h}.flatten(1).mT @ {h}.flatten(1)).view(1, 1)",
    "ramp({h}).sort(-1)[0]", "ramp({h}).sort(1, descending=True).values", "ramp({h}).topk(1, -1)[0]",
    "ramp({h}).kthvalue(1, -1, keepdim=True)[0]", "ramp({h}).quantile(0.5, -1, keepdim=True)",
    "{h}.take_along_dim(ramp({h}).argsort(-1), -1)", "{h}.gather(-1, ramp({h}).argsort(-1))",
    "{h}.gather(1, ramp({h}).argmax(1, keepdim=True))", "F.pdist({h}.flatten(1).mT + 1).view(1, -1)",
    "torch.cdist({h}.flatten(1).mT, 3 + {h}.flatten(1).mT)[None]",
)  # fmt: skip

views = one_of(
    "{h}.mT", "{h}.transpose(1, -1)", "{h}.flatten(1)", "{h}.unsqueeze(1)", "{h}.unsqueeze(-1)",
    "{h}.movedim(-1, 1)", "{h}.flip(-1)", "{h}.roll(1, -1)", "{h}[..., :1]", "{h}[:, ::2]",
    "{h}[..., None]", "{h}.repeat_interleave(2, -1)", "{h}.expand({h}.shape)", "{h}.contiguous()",
    "F.pad({h}, (1, 0))", "F.pad({h}, (0, 1), value=0.3)", "{h}.narrow(-1, 0, 1)", "{h}.tile(2)",
    "torch.cat([{h}, {h} * 2], -1)", "torch.stack([{h}, {h}.tanh()], 1)", "{h}.chunk(2, -1)[0]",
    "torch.cat([{h}, {w}.expand({h}.shape)], 1)", "{h}.unfold(-1, 1, 1)", "{h}.unbind(1)[0]",
    "{h}.reshape(1, -1)", "{h}.view_as({h})", "{h}.squeeze(-1)[None, None].flatten(0, 2)[None]",
    "torch.tril({h})", "torch.triu({h}, 1)", "{h}.diagonal(dim1=-2, dim2=-1)", "torch.diag_embed({h})",
    "{h}.select(1, 0)[None].flatten(0, 1)", "{h}.permute(0, *range({h}.dim() - 1, 0, -1))", "{h}.split(1, 1)[-1]",
    "torch.rot90({h}, 1, (-2, -1))", "torch.hstack([{h}, {h}])", "{h}.unflatten(-1, (1, -1))",
    "{h}.repeat(1, *[2] * ({h}.dim() - 1))",
)  # fmt: skip

fourier = one_of(
    "torch.fft.rfft({h}).real", "torch.fft.fft({h} * {w}).imag",
    "torch.fft.irfft(torch.fft.rfft({h}), n={h}.shape[-1])",
    "torch.view_as_real(torch.complex({h}, {h} * {w}))", "torch.complex({h}, {w}.expand({h}.shape)).abs()",
)  # fmt: skip

casts = one_of(
    "{h}.float().double()",
    "{h}.to(torch.float32).mul({w}.float()).double()",
    "{h}.bfloat16().to({h}.dtype)",
)
conversions = one_of(
    "({h} > 0).double() * {w}",
    "{h}.type_as({w}) * {w}",
    "{h}.sign().long() * {w}",
    "{h}.double() * {w}",
)


def less_precise(d: Draft, h: str) -> str:
    d.loose = True
    return casts(d, h)


def no_grad(d: Draft, h: str) -> str:
    n = d.shape(h)[-1]
    constant = d.pick(f"{h}.detach()", f"torch.no_grad()(F.linear)({h}, {d.param(n, n)})")
    if d.coin(0.1):
        constant = f"{h}.data"  # refused, wherever it is met
    return f"{constant} * {d.partner(h)}"


def indexed(d: Draft, h: str) -> str:
    shape = d.shape(h)
    n = shape[1]
    if not n:
        raise Unfit
    i = [d.rng.randrange(n) for _ in range(d.size())]
    ids = f"(ids[0] % {n})"
    return d.pick(
        f"{h}[:, {i}]", f"{h}[:, torch.tensor({i})]", f"{h}.index_select(1, torch.tensor({i}))",
        f"{h}[:, {ids}]", f"{h}.index_select(1, {ids})", f"{h}[[0, 0], {i[0]}]", f"{h}[0, {ids}][None]",
        f"{h}.masked_select(torch.ones(1, dtype=torch.bool)).view({h}.shape)", f"{h}[:, {i[0]}:{i[0] + 1}]",
    )  # fmt: skip


def scattered(d: Draft, h: str) -> str:
    """Functions that write some entries of a copy."""
    h = d.as_rank(h, 2)
    n = d.shape(h)[1]
    if not 0 < n < 9 or not d.shape("ids")[1]:
        raise Unfit
    source = d.bind(d.pick(f"{h} * {d.param(1, n)}", f"{d.param(1, n)} + 0 * {h}", f"{h}.tanh()"))
    one = f"(ids[:, :1] % {n})"
    each = f"((ids[:, :1] + torch.arange({n})) % {n})"
    return d.pick(
        f"{h}.scatter(1, {each}, {source})", f"{h}.scatter_add(1, {each}, {source})",
        f"{h}.index_add(1, {one}[0], {source}[:, :1])", f"{h}.index_copy(1, {one}[0], {source}[:, :1])",
        f"{h}.index_fill(1, {one}[0], 0.5) * {source}",
        f"{h}.index_put((torch.tensor([0]), {one}[0]), {source}[0, :1])",
        f"torch.index_put({h}, (torch.tensor([0]), {one}[0]), {source}[0, :1], accumulate=True)",
        f"{h}.masked_scatter({h} > 0, {source})", f"{h}.scatter_reduce(1, {each}, {source}, 'sum')",
        f"torch.scatter_reduce({h}, 1, {each}, {source}, 'amax')",
        f"torch.slice_scatter({h}, {source}[:, :1], 1, 0, 1)",
        f"torch.select_scatter({h}, {source}[:, 0], 1, {n - 1})", f"{h}.put({one}, {source}[:, :1])",
        f"{h}.scatter(1, {one}, 0.7) * {source}", f"torch.diagonal_scatter({h}.mT @ {h}, {source}[0])[None]",
    )  # fmt: skip


def in_place(d: Draft, h: str) -> str:
    shape = d.shape(h)
    copy = d.bind(d.pick(f"{h} + 0", f"{h}.clone()", f"{h} * 1.5"))
    if is_empty(shape):
        raise Unfit
    w = d.partner(h)
    d.write(
        *d.rng.choice(
            [
                ("", f"{copy}.mul_(1.1)"),
                ("", f"{copy}.add_({h})"),
                ("", f"{copy}.mul_({w})"),
                ("", f"{copy}.sub_({w}, alpha=0.5)"),
                (f"{copy}[:, 0]", f"2 * {copy}[:, -1]"),
                (f"{copy}[:, -1:]", f"{d.param(1, 1, *shape[2:])}"),
                (f"{copy}[..., 0]", "0.5"),
                (f"{copy}[:, 0]", f"{h}[:, 0] * {d.param()}"),
                (f"{copy}[{h} > 0.3]", "0.2"),
                ("", f"{copy}.tanh_()"),
                ("", f"F.relu({copy}, inplace=True)"),
                ("", f"F.leaky_relu_({copy})"),
                ("", f"{copy}.masked_fill_({h} > 0, 0.3)"),
                ("", f"{copy}.clamp_(-0.5, 0.5)"),
                ("", f"{copy}.copy_({w})"),
                ("", f"{copy}[:, 0].mul_(3)"),
                ("", f"{copy}.select(1, 0).add_({d.param()})"),
                ("", f"{copy}.narrow(1, 0, 1).copy_({h}[:, -1:])"),
                ("", f"{copy}.fill_({d.param()})"),
                ("", f"{copy}.zero_().add_({w})"),
                ("", f"{copy}.lerp_({w}, 0.3)"),
                ("", f"{copy}.addcmul_({h}, {w})"),
                ("", f"{copy}.sigmoid_()"),
                ("", f"{copy}.index_fill_(1, torch.tensor([0]), 0.1)"),
            ]
        )
    )
    return f"{copy} * {d.partner(h)}" if d.coin() else f"{copy} + 0"


def is_empty(shape: tuple[int, ...]) -> bool:
    return 0 in shape


def buffer(d: Draft, h: str) -> str:
    """Filled row by row."""
    h = d.as_rank(h, 3)
    shape = d.shape(h)
    if is_empty(shape):
        raise Unfit
    made = d.bind(
        d.pick(
            f"torch.zeros_like({h})",
            f"{h}.new_empty({shape}).fill_(0.1)",
            f"torch.empty_like({h}).zero_()",
        )
    )
    for row in range(min(shape[1], 3)):
        d.write(f"{made}[:, {row}]", f"{h}[:, {row}] * {d.param(shape[2])}")
    return f"{made} + 0"


def pooled(d: Draft, h: str) -> str:
    axes = d.rng.choice((1, 2))
    h = d.as_rank(h, axes + 2)
    if is_empty(d.shape(h)):
        raise Unfit
    return d.pick(
        f"F.avg_pool{axes}d({h}, 1)", f"F.adaptive_avg_pool{axes}d({h}, 1)",
        f"F.max_pool{axes}d(ramp({h}), 2, 1, 1)", f"F.adaptive_max_pool{axes}d(ramp({h}), 1)",
        f"F.interpolate({h}, scale_factor=2)", f"F.lp_pool{axes}d({h} ** 2 + 1, 2, 1)",
        f"F.glu({h}.repeat_interleave(2, -1))", f"F.prelu({h}, {d.param(d.shape(h)[1])})",
        f"F.prelu({h}, {d.param(1)})", f"F.pixel_shuffle({h}.unsqueeze(1), 1)",
        f"F.cosine_similarity({h}, {d.param(d.shape(h)[-1])} + 3, -1).unsqueeze(-1)",
    )  # fmt: skip


def linear_algebra(d: Draft, h: str) -> str:
    h = d.as_rank(h, 3)
    _, t, n = d.shape(h)
    if not 0 < n < 5 or not t:
        raise Unfit
    matrix = d.bind(
        f"{h}.mT @ {h} + {d.param(n, n)}.tanh() * 0.1 + 2 * torch.eye({n}, dtype=torch.float64)"
    )
    return d.pick(
        f"torch.linalg.inv({matrix})", f"torch.linalg.det({matrix}).view(1, 1).log1p()",
        f"torch.linalg.solve({matrix}, {d.param(1, n, 2)})", f"torch.linalg.solve({matrix}, {d.param(n, 2)})",
        f"torch.linalg.slogdet({matrix})[1].view(1, 1)",
        f"torch.linalg.cholesky({matrix} @ {matrix}.mT)", f"torch.linalg.matrix_exp({matrix} / 9)",
        f"torch.linalg.solve_triangular({matrix}, {h}.mT, upper=True)",
        f"torch.linalg.eigvalsh({matrix} @ {matrix}.mT)",
    )  # fmt: skip


def asked(d: Draft, h: str) -> str:
    """Python decides, so samples may take different ways."""
    d.asks = True
    return d.pick(
        f"({h} * 2 if {h}.sum() > 0.1 else {h} * {d.partner(h)})",
        f"({h} * float({h}.detach().sum() > 0))",
        f"({h} * {d.partner(h)} if ({h} > 0.2).any().item() else {h}.tanh())",
    )


def regularised(d: Draft, h: str) -> str:
    w = d.rng.choice(list(d.params)) if d.params else None
    if w is None:
        raise Unfit
    return f'({h} + p["{w}"].square().sum())'


def joined(d: Draft, h: str) -> str:
    other = d.rng.choice(d.vectors)
    return d.pick(
        f"torch.cat([{h}.flatten(1), {other}.flatten(1)], 1)",
        f"({h} * {other}.sum().tanh())",
        f"({h} + {other}.flatten(1).sum(1).view({', '.join(['1'] * len(d.shape(h)))}))",
        f"torch.block_diag({h}.flatten(1), {other}.flatten(1))[None]",
    )


def nested(d: Draft, h: str) -> str:
    """Functions that call a function of the program's own."""
    n = d.shape(h)[-1]
    w = d.param(n, n)
    return d.pick(
        f"torch.func.vmap(lambda row: row @ {w})({h}.flatten(0, -2))[None]",
        f"checkpoint(lambda h: F.linear(h, {w}).tanh(), {h}, use_reentrant=False)",
        f"torch.func.grad(lambda h: F.linear(h, {w}).sin().sum())({h})",
        f"torch.func.jvp(lambda h: F.linear(h, {w}).sin(), ({h},), ({h},))[1]",
        f"torch.func.functional_call(Mapped({n}), {{'weight': {w}}}, ({h},))",
    )


OTHERS: list[Operation] = [
    pointwise, pointwise, pointwise, with_partner, with_partner, with_partner, with_partner, reductions,
    reductions, reductions, views, views, views, fourier, less_precise, conversions, no_grad, indexed,
    indexed, scattered, scattered, in_place, in_place, in_place, buffer, pooled, pooled,
    linear_algebra, asked, regularised, joined, joined, nested,
]  # fmt: skip
