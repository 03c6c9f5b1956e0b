"""Text to token rows: where text comes from (sources, builtin) and how it is cut (rows)."""
