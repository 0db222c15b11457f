"""Peak memory of a lossless conversion: a synthetic model of 8B shape, its random shards made on the spot.

    python benchmarks/convert_memory.py [--layers 32] [--keep]

With all 32 layers the disk has to hold 16 GB and 24 GB. Weights repeat a small block of noise:
what counts is their number. The conversion runs in a process of its own, whose peak is what the operating system says.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from mlacompile.checkpoint import CheckpointWriter, TensorSpec, plan_shards
from mlacompile.convert.families import describe

SHAPE = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


def make_source(folder: Path, layers: int) -> int:
    """Write the synthetic model; returns its bytes."""
    config = SHAPE | {"num_hidden_layers": layers}
    specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in describe(config).tensors().items()]
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()

    def produce(spec: TensorSpec) -> Tensor:
        count = spec.nbytes // spec.dtype.itemsize
        return noise.repeat(-(-count // len(noise)))[:count].view(spec.shape)

    with CheckpointWriter(folder, fingerprint="") as writer:
        writer.write_tensors(plan_shards(specs), produce)
        writer.write_json("config.json", config)
        writer.commit()
    return sum(spec.nbytes for spec in specs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--keep", action="store_true", help="leave both models where they are")
    parser.add_argument("--folder", type=Path, default=None, help="a disk with enough room; default: the temporary one")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mlacompile-", dir=options.folder))
    try:
        nbytes = make_source(folder / "gqa", options.layers)
        started = time.monotonic()
        command = [sys.executable, "-m", "mlacompile.cli", "convert", str(folder / "gqa"), "--out", str(folder / "mla")]
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
        seconds = time.monotonic() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        report = json.loads(done.stdout)
        found = {
            "source_gb": round(nbytes / 1e9, 2),
            "result_gb": round(sum(file.stat().st_size for file in (folder / "mla").iterdir()) / 1e9, 2),
            "parameters": {side: report[side]["parameters"] for side in ("source", "result")},
            "peak_memory_gb": round(peak / 1e9, 2),
            "seconds": round(seconds, 1),
        }
        print(json.dumps(found, indent=2))
    finally:
        if not options.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
