"""Grouped-query attention becomes multi-head latent attention: checkpoints in, checkpoints out."""
