"""``LatentCache``: a Hugging Face cache that keeps latents, for eager mode, stock ``torch.compile`` and this backend.

    cache = LatentCache(model.config, max_cache_len=8192)
    model.generate(**inputs, past_key_values=cache)

Models that cache latents (transformers ≥ 5.15) hand ``update`` a ``c_kv`` ``[B, 1, S, R]`` and a rotary key ``k_pe``
``[B, 1, S, P]``. Both go into the memory of ``cache/store.py``, at addresses that stay, so a whole decode step can be
replayed from a CUDA graph. Everything else is what StaticCache does: sizes of masks, a length that is a tensor, reset,
crop, beams. Unlike StaticCache it can be cropped, and a token too many is an error that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticIndexedLayer, StaticLayer

from mlacompile.cache.storage import Storage
from mlacompile.cache.store import LatentStore
from mlacompile.errors import CacheError, UnsupportedInputError
from mlacompile.geometry import KVLayout
from mlacompile.ops.cache_slots import cache_slots, room_left, slots_on_device
from mlacompile.ops.latents import expanded_again, latent_of


class LatentLayer(StaticLayer):
    """Latents and rotary keys of one layer, ``max_cache_len`` rows for each sequence.

    ``keys`` and ``values`` are the latents and the rotary keys, as the model gets them.
    """

    is_compileable = True
    is_croppable = True
    is_sliding = False

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        # Not StaticLayer's: it would assign ``keys`` and ``values``, which are views of the store here.
        self.max_cache_len = max_cache_len
        self.is_initialized = False
        self.cumulative_length = torch.tensor(0, dtype=torch.int64)
        self.store: LatentStore | None = None

    def plan(self, layer_idx: int, rank: int, rope: int, storage: Storage) -> None:
        """Say what will be stored, before anything is."""
        self.layer_idx, self.rank, self.rope, self.storage = layer_idx, rank, rope, storage

    @property
    def keys(self) -> Tensor | None:
        """The latents ``[B, 1, T, R]``, in use or not; None before the first token."""
        return None if self.store is None else self.store.read()[0].unsqueeze(1)

    @property
    def values(self) -> Tensor | None:
        """The rotary keys ``[B, 1, T, P]``, in use or not; None before the first token."""
        return None if self.store is None else self.store.read()[1].unsqueeze(1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, the dtype and the device of these."""
        self.initialize(key_states.shape[0], key_states.dtype, key_states.device)

    def initialize(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate for ``batch_size`` sequences of a model that computes in ``dtype`` on ``device``."""
        self.batch_size, self.num_heads = batch_size, 1
        self.dtype, self.device = dtype, device
        self.store = self.storage.allocate(
            batch_size, self.max_cache_len, self.rank, self.rope, compute=dtype, device=device
        )
        self.cumulative_length = self.cumulative_length.to(device)
        self._pin()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the next tokens, and return all rows.

        Args:
            key_states: c_kv ``[B, 1, S, R]``. value_states: k_pe ``[B, 1, S, P]``.
        Returns:
            c_kv ``[B, 1, T, R]`` and k_pe ``[B, 1, T, P]`` with T = max_cache_len, in the dtype of the model.
        Raises:
            CacheFullError: there is no room for S more; nothing was written.
            CacheError: these are not latents of this model, or are of another batch size.
        """
        if not self.is_initialized:
            self._check(key_states, value_states, key_states.shape[0])
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states, self.batch_size)
        if self._are_expanded(key_states, value_states):
            return self._update_expanded(key_states, value_states)
        count = key_states.shape[-2]
        slots = self._slots(count)
        c_kv, k_pe = self._write(slots, count, key_states.squeeze(1), value_states.squeeze(1))
        return c_kv.unsqueeze(1), k_pe.unsqueeze(1)

    def _update_expanded(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The same for keys ``[B, H, S, D]`` and values ``[B, H, S, V]``, as transformers before 5.15 caches them.

        Returns those of all rows. The latents behind them are found when mlacompile compiles this.
        """
        count = k.shape[-2]
        slots = self._slots(count)
        c_kv, k_pe = latent_of(k, v, self.rank, self.rope)
        return expanded_again(*self._write(slots, count, c_kv, k_pe), k, v)

    def _write(self, slots: Tensor, count: int, c_kv: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        self.cumulative_length.add_(count)
        assert self.store is not None
        self.store.write(slots, c_kv, k_pe)
        return self.store.read()

    def get_seq_length(self) -> Any:
        """How many tokens are held: a tensor, as StaticLayer has it, so that nothing compiled depends on its value."""
        return self.cumulative_length if self.is_initialized else 0

    def reset(self) -> None:
        """Forget everything; memory and addresses stay."""
        if self.store is not None:
            self.store.clear()
        self.cumulative_length.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens back.

        Raises:
            CacheError: a positive number, or more tokens than are held.
        """
        if tokens_to_remove > 0:
            raise CacheError(
                f"crop({tokens_to_remove}): expected 0 or a negative number, the tokens to remove from the end. "
                f"To keep {tokens_to_remove} tokens call crop({tokens_to_remove} - length)."
            )
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        held = int(self.cumulative_length)
        if held + tokens_to_remove < 0:
            raise CacheError(f"crop({tokens_to_remove}): the cache holds {held} tokens; expected at most that many")
        self.cumulative_length.add_(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence ``beam_idx[i]`` was, in place.

        Raises:
            CacheError: as many indices as sequences were expected; batch_select_indices() changes the batch.
        """
        if self.store is None:
            return
        if len(beam_idx) != self.batch_size:
            raise CacheError(
                f"reorder_cache: got {len(beam_idx)} indices for {self.batch_size} sequences; expected one for each. "
                "batch_select_indices() changes how many there are."
            )
        self.store.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times. Memory is allocated anew, and a compiled step compiles again."""
        self._rebatch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the sequences ``indices``. Memory is allocated anew, and a compiled step compiles again."""
        self._rebatch(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """Refused: memory that moves to the host and back has no address a CUDA graph could keep."""
        raise CacheError("a LatentCache stays on its device; use DynamicCache(offloading=True) to offload")

    prefetch = offload

    def _rebatch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.store is not None:
            self.store.rebatch(change)
            self.batch_size = next(iter(self.store.arrays().values())).shape[0]
            self._pin()

    def _pin(self) -> None:
        assert self.store is not None
        if not torch.compiler.is_compiling():
            self.store.pin()
            torch._dynamo.mark_static_address(self.cumulative_length)

    def _slots(self, count: int) -> Tensor:
        """Where the next tokens go, checked. A GPU is not waited for where nothing may wait: in compiled code it stops
        itself instead."""
        length = self.cumulative_length
        if length.device.type == "cpu":
            return cache_slots(length, count, self.max_cache_len)
        if not torch.compiler.is_compiling() and not _capturing(length) and length.device.type != "meta":
            room_left(int(length), count, self.max_cache_len)
        return slots_on_device(length, count, self.max_cache_len)

    def _check(self, c_kv: Tensor, k_pe: Tensor, batch: int) -> None:
        count = c_kv.shape[-2]
        if self._are_expanded(c_kv, k_pe) and c_kv.shape[0] == batch and torch.compiler.is_compiling():
            return
        if c_kv.shape != (batch, 1, count, self.rank) or k_pe.shape != (batch, 1, count, self.rope):
            raise CacheError(self._mismatch(c_kv, k_pe, batch))

    def _are_expanded(self, k: Tensor, v: Tensor) -> bool:
        """Whether these are keys and values of every head, and no latents."""
        alike = k.shape[:3] == v.shape[:3]
        return alike and (k.shape[1] != 1 or k.shape[3] != self.rank or v.shape[3] != self.rope)

    def _mismatch(self, c_kv: Tensor, k_pe: Tensor, batch: int) -> str:
        got = f"layer {self.layer_idx}: got {list(c_kv.shape)} and {list(k_pe.shape)}"
        want = f"expected a latent [{batch}, 1, S, {self.rank}] and a rotary key [{batch}, 1, S, {self.rope}]"
        if c_kv.shape[0] != batch:
            return f"{got}; {want}: the cache is for {batch} sequences. Make another for another batch."
        return (
            f"{got}; {want}: these are expanded keys and values, or belong to another model. transformers caches "
            f"latents from 5.15 on, those of sparse attention later (this is {transformers.__version__}): upgrade it, "
            "or compile all that uses the cache, the prompt too (model.forward = torch.compile(model.forward, "
            "backend='mlacompile')), or use StaticCache."
        )


class IndexedLatentLayer(StaticIndexedLayer, LatentLayer):
    """The same for sparse attention, whose indexer keeps keys of its own, in the dtype of the model."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LatentLayer.reorder_cache(self, beam_idx)
        if self.is_indexer_initialized:
            keys: Tensor = self.indexer_keys  # type: ignore[has-type]
            keys.copy_(keys.index_select(0, beam_idx.to(keys.device)))

    def crop(self, tokens_to_remove: int) -> None:
        LatentLayer.crop(self, tokens_to_remove)
        if self.is_indexer_initialized:
            self.indexer_cumulative_length.add_(tokens_to_remove)

    def _rebatch(self, change: Callable[[Tensor], Tensor]) -> None:
        LatentLayer._rebatch(self, change)
        if self.is_indexer_initialized:
            keys: Tensor = self.indexer_keys  # type: ignore[has-type]
            kept = self.indexer_keys = change(keys).contiguous()
            torch._dynamo.mark_static_address(kept)


def _capturing(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class LatentCache(StaticCache):
    """A static cache of latents for models with multi-head latent attention.

    Args:
        config: configuration of the model.
        max_cache_len: tokens a sequence can hold. One more is an error.
        dtype: what is stored: None (what the model computes in), "bf16", "fp16", "fp32", "fp8_e4m3", "fp8_e5m2", or a
            torch dtype. FP8 is quantized when written and dequantized when read.
        scales: of an FP8 latent: "block" (the default: one for 128 values; 656 bytes a token at rank 512 with 64 rope
            values) or "token" (one for all; 644 bytes).
        rope_dtype: of the rotary keys of an FP8 cache: "bf16" (the default), "fp16", "fp32", or the FP8 type, then with
            a scale of their own.
        rank, rope: values in a latent and in a rotary key; from the configuration when not given.
    Raises:
        UnsupportedInputError: the configuration describes no latent attention, or layers that keep something else.

    Memory is allocated when the first tokens arrive, or by :meth:`early_initialization`, which is needed when the very
    first call is a compiled one that shall run from a CUDA graph.
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int,
        *,
        dtype: str | torch.dtype | None = None,
        scales: str | None = None,
        rope_dtype: str | torch.dtype | None = None,
        rank: int | None = None,
        rope: int | None = None,
    ) -> None:
        if not isinstance(max_cache_len, int) or max_cache_len < 1:
            raise UnsupportedInputError(f"max_cache_len={max_cache_len!r}: expected a positive number of tokens")
        super().__init__(config=config, max_cache_len=max_cache_len)
        text = config.get_text_config(decoder=True)
        self.rank = _width(text, "kv_lora_rank", rank, "rank")
        self.rope = _width(text, "qk_rope_head_dim", rope, "rope")
        self.capacity = max_cache_len
        self.storage = Storage.parse(dtype, scales, rope_dtype)
        plain: list[Any] = list(self.layers)
        self.layers: list[Any] = [self._latent_layer(i, layer) for i, layer in enumerate(plain)]

    def early_initialization(
        self,
        batch_size: int,
        num_heads: Any = 1,
        head_dim: Any = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate now: for ``batch_size`` sequences of a model that computes in ``dtype`` on ``device``.

        ``num_heads`` and ``head_dim`` are accepted because StaticCache has them; widths come from the configuration.
        """
        for layer in self.latent_layers:
            if not layer.is_initialized:
                layer.initialize(batch_size, dtype, torch.device(device))

    @property
    def latent_layers(self) -> list[LatentLayer]:
        """The layers that hold latents."""
        return [layer for layer in self.layers if isinstance(layer, LatentLayer)]

    @property
    def layout(self) -> KVLayout | None:
        """How a token lies in memory; None while the dtype is the model's and no token has come yet."""
        store = self.latent_layers[0].store
        if store is not None:
            return store.layout
        return self.storage.layout(self.rank, self.rope)

    @property
    def bytes_per_token(self) -> int | None:
        """Bytes one token takes in all layers together; None while that is not known (see ``layout``)."""
        layout = self.layout
        return None if layout is None else layout.bytes_per_token * len(self.latent_layers)

    def __repr__(self) -> str:
        layout = self.layout or "dtype of the model"
        return f"LatentCache({len(self.latent_layers)} layers × {self.capacity} tokens, {layout} a layer)"

    def _latent_layer(self, index: int, layer: Any) -> Any:
        if type(layer) is StaticLayer:
            latent: LatentLayer = LatentLayer(self.capacity)
        elif type(layer) is StaticIndexedLayer:
            latent = IndexedLatentLayer(self.capacity)
        elif hasattr(layer, "max_cache_len"):
            raise UnsupportedInputError(
                f"layer {index} needs a {type(layer).__name__}; LatentCache holds full latent attention only. "
                "Use StaticCache for this model."
            )
        else:
            return layer  # recurrent state, or nothing
        latent.plan(index, self.rank, self.rope, self.storage)
        return latent


def _width(config: Any, name: str, given: int | None, argument: str) -> int:
    width = getattr(config, name, None) if given is None else given
    if not isinstance(width, int) or width < 0:
        raise UnsupportedInputError(
            f"{type(config).__name__} has {name}={width!r}, so LatentCache does not know how wide a latent is. Use "
            f"StaticCache for a model without latent attention, or say {argument}=."
        )
    return width
