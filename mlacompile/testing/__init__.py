"""What tests, benchmarks and users share: tiny models, timing, comparison."""
