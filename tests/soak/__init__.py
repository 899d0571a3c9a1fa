"""Long trials by chance, each of which can be repeated by its seed: ``python -m tests.soak fuzz``."""
