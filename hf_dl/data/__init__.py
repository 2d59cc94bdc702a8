"""Data as `datasets.Dataset` objects: every module has one `load(split, source, ...)` with documented columns."""
