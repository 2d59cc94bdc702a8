"""Recipes: the code that the train and evaluate scripts of a family, its Space and the command line share.

One file per family: flags as dataclasses, the data and the model for these flags, evaluation, figures and report.
The training loops and the loss terms are in the scripts.
"""
