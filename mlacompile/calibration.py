"""Where FP8 is safe, measured on text: the error it adds to every product and, through it, to the logits.

    site        a linear layer with weight and activations in FP8 ("weights"), or the up-projection of an attention
                with its weight alone in FP8, as the absorbed products of its heads have it ("absorb")
    measured    what the site's output is off by, and what the logits are, were it the only site in FP8
    policy      the best sites, whose divergences add up to the budget; without the worst of them, until the perplexity
                of all together rises by no more than that

Compute in float32 if you can: in 16 bits, rounding alone moves logits by as much as one site in FP8 does. Everything is
measured in eager mode, by hooks that put quantized products in the places of the original ones; rounding
is that of ``mlacompile::fp8_linear``. Nothing of the model is changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlacompile.errors import UnsupportedInputError
from mlacompile.gate import FORMAT, Gate
from mlacompile.geometry import SCALE_GROUP
from mlacompile.ops.fp8_linear import E4M3, fp8_dequantize_weight, fp8_linear, fp8_quantize_weight, lost_rows
from mlacompile.ops.fp8_quantize import fp8_quantize

Say = Callable[[str], None]
Advance = Callable[[int, int], None]
#: Cuts as much of what is left each time the budget is exceeded.
CUT = 0.1


@dataclass(frozen=True)
class Site:
    """One place where FP8 was tried.

    path: of the module. kind: "weights" or "absorb". linears: paths of the layers whose weights are quantized.
    output_error: norm of the error over norm of the output, of this site on exact inputs. divergence: of the logits, in
    nats a token, were this the only site in FP8. lost: rows of its weights that become zero beside others that are far
    larger. safe: whether the policy takes it; not where rows are lost.
    """

    path: str
    kind: str
    linears: tuple[str, ...]
    output_error: float = math.nan
    divergence: float = math.nan
    lost: int = 0
    safe: bool = True

    @property
    def key(self) -> tuple[str, str]:
        """What tells sites apart."""
        return self.path, self.kind


@dataclass(frozen=True)
class Calibration:
    """What was found. losses: nats a token by name: "original" and "fp8" on the text that the policy was chosen on,
    "…, held back" on another one, "…, 10 turns" on the latter, if there is one, read in turns."""

    sites: tuple[Site, ...]
    budget: float
    tokens: int
    losses: dict[str, float]
    model: str = ""
    cache: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def rise(self) -> float:
        """By how much the policy raises perplexity: 0.01 is one percent."""
        return self.rises["fp8"]

    @property
    def rises(self) -> dict[str, float]:
        """The same for every text and way of reading it: "fp8", "fp8, held back", …"""
        pairs = {name: name.replace("fp8", "original", 1) for name in self.losses if name.startswith("fp8")}
        return {name: math.exp(self.losses[name] - self.losses[other]) - 1 for name, other in pairs.items()}

    @property
    def gate(self) -> Gate:
        """For the option ``fp8``."""
        return Gate(self._modes())

    def _modes(self) -> dict[str, str]:
        taken: dict[str, set[str]] = {}
        for site in self.sites:
            taken.setdefault(site.path, set()).update({site.kind} if site.safe else ())
        return {path: "all" if len(kinds) == 2 else next(iter(kinds), "off") for path, kinds in taken.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what :meth:`mlacompile.gate.Gate.read` reads, and the figures behind it."""
        modes = self._modes()
        sites: dict[str, dict[str, Any]] = {path: {"mode": mode} for path, mode in modes.items()}
        for site in self.sites:
            sites[site.path][site.kind] = {k: v for k, v in asdict(site).items() if k not in ("path", "kind")}
        perplexity = {name: math.exp(loss) for name, loss in self.losses.items()}
        head = {"format": FORMAT, "model": self.model, "budget": self.budget, "tokens": self.tokens}
        figures = {"perplexity": perplexity, "rise": self.rises, **self.details, "sites": sites}
        return _short({**head, "cache": self.cache, **figures})

    def write(self, out: str | Path) -> None:
        """Write the file for ``fp8="….json"``, whole or not at all."""
        out = Path(out)
        partial = out.with_name(out.name + ".partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        partial.replace(out)


def _short(value: Any) -> Any:
    """Plain data with six digits a number, which is more than was measured."""
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def calibrate(
    model: nn.Module,
    windows: Tensor,
    *,
    budget: float = 0.01,
    site_tokens: int = 512,
    turns: int = 1,
    cache: str | None = "fp8_e4m3",
    held_back: Tensor | None = None,
    keep: Iterable[str] = (),
    name: str = "",
    say: Say = lambda text: None,
    advance: Advance = lambda done, total: None,
) -> Calibration:
    """Measure every site of ``model`` on token ids ``windows [W, T]``, and choose those that keep to ``budget``.

    Args:
        model: a causal language model of transformers, in eval mode; not changed.
        budget: by how much perplexity may rise, all sites together: 0.01 is one percent.
        site_tokens: tokens (whole windows, at least one, cut to this many) on which sites are measured one by one.
        turns: also measure windows that are read in so many pieces on a cache, as turns of a conversation are.
        cache: dtype of that cache, where the model caches latents: a dtype of LatentCache, or None for the model's own.
        held_back: token ids ``[W, T]`` of another text, on which the policy is measured and not chosen.
        keep: patterns of paths that stay as they are. name: of the model, for the file.
        say, advance: told what happens, and how many sites are done, of how many.
    Raises:
        UnsupportedInputError: there is nothing to try, a budget is not positive, or a loss is not finite.
    """
    if not budget > 0:
        raise UnsupportedInputError(f"budget={budget}: expected how much perplexity may rise, such as 0.01")
    sites = find_sites(model, keep)
    if not sites:
        raise UnsupportedInputError(
            f"no product of the model can be in FP8: weights smaller than {SCALE_GROUP}, or kept"
        )
    trial = _Trial(model, sites)
    rows = max(1, min(len(windows), site_tokens // windows.shape[1]))
    few = windows[:rows, :site_tokens]
    with torch.no_grad():
        original = _mean_loss(model, windows)
        if not math.isfinite(original):
            raise UnsupportedInputError(
                f"the loss of the model on this text is {original}; nothing can be compared with it"
            )
        errors = trial.output_errors(few)
        exact = model(input_ids=few).logits.float().log_softmax(-1)
        found = []
        for i, site in enumerate(sites):
            with trial.on([site]):
                off = model(input_ids=few).logits.float().log_softmax(-1)
            divergence = float((exact.exp() * (exact - off)).sum(-1).mean())
            lost = sum(trial.lost[path] for path in site.linears)
            found.append(replace(site, output_error=errors[site.key], divergence=divergence, lost=lost))
            advance(i + 1, len(sites))
        found, loss = _within(model, windows, trial, found, budget, original, say)
        losses = {"original": original, "fp8": loss}
        taken = [site for site in found if site.safe]
        if held_back is not None:
            losses["original, held back"] = _mean_loss(model, held_back)
            with trial.on(taken):
                losses["fp8, held back"] = _mean_loss(model, held_back)
        if turns > 1:
            losses |= _in_turns(model, windows if held_back is None else held_back, turns, trial, taken, cache)
    used = cache if turns > 1 and _caches_latents(model) else None
    return Calibration(tuple(found), budget, windows[:, 1:].numel(), losses, name, used, {"turns": turns})


def find_sites(model: nn.Module, keep: Iterable[str] = ()) -> list[Site]:
    """Linear layers that are large enough and neither head nor router; and attention that decode absorbs."""
    import fnmatch

    from mlacompile.integrations.fp8_modules import Modules

    patterns = tuple(keep)
    kept = Modules.of(model).kept
    linears = [
        Site(path, "weights", (path,))
        for path, module in model.named_modules()
        if type(module) is nn.Linear and path not in kept and min(module.weight.shape) >= SCALE_GROUP
    ]
    return [
        site
        for site in [*linears, *_absorbed(model)]
        if not any(fnmatch.fnmatchcase(site.path, pattern) for pattern in patterns)
    ]


def _absorbed(model: nn.Module) -> list[Site]:
    """Attention whose up-projections the backend absorbs in a decode step; empty where there is none."""
    from mlacompile.explainer import products
    from mlacompile.testing.models import static_cache

    if not _caches_latents(model):
        return []
    past = static_cache(model, 1, 16, length=8)
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    options = {"fp8": {"*": "absorb"}, "verify": "off"}
    found: dict[str, set[str]] = {}
    for product, names in products(model, input_ids=token, past_key_values=past, options=options):
        owners = {name.removesuffix(".weight") for name in names}
        if len(product.shape) == 3 and product.left is None and all(type(_at(model, o)) is nn.Linear for o in owners):
            found.setdefault(product.where, set()).update(owners)
    return [Site(path, "absorb", tuple(sorted(owners))) for path, owners in found.items()]


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _caches_latents(model: nn.Module) -> bool:
    config: Any = getattr(model, "config", None)
    return hasattr(config, "get_text_config") and bool(getattr(config.get_text_config(decoder=True), "kv_lora_rank", 0))


class _Trial:
    """Quantized products in the places of the original ones, switched on site by site."""

    def __init__(self, model: nn.Module, sites: Iterable[Site]) -> None:
        self.model, self.sites = model, list(sites)
        self.linears = {path: model.get_submodule(path) for site in self.sites for path in site.linears}
        self.quantized: dict[str, tuple[Tensor, Tensor]] = {}
        self.lost: dict[str, int] = {}

    def product(self, path: str, kind: str, x: Tensor) -> Tensor:
        """What the layer would compute: by its weight and x in FP8, or by its weight alone."""
        linear: Any = self.linears[path]
        if path not in self.quantized:
            self.quantized[path] = fp8_quantize_weight(linear.weight.detach())
            self.lost[path] = len(lost_rows(linear.weight, self.quantized[path][0]))
        weight, descale = self.quantized[path]
        rows = x.reshape(-1, x.shape[-1])
        if kind == "weights":
            q, x_descale = fp8_quantize(rows, SCALE_GROUP, E4M3)
            out = fp8_linear(q, x_descale, weight, descale, x.dtype)
        else:
            out = F.linear(rows, fp8_dequantize_weight(weight, descale, x.dtype))
        out = out.reshape(*x.shape[:-1], out.shape[-1])
        return out if linear.bias is None else out + linear.bias

    @contextmanager
    def on(self, sites: Iterable[Site]) -> Iterator[None]:
        """Within, these sites are in FP8. A layer that two of them quantize has its activations quantized too."""
        kinds: dict[str, str] = {}
        for site in sites:
            for path in site.linears:
                kinds[path] = "weights" if "weights" in (site.kind, kinds.get(path)) else site.kind

        def hook(path: str) -> Callable[..., Tensor]:
            return lambda module, args, out: self.product(path, kinds[path], args[0])

        handles = [self.linears[path].register_forward_hook(hook(path)) for path in kinds]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def output_errors(self, windows: Tensor) -> dict[tuple[str, str], float]:
        """The error of every site on the inputs that the unchanged model has there, in one run."""
        sums = {site.key: [0.0, 0.0] for site in self.sites}

        def hook(site: Site, path: str) -> Callable[..., None]:
            def observe(module: nn.Module, args: Any, out: Tensor) -> None:
                off = self.product(path, site.kind, args[0]).double() - out.double()
                sums[site.key][0] += float(off.square().sum())
                sums[site.key][1] += float(out.double().square().sum())

            return observe

        handles = [self.linears[p].register_forward_hook(hook(site, p)) for site in self.sites for p in site.linears]
        try:
            self.model(input_ids=windows)
        finally:
            for handle in handles:
                handle.remove()
        return {key: math.sqrt(error / size) if size else 0.0 for key, (error, size) in sums.items()}


def _within(
    model: nn.Module, windows: Tensor, trial: _Trial, sites: list[Site], budget: float, original: float, say: Say
) -> tuple[list[Site], float]:
    """The sites, the worst of them not safe, such that all safe ones together keep to the budget; and their loss.

    Errors of different sites have little to do with each other, so that their divergences add up.
    """
    limit, total, within = math.log1p(budget), 0.0, set()
    for site in sorted(sites, key=lambda site: site.divergence):
        total += 0.0 if site.lost else max(0.0, site.divergence)
        if not site.lost and total <= limit:
            within.add(site.key)
    safe = [replace(site, safe=site.key in within) for site in sites]
    while True:
        taken = [site for site in safe if site.safe]
        with trial.on(taken):
            loss = _mean_loss(model, windows)
        say(f"{len(taken)} of {len(sites)} sites in FP8: perplexity {math.exp(loss):.3f}, not {math.exp(original):.3f}")
        if not taken or loss - original <= limit:
            return safe, loss
        worst = sorted(taken, key=lambda site: -site.divergence)[: max(1, int(CUT * len(taken)))]
        gone = {site.key for site in worst}
        safe = [replace(site, safe=site.safe and site.key not in gone) for site in safe]


def _mean_loss(model: nn.Module, windows: Tensor) -> float:
    """Nats a token, each window by itself."""
    total = 0.0
    for window in windows:
        logits = model(input_ids=window[None]).logits[0, :-1].float()
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / windows[:, 1:].numel()


def _in_turns(
    model: nn.Module, windows: Tensor, turns: int, trial: _Trial, taken: list[Site], cache: str | None
) -> Mapping[str, float]:
    """Losses of windows read in ``turns`` pieces, each on what the cache holds of the ones before it."""
    label = f"{turns} turns"
    with trial.on(taken):
        quantized = _loss_in_turns(model, windows, turns, cache)
    return {f"original, {label}": _loss_in_turns(model, windows, turns, None), f"fp8, {label}": quantized}


def _loss_in_turns(model: nn.Module, windows: Tensor, turns: int, cache: str | None) -> float:
    total = 0.0
    for window in windows:
        past = _cache(model, len(window), cache)
        parts = [model(input_ids=part[None], past_key_values=past).logits[0] for part in window.tensor_split(turns)]
        total += F.cross_entropy(torch.cat(parts)[:-1].float(), window[1:], reduction="sum").item()
    return total / windows[:, 1:].numel()


def _cache(model: Any, length: int, dtype: str | None) -> Any:
    from transformers import DynamicCache

    if dtype is None or not _caches_latents(model):
        return DynamicCache(config=model.config)
    from mlacompile.integrations.transformers import LatentCache

    return LatentCache(model.config, max_cache_len=length, dtype=dtype)
