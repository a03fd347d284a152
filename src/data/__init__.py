"""What the tasks share of their data: layout, splits, loader, and the languages and grammars behind them."""
