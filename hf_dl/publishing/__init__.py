"""Publish models, Spaces, metrics and datasets on the Hub: check the files, then push them.

- `hf_dl.publishing.files`: which files of a folder are published, and checks that hold for every repository
- `hf_dl.publishing.models`: checks of a trained model and its card
- `hf_dl.publishing.runs`: the push at the end of a training run
- `hf_dl.publishing.spaces`: checks of a Space; the package and a model that are copied into it
- `hf_dl.publishing.scenes`: the shards of a dataset of scenes, rendered and pushed one after the other
- `hf_dl.publishing.scene_card`: the card of that dataset, with statistics and pictures
- `hf_dl.publishing.hub`: the repository and the commit
- `hf_dl.publishing.command`: the command line of scripts/publish.py and `hf-dl publish`

`hf_dl.metrics.spaces` makes the files of a metric Space.
"""
