"""The command line: parse, call `awqkit.api`, print. One file a verb, the table of verbs in main.py."""
