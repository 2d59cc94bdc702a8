"""Publish models, Spaces and metrics on the Hub: check the files, then push them in one commit.

- `hf_dl.publishing.files`: which files of a folder are published, and checks that hold for every repository
- `hf_dl.publishing.models`: checks of a trained model and its card
- `hf_dl.publishing.spaces`: checks of a Space; the package and a model that are copied into it
- `hf_dl.publishing.hub`: the commit
- `hf_dl.publishing.command`: the command line of scripts/publish.py and `hf-dl publish`

`hf_dl.metrics.spaces` makes the files of a metric Space.
"""
