"""The stages a graph goes through, one file each; ``pipeline.py`` lists them in order."""
