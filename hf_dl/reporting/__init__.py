"""Reports from files: experiments, tables, plots and model cards, made from results.json and log.jsonl alone.

Nothing here trains, and nothing here knows a model or a data set:

- `experiment`: read an experiment file, name its cells, collect their results into one JSON;
- `tables`: mean ± standard deviation over the seeds, as markdown;
- `plots`: learning curves and the table as a picture;
- `grids`: sheets of small images with titles;
- `card`: the model card of a run or of an experiment, with the metadata that the Hub reads.
"""
