"""Makes `tiny_models` importable from every test folder: pytest puts this file's folder on the path."""
