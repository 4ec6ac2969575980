"""A traced decoder layer of up to sixteen new tokens, put together again from few operations.

Compiled or not, such a layer is a dozen small kernels, and each begins when the one before it has ended. Here products
of one input become one operation that takes along the norm before it, the gate's activation and the sum behind it; and
rotary embedding, the new slots and attention become another. On a GPU each is one to three kernels that read weights
before it is their turn (matvec.py, few_rows.py, attend_few.py, attend_one.py). What is not as expected stays as it was,
node by node.

The operations, of [rows, new tokens, …] each, sixteen tokens in all at most:
linear, norm: nn.Linear and RMSNorm (plus: times 1 + weight), as they are traced; taken apart again where they stay.
product: concatenated (or, with `act`, act(first) · second) weights · norm(x); with `post` and `residual`, x is
    residual + post-norm(x) first, which then follows in the same tensor; `added` is added at the end.
attend: of heads q, k, v [rows, new, heads · dim], normed and turned, over the slots with the new ones, which are
    written. Slots: different within a row, below view; a token sees its own.
attention: the same of what is turned and written already, [rows, heads, new, dim].
attended: attend, then product with one weight.
join: residual + norm(x).
ahead: what comes next waits before it reads any result, so that it may begin before this one's turn has come. STORED:
    and the weights of the layer's gate and of what comes behind it wait in shared memory (small.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.test_operators  # realize
from torch import Tensor, fx
from torch.nn import functional

library = torch.library.Library("specbeam", "DEF")
library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
library.define("norm(Tensor x, Tensor weight, float eps, bool plus) -> Tensor")
library.define("product(Tensor x, Tensor? post, Tensor? residual, Tensor? norm, float eps, bool plus, "
               "Tensor[] weights, Tensor?[] biases, str act, Tensor? added, int ahead) -> Tensor")
library.define("attend(Tensor q, Tensor k, Tensor v, Tensor? q_norm, Tensor? k_norm, float eps, bool plus, Tensor cos, "
               "Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor slot, int view, Tensor mask, float scale, "
               "int ahead) -> Tensor")
library.define("attended(Tensor q, Tensor k, Tensor v, Tensor? q_norm, Tensor? k_norm, float eps, bool plus, "
               "Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor slot, int view, Tensor mask, "
               "float scale, Tensor weight, Tensor? bias, Tensor? added, int ahead) -> Tensor")
library.define("join(Tensor x, Tensor weight, Tensor residual, float eps, bool plus, int ahead) -> Tensor")
library.define("attention(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor")
ops = torch.ops.specbeam

Node = Any  # an fx.Node: what its arguments are is known here, not to mypy
MOST_WEIGHTS, MOST_TOKENS = 3, 16
STORED = 2  # of ahead
_ACTIVATIONS: dict[Any, str] = {functional.silu: "silu", functional.relu: "relu", torch._C._nn.gelu: "gelu"}
_DTYPES = {torch.bfloat16, torch.float16, torch.float32}
_VIEWS = {"view", "reshape", "transpose", "contiguous", "unsqueeze"}


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As inductor runs one row fastest: the input computed once, not again for every output, and a bias added to the
    sum in its kernel instead of choosing a library's."""
    if x.numel() != x.shape[-1]:
        return functional.linear(x, weight, bias)
    output = functional.linear(torch.ops._inductor_test.realize(x), weight)
    return output if bias is None else output + bias


def _norm(x: Tensor, weight: Tensor, eps: float, plus: bool) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (1.0 + weight.float())).type_as(x) if plus else weight * wide.to(x.dtype)


def _product(x: Tensor, post: Tensor | None, residual: Tensor | None, norm: Tensor | None, eps: float, plus: bool,
             weights: list[Tensor], biases: list[Tensor | None], act: str, added: Tensor | None, ahead: int
             ) -> Tensor:
    if post is not None and residual is not None:
        x = residual + _norm(x, post, eps, plus)
    hidden = x if norm is None else _norm(x, norm, eps, plus)
    out = [functional.linear(hidden, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    if act:
        out = [activate(act, out[0]) * out[1]]
    if added is not None:
        out = [added + out[0]]
    return torch.cat(out + [x] * (post is not None), -1)


def activate(name: str, x: Tensor) -> Tensor:
    if name.startswith("gelu"):
        return functional.gelu(x, approximate=name.partition("_")[2] or "none")
    return getattr(functional, name)(x)


def _attend(q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, plus: bool,
            cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slot: Tensor, view: int, mask: Tensor, scale: float,
            ahead: int) -> Tensor:
    [rows, new], dim = slot.shape, keys.shape[3]
    q, k, v = (one.reshape(rows, new, -1, dim).transpose(1, 2) for one in (q, k, v))
    q, k = q if q_norm is None else _norm(q, q_norm, eps, plus), k if k_norm is None else _norm(k, k_norm, eps, plus)
    cos, sin = cos.view(rows, 1, new, dim), sin.view(rows, 1, new, dim)
    q, k = (one * cos + torch.cat((-one[..., dim // 2 :], one[..., : dim // 2]), -1) * sin for one in (q, k))
    every = torch.arange(rows, device=slot.device)[:, None]
    keys[every, :, slot] = k.transpose(1, 2)
    values[every, :, slot] = v.transpose(1, 2)
    return _attention(q, keys[:, :, :view], values[:, :, :view], mask, scale)


def _attended(q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, plus: bool,
              cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slot: Tensor, view: int, mask: Tensor,
              scale: float, weight: Tensor, bias: Tensor | None, added: Tensor | None, ahead: int) -> Tensor:
    x = _attend(q, k, v, q_norm, k_norm, eps, plus, cos, sin, keys, values, slot, view, mask, scale, ahead)
    return _product(x.flatten(2), None, None, None, 0.0, False, [weight], [bias], "", added, ahead)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    return functional.scaled_dot_product_attention(
        query, key, value, mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]).transpose(1, 2).contiguous()


def _join(x: Tensor, weight: Tensor, residual: Tensor, eps: float, plus: bool, ahead: int) -> Tensor:
    return residual + _norm(x, weight, eps, plus)


def _on_gpu(name: str, reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(x: Tensor, *args: Any) -> Tensor:
        from specbeam.runners import attend_few, attended, few_rows, matvec

        if name == "attended":
            return attended.attended(x, *args)
        if name in ("attend", "attention"):
            return getattr(attend_few, name)(x, *args)
        if _tokens(x) == 1:
            return getattr(matvec, name)(x, *args)
        return (getattr(few_rows, name) if few(x) else reference)(x, *args)
    return call


def _tokens(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def few(x: Tensor) -> bool:
    """Whether the products of several tokens [..., columns] are for these operations: in fp32 the tensor cores are
    not."""
    return _tokens(x) == 1 or (_tokens(x) <= MOST_TOKENS and (x.dtype != torch.float32 or not x.is_cuda))


library.impl("linear", _linear, "CompositeImplicitAutograd")
library.impl("norm", _norm, "CompositeImplicitAutograd")
for _name, _reference in (("product", _product), ("attend", _attend), ("attention", _attention), ("join", _join),
                          ("attended", _attended)):
    library.impl(_name, _reference, "CPU")
    library.impl(_name, _on_gpu(_name, _reference), "CUDA")


@torch.library.register_fake("specbeam::product")
def _(x, post, residual, norm, eps, plus, weights, biases, act, added, ahead):
    size = len(weights[0]) if act else sum(len(weight) for weight in weights)
    return weights[0].new_empty(*x.shape[:-1], size + (x.shape[-1] if post is not None else 0))


@torch.library.register_fake("specbeam::attend")
def _(q, k, v, q_norm, k_norm, eps, plus, cos, sin, keys, values, slot, view, mask, scale, ahead):
    return q.new_empty(*slot.shape, q.numel() // slot.numel() // keys.shape[3], keys.shape[3])


@torch.library.register_fake("specbeam::attended")
def _(q, k, v, q_norm, k_norm, eps, plus, cos, sin, keys, values, slot, view, mask, scale, weight, bias, added, ahead):
    return q.new_empty(*slot.shape, len(weight))


@torch.library.register_fake("specbeam::attention")
def _(query, key, value, mask, scale):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])


@torch.library.register_fake("specbeam::join")
def _(x, weight, residual, eps, plus, ahead):
    return torch.empty_like(residual, memory_format=torch.contiguous_format)


def fuse(graph: fx.Graph) -> None:
    """In place. The graph: of one layer, as dynamo traced it."""
    for node in [one for one in _nodes(graph) if one.target is ops.attention.default]:
        _fuse_attention(graph, node)
    _erase_dead(graph)
    done: set[Node] = set()
    for node in [one for one in _nodes(graph) if one.target is ops.linear.default]:
        if node in done:
            continue
        group = [one for one in node.args[0].users if one.target is ops.linear.default]
        done.update(group)
        _fuse_products(graph, group)
    _erase_dead(graph)
    for node in [one for one in _nodes(graph) if _is(one, operator.add)]:
        _fuse_join(graph, node)
    _erase_dead(graph)
    for node in [one for one in _nodes(graph) if one.target is ops.product.default]:
        _fuse_attended(graph, node)
    _erase_dead(graph)
    if all(_is_ours(node) for node in graph.nodes):
        ahead = STORED if _stores(graph) else 1
        for node in _nodes(graph):
            if _is_ours(node, views=False):
                node.args = (*node.args[:-1], ahead)
    graph.lint()


def _stores(graph: fx.Graph) -> bool:
    """Whether the weights of this layer's gate and of what comes behind it can wait in a GPU's shared memory."""
    from specbeam.runners.small import stores

    gates = [node for node in _nodes(graph) if node.target is ops.product.default and node.args[8]]
    return len(gates) == 1 and stores(_value(gates[0].args[6][0]))


def _nodes(graph: fx.Graph) -> list[Node]:
    return list(graph.nodes)


def _is_ours(node: Node, views: bool = True) -> bool:
    if node.target in (ops.product.default, ops.attend.default, ops.attended.default, ops.join.default):
        return True
    return views and (node.op in ("placeholder", "output") or _is(node, operator.getitem)
                      or (_is_view(node) and not _copies(node)))


def _is_view(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target in _VIEWS


def _copies(node: Node) -> bool:
    """Whether what looks like a view may have to move something, which then is no kernel of ours."""
    x = _value(node.args[0])
    if x is None or not x.is_contiguous():
        return True
    if node.target == "transpose":
        return all(x.shape[dim] > 1 for dim in node.args[1:])
    return _is(node.args[0], operator.getitem) and _tokens(x) > 1  # a part of each token's numbers


def _is(node: Any, target: Any) -> bool:
    same = {operator.add: (operator.add, operator.iadd, torch.add), operator.mul: (operator.mul, torch.mul)}
    return (isinstance(node, fx.Node) and node.op == "call_function" and node.target in same.get(target, (target,))
            and not (node.kwargs and target in same))


def _value(node: Any) -> Any:
    return node.meta.get("example_value")


def _only(node: Node, *users: Node) -> bool:
    return set(node.users) == set(users)


def _erase_dead(graph: fx.Graph) -> None:
    """What only reads and is not read itself."""
    for node in reversed(_nodes(graph)):
        writes = node.target in (ops.attend.default, ops.attended.default)
        pure = ((_is_ours(node) and not writes) or _is_view(node) or _is(node, operator.add) or _is(node, operator.mul)
                or node.target in (torch.cat, operator.neg, ops.norm.default, ops.linear.default, *_ACTIVATIONS))
        if not node.users and pure and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _fuse_products(graph: fx.Graph, group: list[Node]) -> None:
    x: Any = group[0].args[0]
    weights, biases = [node.args[1] for node in group], [node.args[2] for node in group]
    shapes, columns = [_value(weight).shape for weight in weights], _value(weights[0]).shape[1]
    if (len(group) > MOST_WEIGHTS or _value(x).dtype not in _DTYPES or _value(x).dim() != 3
            or columns % 8 or any(shape[0] % 8 for shape in shapes)
            or any(_value(one).dtype != _value(x).dtype for one in (*weights, *biases) if one is not None)
            or any(one.op != "placeholder" for one in (*weights, *biases) if one is not None)):
        return
    before: tuple = (x, None, None, None, 0.0, False)
    hidden: Any = None
    if (x.target is ops.norm.default and _value(x.args[1]).numel() == columns and x.args[1].op == "placeholder"
            and _value(x.args[1]).dtype == _value(x.args[0]).dtype == _value(x).dtype):
        hidden, weight, eps, plus = x.args
        before = (hidden, None, None, weight, eps, plus)
        if _is(hidden, operator.add):
            residual, normed = hidden.args
            if (getattr(normed, "target", None) is ops.norm.default and normed.args[2:] == (eps, plus)
                    and _only(normed, hidden) and _value(residual).shape == _value(normed).shape
                    and normed.args[1].op == "placeholder"
                    and _value(normed.args[1]).dtype == _value(residual).dtype == _value(x).dtype):
                before = (normed.args[0], normed.args[1], residual, weight, eps, plus)
    act, ends, added = "", group, None
    if len(group) == 2 and shapes[0] == shapes[1] and (gated := _gate(*group)):
        act, group, last = gated
        weights, biases, ends = [one.args[1] for one in group], [one.args[2] for one in group], [last]
    elif len(group) == 1 and len(group[0].users) == 1:
        [last] = group[0].users
        if _is(last, operator.add) and last.args[0] is not last.args[1]:
            other = last.args[0] if last.args[1] is group[0] else last.args[1]
            if (isinstance(other, fx.Node) and _value(other).dtype == _value(last).dtype == _value(group[0]).dtype
                    and _value(other).shape == _value(last).shape == _value(group[0]).shape):
                added, ends = other, [last]
    at = ends[0] if before[1] is None else group[0]
    if before[1] is not None and added is not None:
        return
    with graph.inserting_before(at if before[1] is None else hidden):
        made = graph.call_function(ops.product.default, (*before, weights, biases, act, added, 0))
    sizes = [shapes[0][0]] if act else [shape[0] for shape in shapes]
    start = 0
    with graph.inserting_after(made):
        for end, size in zip(ends, sizes, strict=True):
            whole = len(ends) == 1 and before[1] is None
            end.replace_all_uses_with(made if whole else _slice(graph, made, start, start + size, _value(end)))
            start += size
        if before[1] is not None:
            hidden.replace_all_uses_with(_slice(graph, made, start, start + columns, _value(hidden)),
                                         delete_user_cb=lambda user: user is not x)
    made.meta["example_value"] = _value(ends[0]) if len(ends) == 1 and before[1] is None else None


def _slice(graph: fx.Graph, node: Node, start: int, stop: int, like: Any) -> Node:
    place: Any = (Ellipsis, slice(start, stop))
    part = graph.call_function(operator.getitem, (node, place))
    part.meta["example_value"] = like
    return part


def _gate(a: Node, b: Node) -> tuple[str, list[Node], Node] | None:
    """act(gate) · up: the activation's name, the two in that order, and the product."""
    for gate, up in ((a, b), (b, a)):
        if len(gate.users) != 1 or len(up.users) != 1:
            continue
        [act], [last] = gate.users, up.users
        name = _ACTIVATIONS.get(act.target)
        given = {**act.kwargs}
        given.pop("inplace", None)
        if name == "gelu" and given.pop("approximate", "none") == "tanh":
            name = "gelu_tanh"
        if name and not given and len(act.args) == 1 and _is(last, operator.mul) and _only(act, last):
            return name, [gate, up], last
    return None


def _fuse_join(graph: fx.Graph, node: Node) -> None:
    """residual + norm(x), where no product took it along."""
    residual, normed = node.args
    if (getattr(normed, "target", None) is not ops.norm.default or not _only(normed, node)
            or not isinstance(residual, fx.Node) or _value(normed) is None
            or _value(residual).shape != _value(normed).shape or not few(_value(normed))
            or _value(residual).dtype != _value(normed).dtype
            or _value(normed).shape[-1] != _value(normed.args[1]).numel()
            or _value(normed.args[1]).dtype != _value(normed).dtype or _value(normed).dtype not in _DTYPES):
        return
    x, weight, eps, plus = normed.args
    with graph.inserting_before(node):
        made = graph.call_function(ops.join.default, (x, weight, residual, eps, plus, 0))
    made.meta["example_value"] = _value(node)
    node.replace_all_uses_with(made)


def _fuse_attended(graph: fx.Graph, node: Node) -> None:
    """Of one token: there it saves a kernel."""
    x, post, _, norm, _, _, weights, biases, act, added, _ = node.args
    made = _bare(x)
    if (made.target is not ops.attend.default or post is not None or norm is not None or act or len(weights) > 1
            or _value(made.args[11]).numel() > 1):
        return
    chain = [x]
    while chain[-1] is not made:
        chain.append(chain[-1].args[0])
    if any(len(one.users) > 1 for one in chain):
        return
    with graph.inserting_before(node):
        both = graph.call_function(ops.attended.default, (*made.args[:-1], *weights, *biases, added, 0))
    both.meta["example_value"] = _value(node)
    node.replace_all_uses_with(both)
    graph.erase_node(node)
    for gone in chain:
        graph.erase_node(gone)


def _fuse_attention(graph: fx.Graph, node: Node) -> None:
    query, key, value, mask, scale = node.args
    if not (_is(key, operator.getitem) and _is(value, operator.getitem)):
        return
    keys, values, view = key.args[0], value.args[0], key.args[1][2].stop
    new_k, new_v = _written(keys), _written(values)
    if new_k is None or new_v is None:
        return
    written = _bare(new_k.args[2])
    q, k = _turn(query), _turn(written)
    v = _bare(new_v.args[2])
    if q is None or k is None or q[1:3] != k[1:3] or q[4:6] != k[4:6] or (q[3] is None) != (k[3] is None):
        return
    slot = new_k.args[1][2]
    if (slot is not new_v.args[1][2] or new_k.args[1][0] is not new_v.args[1][0]
            or _value(slot).dim() != 2 or _value(slot).numel() > MOST_TOKENS
            or _value(v).dtype != _value(keys).dtype or _value(keys).dtype not in _DTYPES):
        return
    cos, sin = q[1:3]
    if any(_value(one).dtype != _value(keys).dtype for one in (cos, sin, q[0], k[0]) if one is not None):
        return
    [rows, new], dim = _value(slot).shape, _value(keys).shape[3]
    if (_value(keys).shape[0] != rows or _value(new_k.args[1][0]).shape != (rows, 1)
            or _value(cos).shape[-2:] != (new, dim) or _value(mask).shape != (rows, 1, new, view)
            or any(_value(one).numel() != rows * new * dim for one in (cos, sin))
            or any(_value(one[3]).numel() != dim for one in (q, k) if one[3] is not None)):
        return
    of_heads, of_dims = ((rows, new, -1, dim), (0, 2, 1, 3)), ((rows, 1, new, dim), (0, 1, 2, 3))
    moved = [(q[0], q[6], *of_heads), (k[0], k[6], *of_heads), (v, new_v.args[2], of_heads[0], (0, 1, 2, 3)),
             (written, new_k.args[2], (rows, -1, new, dim), (0, 2, 1, 3)),
             *((one, end, *of_dims) for one, end in ((cos, q[7]), (sin, q[8]), (cos, k[7]), (sin, k[8])))]
    if not all(_moves(*one) for one in moved):
        return
    eps, plus = q[4:6]
    with graph.inserting_before(node):
        made = graph.call_function(ops.attend.default, (
            q[0], k[0], v, q[3], k[3], eps, plus, cos, sin, keys, values, slot, view, mask, scale, 0))
    made.meta["example_value"] = _value(node)
    node.replace_all_uses_with(made)
    for gone in (node, key, value, new_k, new_v):
        graph.erase_node(gone)


def _written(slots: Any) -> Node | None:
    """Where the new slot is written, if that and a look at the slots is all that is done with them."""
    users = list(slots.users)
    written = [one for one in users if _is(one, operator.setitem)]
    return written[0] if slots.op == "placeholder" and len(users) == 2 and len(written) == 1 else None


def _bare(node: Any) -> Any:
    """Without views of it: with one token none of them moves anything, with more `_moves` says what they do."""
    while _is_view(node):
        node = node.args[0]
    return node


def _moves(base: Node, end: Node, shape: tuple[int, ...], order: tuple[int, ...]) -> bool:
    """Whether the views (and norms) from `base` to `end` do what base.view(shape).permute(order) does."""
    between, node = [], end
    while node is not base:
        between.append(node)
        node = node.args[0]
    numbers = torch.arange(_value(base).numel())
    index = numbers.view(_value(base).shape)
    for node in reversed(between):
        if node.target is not ops.norm.default:
            if node.kwargs or node.all_input_nodes != [node.args[0]]:
                return False
            index = getattr(index, node.target)(*node.args[1:])
    wanted = numbers.view(shape).permute(order)
    return index.shape == wanted.shape and torch.equal(index, wanted)


def _turn(node: Any) -> tuple | None:
    """q · cos + rotate_half(q) · sin: what is turned, cos, sin, the weight of a norm before it, its eps and plus; and
    the three as they are multiplied."""
    if not _is(node, operator.add) or not all(_is(one, operator.mul) for one in node.args):
        return None
    (x, cos), (turned, sin) = node.args[0].args, node.args[1].args
    if (not _is(turned, torch.cat) or turned.kwargs.get("dim", (*turned.args, None)[1]) != -1
            or len(turned.args[0]) != 2):
        return None
    low, high = turned.args[0]
    if not _is(low, operator.neg) or not all(_is(one, operator.getitem) for one in (low.args[0], high)):
        return None
    half = _value(x).shape[-1] // 2
    if (low.args[0].args != (x, (Ellipsis, slice(half, None, None)))
            or high.args != (x, (Ellipsis, slice(None, half, None)))):
        return None
    end, x = x, _bare(x)
    norm: tuple = (None, 0.0, False)
    if x.target is ops.norm.default:
        if x.args[1].op != "placeholder" or _value(x.args[1]).dtype != _value(x).dtype:
            return None
        norm, x = x.args[1:], _bare(x.args[0])
    return x, _bare(cos), _bare(sin), *norm, end, cos, sin
