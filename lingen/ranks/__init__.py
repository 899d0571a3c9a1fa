"""The processes of a run: how they start and meet, what they tell each other, signals, signs of life."""
