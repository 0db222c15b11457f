"""A rewrite that validation refused, written down so that anybody can see it fail: one Python file and its tensors.

The file holds both subgraphs as code, original and rewritten, and needs nothing but PyTorch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx import Graph, Node

from mlacompile.options import Options
from mlacompile.passes.axes import BATCH, labels
from mlacompile.passes.emit import Emitter
from mlacompile.passes.recognize import MLASite, source_position
from mlacompile.passes.replay import replay
from mlacompile.passes.validate import TOKENS, Rewrite, StandIn, Verdict, rewritten_graph

_FILE = '''"""Attention rewritten by mlacompile that does not compute what the original does.

Found at {source}: {geometry}, form {form}.
PyTorch {torch}; data drawn with seed {seed}. Run it: python {name}
"""

import operator
import sys
from math import inf, nan
from pathlib import Path

import torch
from torch import device

SCALE = {scale!r}
ROUNDING = {bound!r}  # what rounding of float64 explains


def attention(q, k, v, mask, sink=None):
    """softmax(scale · q kᵀ + mask) v, with a sink as one more score that has no value."""
    scores = (q @ k.transpose(2, 3) * SCALE).masked_fill(~mask, -inf)
    scores = scores if sink is None else torch.cat((scores, sink), -1)
    return scores.softmax(-1)[..., : k.shape[2]] @ v


def mla_decode(q_latent, q_pe, c_kv, k_pe, mask, *rest, scale, causal):
    """Attention on the latent: the output, and the log-sum-exp of the scores."""
    scores = torch.einsum("bhsr,btr->bhst", q_latent, c_kv)
    if q_pe is not None:
        scores = scores + torch.einsum("bhsp,btp->bhst", q_pe, k_pe)
    scores = (scores * scale).masked_fill(~mask[:, None], -inf)
    return torch.einsum("bhst,btr->bhsr", scores.softmax(-1), c_kv), scores.logsumexp(-1)


def mla_prefill(q, c_kv, k_pe, w_uk, w_uv, mask, *rest, scale, nope_at, pe_at, **settings):
    """Attention on keys and values expanded from the latent."""
    k = q.new_zeros(q.shape[0], q.shape[1], c_kv.shape[1], q.shape[3])
    k[..., nope_at : nope_at + w_uk.shape[1]] = torch.einsum("btr,hnr->bhtn", c_kv, w_uk)
    if k_pe is not None:
        k[..., pe_at : pe_at + k_pe.shape[2]] = k_pe[:, None]
    return attention(q, k, torch.einsum("btr,hvr->bhtv", c_kv, w_uv), mask[:, None]), None


{original}

{rewritten}

def main():
    inputs = torch.load(Path(__file__).with_name("tensors.pt"))
    k, v = original(**{{name: x for name, x in inputs.items() if name.startswith("leaf")}})
    heads = inputs["q"].shape[1]
    k, v = k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1)
    want = attention(inputs["q"], k, v, inputs["mask"], inputs.get("sink"))
    got = rewritten(**inputs)
    error = float((got - want).abs().max())
    verdict = "they agree" if error <= ROUNDING else "they differ"
    print(f"largest difference {{error:.3e}}, rounding explains {{ROUNDING:.3e}}: {{verdict}}")
    return verdict == "they differ"


if __name__ == "__main__":
    sys.exit(main())
'''
_OPS = {
    "torch.ops.mlacompile.mla_decode.default": "mla_decode",
    "torch.ops.mlacompile.mla_prefill.default": "mla_prefill",
}


def write_reproducer(
    folder: Path, site: MLASite, options: Options, rewrite: Rewrite, verdict: Verdict, seed: int, form: str
) -> Path:
    """Write ``reproduce.py`` and ``tensors.pt`` into ``folder`` for what ``validate`` refused; returns the file."""
    with unset_fake_temporarily(), torch.no_grad():
        data = StandIn.of(site, seed)
        before = _original_graph(site, data)
        after, tensors, _ = rewritten_graph(site, options, data, rewrite)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, folder / "tensors.pt")
    file = folder / "reproduce.py"
    text = _FILE.format(
        source=source_position(site.attention),
        geometry=site.geometry,
        form=form,
        torch=torch.__version__,
        seed=seed,
        name=file.name,
        scale=site.attention.scale,
        bound=verdict.bound,
        original=_function("original", before),
        rewritten=_function("rewritten", after),
    )
    file.write_text(text)
    return file


def _original_graph(site: MLASite, data: StandIn) -> Graph:
    """The cone of a site at the sizes of its stand-in: leaves → K, V."""
    cone, graph, mode = site.cone, Graph(), FakeTensorMode()
    feeds: dict[Node, Node] = {}
    for (name, value), node in zip(data.leaves(cone).items(), (*cone.latent_nodes(), *cone.weights), strict=True):
        feeds[node] = graph.placeholder(name)
        with mode:
            feeds[node].meta["val"] = torch.empty(value.shape, dtype=value.dtype)
    end = graph.output(())
    batch = data.q.shape[0] if any(BATCH in labels(cone.dims[n]) for n in cone.latent_nodes()) else 1
    env = replay(cone, feeds, batch, TOKENS, Emitter(end))
    end.args = ((env[site.attention.k], env[site.attention.v]),)
    graph.eliminate_dead_code()
    return graph


def _function(name: str, graph: Graph) -> str:
    """A graph as the text of a Python function."""
    text = graph.python_code("self").src.strip().replace("def forward(self, ", f"def {name}(", 1)
    for op, function in _OPS.items():
        text = text.replace(op, function)
    return text + "\n"
