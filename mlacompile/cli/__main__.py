"""`python -m mlacompile.cli`, for an interpreter into which nothing was installed."""

from mlacompile.cli import main

main()
