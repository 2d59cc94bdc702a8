"""Metrics: pure functions, and thin `evaluate.Metric` wrappers around them that need no network.

`classification` scores predicted classes (accuracy, F1, top-k), `segmentation` scores masks (ARI, mIoU, mBO), `images`
scores sets of images (FID, KID), `programs` scores programs of word problems (exact match, execution accuracy). Import
the file you need; importing `hf_dl.metrics` itself loads nothing.
"""
