"""What more compute would bring: points of (compute, value) in, the law behind them with honest intervals out.

`sigmoid` and `power` hold the two laws, `least_squares` fits either, `profile` says what the points cannot tell,
`ceiling` fits several runs with one ceiling, `holdout` predicts what was kept back. All of that is arithmetic. `curves`
reads runs, ladders and tables, `window` says which of their points count, `findings`, `table` and `plot` show what was
found, and `job` is the command.
"""
