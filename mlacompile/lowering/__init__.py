"""From a rewritten graph to something that runs: kernels for our ops, Inductor for the rest, CUDA graphs around it."""
