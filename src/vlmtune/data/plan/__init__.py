"""Which rows a run takes, in which order, and how they share steps and packs."""
