"""Manual pages and shell completions, made from the documentation and the tables that the programs themselves use."""
