"""Triton and Gluon kernels, a folder a family; each says in words which inputs it supports."""
