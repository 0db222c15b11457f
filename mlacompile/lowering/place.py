"""Stage 8, first half: every op of ours gets its kernel, and products of one row the form that is fast."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import GraphModule, Node

from mlacompile.lowering.absorb_and_write import absorb_and_write
from mlacompile.lowering.cache_writes import place_cache_writes
from mlacompile.lowering.cpu_rows import place_cpu_rows
from mlacompile.lowering.drop_spent import drop_spent
from mlacompile.lowering.experts import place_experts
from mlacompile.lowering.heads_quantized import quantize_heads
from mlacompile.lowering.inline import inline_references
from mlacompile.lowering.norm_behind import norms_behind_products
from mlacompile.lowering.quantized_rows import place_quantized_rows
from mlacompile.lowering.read_early import read_early
from mlacompile.lowering.select import decode_nodes, place_kernels, select
from mlacompile.lowering.share_bounds import share_bounds
from mlacompile.lowering.single_row import place_head_products, place_row_products
from mlacompile.lowering.stack_products import stack_products
from mlacompile.lowering.store_once import store_before_spreading
from mlacompile.lowering.sum_beside import sum_beside_rows
from mlacompile.lowering.tidy import tidy


def place(
    gm: GraphModule, wanted: str, notes: list[str], constant: Collection[Node] = (), *, fused: bool = True
) -> dict[Node, tuple[str, list[str]]]:
    """Choose kernels and write the choices into a rewritten graph.

    Args:
        wanted: the option ``kernel``. notes: receives what a user should know beyond single ops.
        constant: the inputs that nobody writes while the graph runs.
        fused: whether Inductor compiles the graph.
    Returns:
        For each ``mla_decode`` node the name of its kernel, and why each better one was passed over.
    """
    tidy(gm)  # first: it changes the layout of what a kernel is asked whether it takes it
    share_bounds(gm)
    if wanted == "auto" and (layers := place_cache_writes(gm)):
        gm.graph.eliminate_dead_code()
        notes.append(f"{layers} layers norm, rotate and store what a step caches in one launch each")
    chosen = {node: select(node, wanted) for node in decode_nodes(gm)}
    place_kernels(gm, {node: kernel for node, (kernel, _) in chosen.items()})
    if chosen and wanted == "auto" and (placed := place_quantized_rows(gm)):
        gm.graph.eliminate_dead_code()
        notes.append(f"rows are quantized with what stands before them in one pass, at {placed} places")
    inline_references(gm)
    if wanted == "auto" and (placed := place_experts(gm)):
        notes.append(f"{placed} products of experts in FP8 find the rows of each expert on the device")
    if chosen and wanted == "auto":
        place_cpu_rows(gm, fused=fused)
        gm.graph.eliminate_dead_code()  # what nobody uses must not stand between a product and what follows it
        if placed := place_row_products(gm, constant) + place_head_products(gm, constant):
            notes.append(f"{placed} products with a single row read their weights by kernels made for that")
        if placed := stack_products(gm):
            notes.append(f"{placed} pairs of FP8 products of the same rows are one launch each")
        if placed := norms_behind_products(gm):
            notes.append(f"the root of a norm is a factor behind the FP8 product of its rows, at {placed} places")
        if placed := sum_beside_rows(gm):
            notes.append(f"parts of {placed} products are added up where some of their columns are quantized")
        if placed := absorb_and_write(gm):
            notes.append(f"{placed} layers absorb their queries in the launch that stores what they cache")
        if placed := quantize_heads(gm):
            notes.append(f"{placed} absorbed products leave what they make of each head in FP8")
    gm.graph.eliminate_dead_code()
    if placed := drop_spent(gm):
        notes.append(f"{placed} kernels drop from L2 what was made for them, when they have read it")
    store_before_spreading(gm)
    read_early(gm)
    gm.graph.lint()
    gm.recompile()
    return chosen
