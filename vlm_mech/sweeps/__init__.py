"""One intervention over a grid of cells, computing only what can change."""
