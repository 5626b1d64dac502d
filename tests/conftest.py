"""Makes `tests/image_files.py` importable from every folder of tests."""
