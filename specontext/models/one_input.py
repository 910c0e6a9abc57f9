"""Products with quantised matrices that have their input in common, made into one: an attention's three projections, and the two
that an MLP begins with.

With one row of x a product takes a few microseconds to begin and to end, as long as reading its matrix does.
"""

from __future__ import annotations

from collections.abc import Hashable
from operator import getitem

import torch
from torch.fx import Graph, GraphModule, Node

from specontext.kernels.quantized_linear import quantized_linear, quantized_linears  # noqa: F401  # both are registered by it

PRODUCT = torch.ops.specontext.quantized_linear.default
PRODUCTS = torch.ops.specontext.quantized_linears.default


def share_launches(module: GraphModule) -> GraphModule:
    """The same graph, changed in place, with `quantized_linears` where several `quantized_linear` are alike."""
    graph = module.graph
    alike: dict[Hashable, list[Node]] = {}
    for node in graph.find_nodes(op="call_function", target=PRODUCT):
        if not node.kwargs and all(_is_given(part) for part in node.args[1:6]):
            alike.setdefault(_kind(node), []).append(node)
    for nodes in alike.values():
        if len(nodes) > 1:
            _merge(graph, nodes)
    module.recompile()
    return module


def _is_given(part: object) -> bool:
    """Whether it is there from the beginning: an input of the graph, or nothing."""
    return part is None or (isinstance(part, Node) and part.op in ("placeholder", "get_attr"))


def _kind(node: Node) -> Hashable:
    """What products have in common that can be one; the node itself where it can be with no other."""
    x, codes, scales, zeros, order, bias, kind, rows, columns, offset = node.args
    if order is not None:
        return node
    width, table = (_shape(one) for one in (codes, scales))
    same_rows = rows if table[0] > 1 else None  # one line of scales is for all rows, however many these are
    return x, width[1], table[1], zeros is None, bias is None, kind, same_rows, columns, offset


def _shape(node: object) -> torch.Size:
    assert isinstance(node, Node)
    shape = node.meta["example_value"].shape
    assert isinstance(shape, torch.Size)
    return shape


def _merge(graph: Graph, nodes: list[Node]) -> None:
    x, _, _, zeros, _, bias, kind, _, columns, offset = nodes[0].args
    lists = [[node.args[place] for node in nodes] for place in range(10)]
    widths = [_shape(node.args[1])[0] for node in nodes]
    with graph.inserting_before(nodes[0]):
        arguments = (x, lists[1], lists[2], lists[3] if zeros is not None else [], lists[5] if bias is not None else [])
        made = graph.call_function(PRODUCTS, (*arguments, kind, lists[7], columns, offset))
        split = graph.call_function(torch.split, (made, widths, -1))
        parts = [graph.call_function(getitem, (split, place)) for place in range(len(nodes))]
    for node, part in zip(nodes, parts, strict=True):
        node.replace_all_uses_with(part)
        graph.erase_node(node)
