"""The comparison: every method on the quickstart world, over seeds and data conditions, with intervals.

plan.py        what is compared: one YAML file, and the cells that it comes to
rows.py        the training rows of a seed and a condition
texts.py       what teachers and pivot write on the training prompts, and the preference pairs made of it
cell.py        one cell: train by a run's own code, evaluate, one row of results
grid.py        all cells, two at a time, each done once
tuning.py      which settings tuning chose
statistics.py  means and differences with intervals over seeds and items
table.py       accuracies, differences and costs as pandas tables, from the Parquet of raw results
plot.py        differences with their intervals as SVG
page.py        docs/results.md and its plots
"""
