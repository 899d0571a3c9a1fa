"""Judgements of generated clips, with intervals and floors: `lingen eval`, `lingen study`."""
