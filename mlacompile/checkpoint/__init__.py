"""Checkpoints as streams: safetensors in, safetensors out, one tensor at a time, never half-written."""

from mlacompile.checkpoint.reader import CheckpointReader
from mlacompile.checkpoint.tensors import TensorSpec, dtype_name
from mlacompile.checkpoint.writer import CheckpointWriter, plan_shards

__all__ = ["CheckpointReader", "CheckpointWriter", "TensorSpec", "dtype_name", "plan_shards"]
