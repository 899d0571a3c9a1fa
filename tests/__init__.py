"""The tests, in folders named after the rooms of lingen; what several of them use is in tests.helpers."""
