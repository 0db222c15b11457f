"""Tests of mlacompile; folders mirror the package."""
