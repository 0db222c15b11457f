"""Tests of the conversion from grouped-query to latent attention."""
