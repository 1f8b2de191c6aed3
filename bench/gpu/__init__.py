"""Evidence from a GPU: one command that checks, measures and records, within a budget."""
