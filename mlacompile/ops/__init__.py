"""The ops that rewritten graphs speak: schema, fake and a plain PyTorch body that is the reference for every kernel."""

from mlacompile.ops.head_product import head_product, head_product_reference
from mlacompile.ops.mla_decode import mla_decode, mla_decode_reference
from mlacompile.ops.mla_prefill import mla_prefill, mla_prefill_reference
from mlacompile.ops.row_product import row_product, row_product_reference
from mlacompile.ops.write_latents import write_latents, write_latents_reference

__all__ = [
    "head_product",
    "head_product_reference",
    "mla_decode",
    "mla_decode_reference",
    "mla_prefill",
    "mla_prefill_reference",
    "row_product",
    "row_product_reference",
    "write_latents",
    "write_latents_reference",
]
