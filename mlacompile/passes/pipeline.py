"""The passes in their order, and what each leaves behind for the report and the dump folder."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx import GraphModule, Node

from mlacompile.errors import RefusedSiteError
from mlacompile.gate import Gate
from mlacompile.logs import dump_graph, log
from mlacompile.options import Options
from mlacompile.passes.absorb import refuse
from mlacompile.passes.axes import CONSTANT, shape_of
from mlacompile.passes.canonicalize import attention_nodes, canonicalize_softmax, opaque_attention, restore
from mlacompile.passes.cone import dynamic_nodes
from mlacompile.passes.flexible import open_flexible
from mlacompile.passes.forms import Choice, choose_form
from mlacompile.passes.hoist import Hoisted, hoist
from mlacompile.passes.join_heads import join_heads
from mlacompile.passes.keep_latents import keep_latents
from mlacompile.passes.merged import give_four_axes
from mlacompile.passes.quantize import Policy, quantize
from mlacompile.passes.read_stored import read_stored
from mlacompile.passes.recognize import MLASite, Recognizer, Refusal, internal_error, source_position
from mlacompile.passes.reproduce import write_reproducer
from mlacompile.passes.see_through import put_back, see_through
from mlacompile.passes.share import share_heads
from mlacompile.passes.source import source_of
from mlacompile.passes.stored import stored_layout
from mlacompile.passes.validate import Verdict, validate
from mlacompile.report import Product, Report, Site


@dataclass
class Pipeline:
    """One graph on its way from functional ATen to a graph that is rewritten, and ready to be lowered.

    parameters: for every placeholder of the graph, whether it holds a parameter or a constant buffer.
    untracked: for every placeholder, whether it was made in inference mode, where changes leave no trace.
    weights: placeholders that hold them, and are not written.
    hoisted, derived: what was taken out of the graph because it depends on weights alone, and examples of the inputs
    that the graph has instead. seed: of the random data that rewrites are checked on.
    slower_in_fp8: why a product of x and a weight is not faster in FP8, or None.
    reads_fp8: called like ``mla_decode``, whether a kernel takes an FP8 cache as it is stored.
    spoilt_in_fp8: why the weight at a position among the inputs would not survive FP8, or None.
    """

    options: Options
    parameters: Sequence[bool]
    name: str = "graph"
    sites: list[Site] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    rewritten: int = 0
    decodes: dict[Node, int] = field(default_factory=dict)  # mla_decode node -> index of its site
    hoisted: list[Hoisted] = field(default_factory=list)
    derived: list[Any] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    weights: set[Node] = field(default_factory=set)
    untracked: Sequence[bool] = ()
    seed: int = field(init=False)
    slower_in_fp8: Callable[[torch.Tensor, torch.Tensor], str | None] = lambda x, weight: None
    reads_fp8: Callable[..., bool] = lambda *args, **kwargs: True
    spoilt_in_fp8: Callable[[int], str | None] = lambda position: None

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(32) if self.options.seed is None else self.options.seed

    def run(self, gm: GraphModule) -> GraphModule:
        """Rewrite ``gm`` in place. What is not rewritten is as it was.

        Raises:
            RefusedSiteError: with ``strict=True``, when any attention op stays unrewritten for a reason other than
            its form.
        """
        dump_graph(self.options.dump, self.name, "2-functional", gm)
        with self.stage("canonicalize"):
            gm.graph = fx_graph_cse(gm.graph)  # functionalization reads one cache through several equal slices
            self.weights = weights = self._weights(gm)
            in_fp8 = see_through(gm.graph, dynamic_nodes(gm.graph, weights))
            self.rewritten += keep_latents(gm.graph, dynamic_nodes(gm.graph, weights))
            open_flexible(gm)
            left = canonicalize_softmax(gm.graph, dynamic_nodes(gm.graph, weights)) + opaque_attention(gm.graph)
            give_four_axes(gm.graph, dynamic_nodes(gm.graph, weights))
            join_heads(gm.graph)
            share_heads(gm.graph, (a for node in attention_nodes(gm.graph) for a in node.args[1:3]))  # type: ignore[misc]
            for node, reason in left:
                context = (shape_of(node) or ("unknown",))[-1]
                self._note(Site("refused", reason, source_of(node), context=str(context)))
        dump_graph(self.options.dump, self.name, "3-canonical", gm)
        with self.stage("recognize"):
            found = list(Recognizer(gm.graph, weights).find())
        self._rewrite(gm, found)
        put_back(gm.graph, in_fp8)
        with self.stage("read stored"):
            read_stored(gm.graph, self.reads_fp8)
        _remove_dead(gm)
        gm.graph.lint()
        gm.recompile()
        dump_graph(self.options.dump, self.name, "4-absorbed", gm)
        if self.options.strict:
            self._raise_refused()
        self._quantize(gm, weights)
        return gm

    def served(self, node: Node, kernel: str, passed: Sequence[str]) -> None:
        """Record what computes one ``mla_decode`` node, and why better kernels were passed over."""
        site = self.sites[self.decodes[node]]
        reason = site.reason if not passed else f"{site.reason}; passed over {' and '.join(passed)}"
        log.info("%s: attention at %s absorbed: %s, kernel %s", self.name, site.source, site.geometry, kernel)
        self.sites[self.decodes[node]] = replace(site, kernel=kernel, reason=reason)

    def report(self) -> Report:
        """What happened so far."""
        return Report(tuple(self.sites), tuple(self.notes), dict(self.seconds), tuple(self.products))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and log it."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            log.debug("%s: %s took %.3f s", self.name, name, spent)

    def _weights(self, gm: GraphModule) -> set[Node]:
        """Placeholders that hold weights: parameters and constant buffers, unless the graph writes to them."""
        placeholders = gm.graph.find_nodes(op="placeholder")
        written = {n.args[0] for n in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)}
        if len(placeholders) != len(self.parameters):
            self.notes.append("AOTAutograd rearranged the graph's inputs, so weights cannot be told from activations")
            return set()
        return {n for n, weight in zip(placeholders, self.parameters, strict=True) if weight and n not in written}

    def _rewrite(self, gm: GraphModule, found: Sequence[MLASite | Refusal]) -> None:
        verdicts: dict[Any, Verdict] = {}
        for site in found:
            if isinstance(site, Refusal):
                self._leave(site, site.reason)
                continue
            try:
                self._rewrite_site(site, verdicts)
            except Exception as error:  # one site must not cost the whole model its compilation
                log.exception("attention at %s could not be rewritten", source_position(site.attention))
                self._leave(site, internal_error(error))

    def _rewrite_site(self, site: MLASite, verdicts: dict[Any, Verdict]) -> None:
        reason = refuse(site)
        if reason is not None:
            self._leave(site, reason)
            return
        with self.stage("choose forms"):
            choice = choose_form(site, self.options)
        if choice.rewrite is None:
            self._leave(site, choice.why, choice.status, choice)
            return
        with self.stage("validate"):
            verdict = self._validate(site, choice, verdicts)
        if verdict is not None and not verdict.holds:
            self._leave(site, self._differs(site, choice, verdict), seed=self.seed)
            return
        with self.stage("absorb"):
            node = choice.rewrite(site, self.options)
        self.rewritten += 1
        if choice.form == "absorbed":
            self.decodes[node] = len(self.sites)
        self._note(_rewritten(site, choice, None if verdict is None else self.seed))

    def _differs(self, site: MLASite, choice: Choice, verdict: Verdict) -> str:
        """What a user should do about a rewrite that failed validation; writes it down where a folder was given."""
        reason = (
            f"the rewrite differs from the original by {verdict.error:.2e} (rounding explains {verdict.bound:.2e}): "
            "this is a bug in mlacompile, please report it with "
        )
        if self.options.dump is None or choice.rewrite is None:
            return (
                f"{reason}the dump folder (options={{'dump': FOLDER, 'seed': {self.seed}}}), which holds a reproducer"
            )
        folder = Path(self.options.dump) / self.name / f"refused-{len(self.sites)}"
        try:
            file = write_reproducer(folder, site, self.options, choice.rewrite, verdict, self.seed, choice.form)
        except Exception:
            log.exception("no reproducer could be written to %s", folder)
            return f"{reason}{self.options.dump}, and seed {self.seed}"
        return f"{reason}the reproducer {file}"

    def _quantize(self, gm: GraphModule, weights: set[Node]) -> None:
        """FP8 where it is asked for, and out of the graph what depends on weights alone."""
        if self.options.fp8 != "off":
            with self.stage("quantize"):
                products, remarks = quantize(gm.graph, weights, self._policy(gm))
            self.rewritten += sum(product.left is None for product in products)
            self.products += products
            self.notes += remarks
        with self.stage("hoist"):
            placeholders = gm.graph.find_nodes(op="placeholder")
            untracked = (n for n, silent in zip(placeholders, self.untracked, strict=False) if silent)
            self.hoisted, self.derived = hoist(gm, weights, frozenset(untracked))
        if self.options.fp8 != "off":
            dump_graph(self.options.dump, self.name, "5-quantized", gm)

    def _policy(self, gm: GraphModule) -> Policy:
        inputs = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
        return Policy(self._fp8(), self.slower_in_fp8, lambda weight: self.spoilt_in_fp8(inputs[weight]))

    def _fp8(self) -> str | Mapping[str, str] | Gate:
        asked = self.options.fp8
        if isinstance(asked, (str, Path)):
            return Gate.read(asked) if str(asked).endswith(".json") else str(asked)
        return asked

    def _validate(self, site: MLASite, choice: Choice, known: dict[Any, Verdict]) -> Verdict | None:
        if self.options.verify == "off" or choice.rewrite is None or not choice.reads_probe:
            return None
        order = {n: i for i, n in enumerate(site.cone.order)}
        key = (
            site.cone.signature(),
            order[site.attention.k],
            order[site.attention.v],
            site.attention.scale,
            choice.form,
        )
        if key not in known:
            known[key] = validate(site, self.options, self.seed, choice.rewrite)
        return known[key]

    def _leave(
        self,
        site: MLASite | Refusal,
        reason: str,
        status: str = "refused",
        choice: Choice | None = None,
        seed: int | None = None,
    ) -> None:
        attention = site.attention
        geometry = site.geometry if isinstance(site, MLASite) else None
        source = source_position(attention)
        lengths = {"queries": str(attention.queries), "context": str(attention.context)}
        self._note(Site(status, reason, source, geometry, **lengths, **_predicted(choice), seed=seed))  # type: ignore[arg-type]
        restore(attention.node)

    def _note(self, site: Site) -> None:
        log.info("%s: attention at %s %s: %s", self.name, site.source, site.status, site.reason)
        self.sites.append(site)

    def _raise_refused(self) -> None:
        refused = [s for s in self.sites if s.status == "refused"]
        if refused:
            lines = "\n".join(f"  {s.source}: {s.reason}" for s in refused)
            raise RefusedSiteError(f"strict=True and {len(refused)} attention ops cannot be rewritten:\n{lines}")


def _remove_dead(gm: GraphModule) -> None:
    """Erase what nothing uses any more, unwritten buffers too: torch counts those as random, and would allocate
    expanded keys for nobody."""
    gm.graph.eliminate_dead_code()
    for node in reversed(gm.graph.nodes):
        if node.op == "call_function" and node.target in CONSTANT and not node.users:
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()


def _predicted(choice: Choice | None) -> dict[str, Any]:
    """What the report says of a choice beyond its reason."""
    if choice is None:
        return {}
    costs: dict[str, Any] = {"sees": choice.sees}
    if choice.costs:
        best, *others = choice.costs
        costs |= {"flops": best.flops, "bytes": best.bytes, "seconds": best.seconds, "hardware": choice.hardware}
        costs["instead"] = tuple((other.form, other.seconds) for other in others)
    return costs


def _rewritten(site: MLASite, choice: Choice, seed: int | None) -> Site:
    return Site(
        choice.status,
        choice.why,
        source_position(site.attention),
        site.geometry,
        form=choice.form,
        kernel=choice.kernel,
        kv_layout=stored_layout(site),
        queries=str(site.attention.queries),
        context=str(site.attention.context),
        seed=seed,
        **_predicted(choice),
    )
