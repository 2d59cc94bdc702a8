"""Reports from files: experiments, tables, plots and model cards, made from results.json and log.jsonl.

Nothing here trains, and nothing here knows a model or a dataset:

- `experiment`: reads experiment files and the files of runs, and names the cells;
- `report`: gathers the results of an experiment in one object and one JSON file;
- `tables`: mean ± standard deviation over the seeds, in Markdown;
- `reading`: texts about results whose numbers come from the report;
- `plots`: learning curves, and the table as a picture;
- `grids`: grids of small images with titles;
- `card`: the model card of a run or of an experiment, with the metadata for the Hub.
"""
