"""Operations that hold parameters as a layer does."""

from __future__ import annotations

from tests.random_programs._draft import WORDS, Draft, Operation, Unfit

Shape = tuple[int, ...]


def shaped(d: Draft, h: str, rank: int) -> tuple[str, Shape]:
    h = d.as_rank(h, rank)
    return h, d.shape(h)


def linear(d: Draft, h: str) -> str:
    n, o = d.shape(h)[-1], d.size()
    return f"F.linear({h}, {d.param(o, n)}, {d.maybe(o)})"


def twice(d: Draft, h: str) -> str:
    n = d.shape(h)[-1]
    w = d.param(n, n)
    return f"F.linear(F.linear({h}, {w}).tanh(), {w})"


def matmul(d: Draft, h: str) -> str:
    n, o = d.shape(h)[-1], d.size()
    return d.pick(f"({h} @ {d.param(n, o)})", f"torch.matmul({h}, {d.param(n, o)})")


def matmul_left(d: Draft, h: str) -> str:
    return f"({d.param(d.size(), d.shape(h)[-2])} @ {h})"


def matmul_batched(d: Draft, h: str) -> str:
    shape, o = d.shape(h), d.size()
    if len(shape) < 3:
        raise Unfit
    return f"({h} @ {d.param(*shape[1:-2], shape[-1], o)})"


def vector(d: Draft, h: str) -> str:
    n = d.shape(h)[-1]
    return d.pick(f"({h} @ {d.param(n)})", f"({h} * {d.param(n)}).sum(-1)") + ".unsqueeze(-1)"


def addmm(d: Draft, h: str) -> str:
    h, (rows, n) = shaped(d, h, 2)
    o = d.size()
    bias = d.pick(d.param(o), d.param(rows, o), d.param(1, o))
    scale = d.pick("", ", alpha=0.5", ", beta=2.0", ", alpha=0.5, beta=0.3")
    return f"torch.addmm({bias}, {h}, {d.param(n, o)}{scale})"


def addmv(d: Draft, h: str) -> str:
    h, (rows, n) = shaped(d, h, 2)
    return d.pick(
        f"torch.addmv({d.param(rows)}, {h}, {d.param(n)})[:, None]",
        f"torch.mv({h}, {d.param(n)})[:, None]",
    )


def addr(d: Draft, h: str) -> str:
    h, (n,) = shaped(d, h, 1)
    o = d.size()
    if n > 12:
        raise Unfit
    return d.pick(
        f"torch.addr({d.param(n, o)}, {h}, {d.param(o)})[None]",
        f"torch.outer({h}, {d.param(o)})[None]",
        f"torch.outer({d.param(o)}, {h})[None]",
        f"torch.kron({h}, {d.param(o)})[None]",
        f"torch.cartesian_prod({h}, {d.param(o)})[None]",
    )  # fmt: skip


def bmm(d: Draft, h: str) -> str:
    h, (_, t, n) = shaped(d, h, 3)
    o = d.size()
    return d.pick(
        f"torch.bmm({h}, {d.param(1, n, o)})",
        f"torch.bmm({d.param(1, o, t)}, {h})",
        f"torch.bmm({h}.transpose(0, 1), {d.param(t, n, o)}).transpose(0, 1)",
        f"torch.bmm({h}, {h}.mT)",
    )


def baddbmm(d: Draft, h: str) -> str:
    h, (_, t, n) = shaped(d, h, 3)
    o = d.size()
    bias = d.pick(d.param(1, t, o), d.param(t, o), d.param(o), d.param(1, 1, o))
    scale = d.pick("", ", alpha=0.5", ", beta=2.0")
    if bias.count("(") == 0 and d.coin():
        return f"torch.addbmm({d.param(t, o)}, {h}, {d.param(1, n, o)})[None]"
    return f"torch.baddbmm({bias}, {h}, {d.param(1, n, o)}{scale})"


def einsum(d: Draft, h: str) -> str:
    h, (_, t, n) = shaped(d, h, 3)
    o = d.size()
    return d.pick(
        f"torch.einsum('bti,oi->bto', {h}, {d.param(o, n)})",
        f"torch.einsum('bti,ti->bt', {h}, {d.param(t, n)})",
        f"torch.einsum('bti,tio->bto', {h}, {d.param(t, n, o)})",
        f"torch.einsum('...i,i->...i', {h}, {d.param(n)})",
        f"torch.einsum('bti,ij,btj->bt', {h}, {d.param(n, n)}, {h})",
        f"torch.einsum('bti,io->bo', {h}, {d.param(n, o)})",
        f"torch.einsum('bti,oi->bot', {h}, {d.param(o, n)})",
        f"torch.einsum('bti,ii->bti', {h}, {d.param(n, n)})",
    )


def tensordot(d: Draft, h: str) -> str:
    h, (_, t, n) = shaped(d, h, 3)
    o = d.size()
    return d.pick(
        f"torch.tensordot({h}, {d.param(n, o)}, dims=1)",
        f"torch.tensordot({h}, {d.param(t, n, o)}, dims=2)",
        f"torch.tensordot({h}, {d.param(o, t)}, dims=([1], [1]))",
        f"torch.inner({h}, {d.param(o, n)})",
        f"torch.linalg.multi_dot([{h}[0], {d.param(n, o)}, {d.param(o, n)}])[None]",
    )


def bilinear(d: Draft, h: str) -> str:
    n, o = d.shape(h)[-1], d.size()
    return f"F.bilinear({h}, {h}, {d.param(o, n, n)}, {d.maybe(o)})"


# ------------------------------------------------------------------------------------ convolutions


def convolution(axes: int) -> Operation:
    def apply(d: Draft, h: str) -> str:
        h, (_, channels, *sizes) = shaped(d, h, axes + 2)
        if not channels:  # which vmap does not know
            raise Unfit
        groups = channels if d.coin(0.3) else 1
        out = max(groups, 1) * d.rng.choice((1, 2))
        kernel = [d.rng.choice((1, 2, 3)) for _ in sizes]
        dilation, stride = d.rng.choice((1, 1, 2)), d.rng.choice((1, 1, 2))
        pad = d.pick("0", "1", "'same'" if stride == 1 else "1")
        w = d.param(out, channels // groups, *kernel)
        return (
            f"F.conv{axes}d({h}, {w}, {d.maybe(out)}, stride={stride}, padding={pad}, "
            f"dilation={dilation}, groups={groups})"
        )

    return apply


def transposed_convolution(axes: int) -> Operation:
    def apply(d: Draft, h: str) -> str:
        h, (_, channels, *sizes) = shaped(d, h, axes + 2)
        if not channels:  # which vmap does not know
            raise Unfit
        groups = channels if d.coin(0.3) else 1
        each = d.rng.choice((1, 2))
        kernel = [d.rng.choice((1, 2, 3)) for _ in sizes]
        stride = d.rng.choice((1, 2))
        extra = d.rng.choice((0, 1)) if stride == 2 else 0
        w = d.param(channels, each, *kernel)
        return (
            f"F.conv_transpose{axes}d({h}, {w}, {d.maybe(each * groups)}, stride={stride}, "
            f"padding={d.rng.choice((0, 0, 1))}, output_padding={extra}, groups={groups})"
        )

    return apply


def unfolded(d: Draft, h: str) -> str:
    h, (_, channels, *_) = shaped(d, h, 4)
    return f"({d.param(d.size(), 2 * channels)} @ F.unfold({h}, (2, 1), padding=1))"


# ----------------------------------------------------------------------------------- normalisation


def layer_norm(d: Draft, h: str) -> str:
    shape = d.shape(h)[-d.rng.choice((1, 1, 2)) :]
    if len(shape) == len(d.shape(h)):
        shape = shape[1:]
    if not shape or not any(n > 1 for n in shape):
        raise Unfit
    if d.coin(0.7):
        return f"F.layer_norm({h}, {shape}, {d.maybe(*shape)}, {d.maybe(*shape)})"
    return f"F.rms_norm({h}, {shape}, {d.maybe(*shape)})"


def channel_norm(d: Draft, h: str) -> str:
    # On more axes PyTorch's own backward pass of a batch norm is wrong for some strides, so it is no measure.
    h, (_, channels, *sizes) = shaped(d, h, 3)
    count = 1
    for n in sizes:
        count *= n
    if count < 2 or not channels:
        raise Unfit
    gain, bias = d.maybe(channels), d.maybe(channels)
    groups = d.rng.choice([n for n in range(1, channels + 1) if channels % n == 0])
    if d.coin(0.05):  # refused
        return f"F.batch_norm({h}, None, None, {gain}, {bias}, training=True)"
    return d.pick(
        f"F.group_norm({h}, {groups}, {gain}, {bias})",
        f"F.instance_norm({h}, weight={gain}, bias={bias})",
        f"F.batch_norm({h}, {d.constant(channels)}, {d.constant(channels)}.exp(), {gain}, {bias})",
        f"F.local_response_norm({h} * {d.param(channels, *[1] * len(sizes))}, 2)",
    )


def weight_norm(d: Draft, h: str) -> str:
    n, o = d.shape(h)[-1], d.size()
    return f"F.linear({h}, torch._weight_norm({d.param(o, n)}, {d.param(o, 1)}, 0))"


# --------------------------------------------------------------------------------------- embedding


def embedding(d: Draft, h: str) -> str:
    n = d.shape(h)[-1]
    table = d.param(WORDS, n)
    option = d.pick("", "", ", padding_idx=1", ", padding_idx=-2", ", scale_grad_by_freq=True")
    d.vectors.append(d.bind(f"F.embedding(ids, {table}{option})"))
    return f"({h} + {d.vectors[-1]}.mean(1).view(1, {', '.join(['1'] * (len(d.shape(h)) - 2) + [str(n)])}))"


def embedding_tied(d: Draft, h: str) -> str:
    n = d.shape(h)[-1]
    table = d.plain(WORDS, n)
    return f"(F.embedding(ids, {table}) @ {table}.mT)"


def embedding_bag(d: Draft, h: str) -> str:
    mode = d.pick("sum", "mean", "max")
    table = d.param(WORDS, d.size())
    options = d.pick("", ", padding_idx=1", "")
    if mode == "sum" and d.coin():
        weights = d.pick(d.constant(*d.shape("ids")), "ids.double()", d.param(*d.shape("ids")))
        options += f", per_sample_weights={weights}"
    if options == "" and mode != "max" and d.coin(0.3):
        options = ", scale_grad_by_freq=True"
    return f"F.embedding_bag(ids, {table}, mode='{mode}'{options})"


def one_hot(d: Draft, h: str) -> str:
    return f"(F.one_hot(ids, {WORDS}).double() @ {d.param(WORDS, d.size())})"


def chosen_rows(d: Draft, h: str) -> str:
    table = d.param(WORDS, d.size())
    return d.pick(
        f"{table}[ids]",
        f"{table}.index_select(0, ids.flatten())[None]",
        f"torch.index_select({table}, 0, ids[0])[None]",
        f"{table}.gather(0, ids[0, :1, None].expand(1, {d.shape(table)[1]}))",
        f"torch.take({table}, ids)",
        f"torch.take_along_dim({table}, ids[0, :, None], 0)[None]",
    )


# --------------------------------------------------------------------------------------- attention


def attention(d: Draft, h: str) -> str:
    h, (_, t, n) = shaped(d, h, 3)
    o = d.size()
    q, k = f"({h} @ {d.param(n, o)})", f"({h} @ {d.param(n, o)})"
    v = d.pick(h, f"F.linear({h}, {d.param(o, n)})")
    option = d.pick("", ", is_causal=True", f", attn_mask={d.param(t, t)}", ", scale=0.3")
    return f"F.scaled_dot_product_attention({q}, {k}, {v}{option})"


def attention_by_hand(d: Draft, h: str) -> str:
    h, (_, _, n) = shaped(d, h, 3)
    return f"(({h} @ {d.param(n, n)} @ {h}.mT).softmax(-1) @ {h})"


def multi_head(d: Draft, h: str) -> str:
    h, (_, t, n) = shaped(d, h, 3)
    heads = d.rng.choice([k for k in range(1, max(n, 1) + 1) if n % k == 0])
    if not n or not t:
        raise Unfit
    h = d.bind(f"{h}.transpose(0, 1)")
    return (
        f"F.multi_head_attention_forward({h}, {h}, {h}, {n}, {heads}, {d.param(3 * n, n)}, "
        f"{d.maybe(3 * n)}, None, None, False, 0.0, {d.param(n, n)}, {d.maybe(n)}, "
        f"need_weights={d.coin()})[0].transpose(0, 1)"
    )


# --------------------------------------------------------------------------------------- recurrent


def cell(d: Draft, h: str) -> str:
    h, (rows, n) = shaped(d, h, 2)
    o = d.rng.choice((1, 2, 3))
    kind, gates = d.rng.choice((("gru", 3), ("lstm", 4), ("rnn_tanh", 1)))
    state = f"{d.param(1, o)}.expand({rows}, {o})" if d.coin() else f"{h}.new_zeros({rows}, {o})"
    w = f"{d.param(gates * o, n)}, {d.param(gates * o, o)}"
    w += f", {d.param(gates * o)}, {d.param(gates * o)}" if d.coin() else ""
    if kind == "lstm":
        return f"torch.lstm_cell({h}, ({state}, {state}), {w})[{d.rng.randrange(2)}]"
    return f"torch.{kind}_cell({h}, {state}, {w})"


def recurrent_layer(d: Draft, h: str) -> str:
    h, (_, t, n) = shaped(d, h, 3)
    if not t:
        raise Unfit
    o = d.rng.choice((1, 2, 3))
    kind, gates = d.rng.choice((("gru", 3), ("lstm", 4), ("rnn_tanh", 1)))
    bias = d.coin()
    both = d.coin(0.3)
    w = []
    for _ in range(1 + both):
        w += [d.param(gates * o, n), d.param(gates * o, o)]
        w += [d.param(gates * o), d.param(gates * o)] if bias else []
    state = f"{h}.new_zeros({1 + both}, 1, {o})"
    state = f"({state}, {state})" if kind == "lstm" else state
    return f"torch.{kind}({h}, {state}, [{', '.join(w)}], {bias}, 1, 0.0, False, {both}, True)[0]"


def unrolled(d: Draft, h: str) -> str:
    h, (_, t, n) = shaped(d, h, 3)
    if not 0 < t < 6:
        raise Unfit
    w = d.param(n, n)
    state = d.bind(f"{h}[:, 0]")
    states = [state]
    for step in range(1, t):
        states.append(d.bind(f"(F.linear({states[-1]}, {w}) + {h}[:, {step}]).tanh()"))
    return f"torch.stack([{', '.join(states)}], 1)"


LAYERS: list[Operation] = [
    linear, linear, linear, twice, matmul, matmul, matmul_left, matmul_batched, vector, addmm,
    addmv, addr, bmm, baddbmm, einsum, einsum, tensordot, bilinear,
    convolution(1), convolution(1), convolution(2), convolution(3), transposed_convolution(1),
    transposed_convolution(2), transposed_convolution(3), unfolded, layer_norm, layer_norm,
    channel_norm, channel_norm, weight_norm, embedding, embedding, embedding_tied, embedding_bag,
    embedding_bag, one_hot, chosen_rows, attention, attention_by_hand, multi_head, cell, cell,
    recurrent_layer, unrolled,
]  # fmt: skip
