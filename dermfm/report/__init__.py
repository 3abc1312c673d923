"""One self-contained HTML page about a run: what it was, how well it does, what it retrieves, where it looks."""
